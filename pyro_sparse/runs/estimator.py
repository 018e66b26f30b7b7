"""scikit-learn estimators: arrays or frames in, predictions with their uncertainty out.

::

    regressor = SparseBNNRegressor().fit(frame, y)
    mean, std = regressor.predict(rows, return_std=True)
    regressor.inclusion_  # the probability that a column is of use, by its name

They are the models, the training and the posterior of this package with the defaults of its runs,
and keep to scikit-learn's rules: pipelines, cross-validation, cloning, pickling.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data

from pyro_sparse import data, infer, likelihoods
from pyro_sparse.data import tables
from pyro_sparse.infer.supports import keep_supports
from pyro_sparse.posterior import Posterior
from pyro_sparse.ranges import positive, whole
from pyro_sparse.runs import experiment
from pyro_sparse.runs.settings import settings_for

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

__all__ = ["SparseBNNClassifier", "SparseBNNPoissonRegressor", "SparseBNNRegressor"]

STEPS = 2000
"""Steps of training after which more passes over a table bring little."""
# Predictions come first here: with the KL at full weight from the first step, as where only
# probabilities are asked for, few units ever open (energy: RMSE 2.8 against 1.3 on validation
# rows). It has full weight for the last fifth, and the chain over supports then says anew which
# inputs are in, see :mod:`pyro_sparse.infer.supports`.
TRAINING = {"lr": 1e-2, "kl_hold": 0.4, "kl_rise": 0.4}
NOISE_RATE = 0.01
"""Of the noise precision's prior, see `Settings`: errors of a hundredth of the targets' standard
deviation are believed from some hundred rows on."""


class _TimeIsUpError(Exception):
    """Ends training from within."""


class _SparseBNN(BaseEstimator):
    """What the estimators share.

    Args:
        model: a name of the zoo, see ``pyro-sparse zoo``.
        net: a network by the names of the command line, ``"mlp:50"``; by the number of inputs when
            None.
        epochs: passes over the data; by their number when None.
        prune_inputs: whether inputs are selected, too: ``inclusion_`` then has their probabilities.
        num_samples: draws of the posterior in each prediction.
        max_seconds: of training. The schedules of learning rates and of the KL then go by whichever
            of time and epochs is further on, so that training comes to rest in time.
        options: anything else that a run takes, by name: attributes of
            :class:`~pyro_sparse.runs.settings.Settings`, options of the model and of its guide.
        random_state: of initial weights, batches and draws; None takes a seed from NumPy's global
            state, as everywhere in scikit-learn.
    """

    posterior_: Posterior
    preprocessing_: dict[str, Any]
    feature_names_in_: Any
    n_features_in_: int

    def __init__(
        self,
        model: str = "ss-ig",
        *,
        net: str | None = None,
        epochs: int | None = None,
        prune_inputs: bool = True,
        num_samples: int = 100,
        max_seconds: float | None = None,
        options: Mapping[str, Any] | None = None,
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.net = net
        self.epochs = epochs
        self.prune_inputs = prune_inputs
        self.num_samples = num_samples
        self.max_seconds = max_seconds
        self.options = options
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    # -- what a kind of targets writes -------------------------------------------------------------

    def _targets(self, y: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        """Targets as the likelihood takes them, and ``["target"]`` of the preprocessing."""
        raise NotImplementedError

    def _likelihood(self, y: np.ndarray) -> likelihoods.Likelihood | None:
        """Of the targets; the run's own when None."""
        return None

    # -- training ----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> Any:
        """Fit to rows and their targets.

        Args:
            X: an array of numbers, or a frame of pandas or polars: its text and categories become
                indicators, its dates numbers; missing values are filled and marked.
                Shape: (N, columns).
            y: targets.
                Shape: (N,).

        Returns:
            The estimator.

        Raises:
            ValueError: an option, the rows or the targets are wrong.
        """
        whole(num_samples=self.num_samples)
        if self.max_seconds is not None:
            positive(max_seconds=self.max_seconds)
        rows = self._rows(X, reset=True)
        numbers = not isinstance(self, ClassifierMixin)
        # The rows themselves are checked, and need not be numbers.
        _, y = check_X_y(
            np.zeros((len(rows.frame), 1)),
            y,
            y_numeric=numbers,
            ensure_min_samples=2,
            estimator=self,
        )
        targets, about = self._targets(y)
        preprocessing = {**tables.learn(rows), "target": about}
        x, _ = tables.new_rows(rows, preprocessing)
        plan = preprocessing["columns"]
        nothing = data.Split(x[:0], targets[:0])
        dataset = data.Dataset(
            name="rows",
            task="regression" if numbers else "classification",
            train=data.Split(x, targets),
            validation=nothing,
            test=nothing,
            classes=None if numbers else len(about["labels"]),
            feature_names=tuple(one["name"] for one in plan),
            variables=tuple(one["variable"] for one in plan),
            preprocessing=preprocessing,
        )
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._fit(dataset, self._likelihood(y))
        self.preprocessing_ = preprocessing
        found = experiment.inputs_by_name([self.posterior_], dataset)
        self._inclusion = (
            None if found is None else {row["variable"]: row["probability"] for row in found}
        )
        return self

    def _fit(self, dataset: data.Dataset, likelihood: likelihoods.Likelihood | None) -> None:
        x, y = dataset.train.x, dataset.train.y
        given = {
            "noise_rate": NOISE_RATE,
            "kl_start": infer.schedules.cheap(len(x)),
            **TRAINING,
            "net": self.net,
            "epochs": self.epochs,
            "prune_inputs": self.prune_inputs or None,
            "seed": self._seed,
            **(self.options or {}),
        }
        settings = settings_for(self.model, dataset, strict=True, **given)
        batch_size = min(settings.batch_size, len(x))
        epochs = settings.epochs
        if given["epochs"] is None:
            epochs = min(epochs, math.ceil(STEPS / math.ceil(len(x) / batch_size)))
        model, guide = experiment.build(settings, dataset, likelihood=likelihood)
        loader = data.Batches(x, y, batch_size, seed=self._seed)
        how = experiment.fit_options(settings, epochs, len(x), progress=False)
        if self.max_seconds is None:
            infer.fit(model, guide, loader, **how)
        else:
            clock = _Clock(self.max_seconds)
            for name in ("schedule", "inclusion_schedule", "kl_weight"):
                how[name] = clock.ahead(how[name])
            try:
                infer.fit(model, guide, loader, on_epoch=clock, **how)
            except _TimeIsUpError:
                keep_supports(model, guide, loader, self._seed)
        self.posterior_ = Posterior(model, guide, x)

    def _rows(self, X: Any, *, reset: bool) -> tables.Raw:
        """The rows under the names of training: scikit-learn's checks, then a table."""
        import pandas as pd

        framed = hasattr(X, "columns")
        if framed:
            validate_data(self, X, reset=reset, skip_check_array=True)
            frame = X if isinstance(X, pd.DataFrame) else pd.DataFrame(X.to_dict(as_series=False))
        else:
            checked = {"dtype": np.float64, "ensure_all_finite": "allow-nan"}
            frame = pd.DataFrame(validate_data(self, X, reset=reset, **checked))
        names = self._names()
        twice = [name for name in set(names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"expected columns of different names, got {twice[0]!r} twice")
        return tables.from_frame(frame.set_axis(names, axis=1), "X", fewest=1)

    def _names(self) -> list[str]:
        unnamed = [f"x{i}" for i in range(self.n_features_in_)]
        return list(getattr(self, "feature_names_in_", unnamed))

    # -- what was learnt ---------------------------------------------------------------------------

    @property
    def inclusion_(self) -> pd.Series:
        """Posterior inclusion probability of every column of X, by its name.

        A column that is constant is 0; one that became several inputs is in where any of them is.
        """
        check_is_fitted(self)
        if self._inclusion is None:
            raise AttributeError(
                f"inclusion_ needs a model that selects inputs; {self.model} with "
                f"prune_inputs={self.prune_inputs} has none"
            )
        import pandas as pd

        names = self._names()
        values = [self._inclusion.get(name, 0.0) for name in names]
        return pd.Series(values, index=names, name="inclusion")

    @property
    def feature_importances_(self) -> np.ndarray:
        """`inclusion_` as an array, for scikit-learn's ``SelectFromModel(..., threshold=0.5)``."""
        return self.inclusion_.to_numpy()

    @property
    def compact_(self) -> nn.Module:
        """The plain torch network of the units that are kept; its inputs are standardised.

        ``ps.export.save(estimator.compact_, folder, preprocessing=estimator.preprocessing_)``
        ships it with what is done to raw rows.
        """
        check_is_fitted(self)
        size = len(self.preprocessing_["columns"])
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(64, size, generator=generator)
        return experiment.pruned_network(self.posterior_, self.posterior_.keep(), probe)

    def _draws(self, X: Any) -> tuple[Tensor, Tensor]:
        """Natural outputs ``(draws, N, ...)`` and variances of the noise, ``(draws,)``."""
        check_is_fitted(self)
        x, _ = tables.new_rows(self._rows(X, reset=False), self.preprocessing_)
        # In double precision a row's prediction is the same in whatever batch it comes.
        exact = copy.deepcopy(self.posterior_)
        likelihood = exact.model.double().likelihood
        exact.guide.double()
        natural, noise = [], []
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(self._seed)
            for output, latents in exact.draws(x.double(), self.num_samples):
                natural.append(likelihood.natural(output))
                precision = latents.get("noise_precision", output.new_tensor(math.inf))
                noise.append(precision.reciprocal())
        return torch.stack(natural), torch.stack(noise)


class _Clock:
    """Progress by time, beside that by epochs; as ``on_epoch`` it ends training when time is up."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def _spent(self) -> float:
        return (time.monotonic() - self.start) / self.seconds

    def ahead(self, schedule: infer.schedules.Schedule) -> infer.schedules.Schedule:
        return lambda progress: schedule(min(1.0, max(progress, self._spent())))

    def __call__(self, metrics: dict[str, Any]) -> None:
        if self._spent() >= 1:
            raise _TimeIsUpError


class SparseBNNClassifier(ClassifierMixin, _SparseBNN):
    """Classification by a structurally sparse Bayesian network.

    Further parameters and attributes: see `SparseBNNRegressor`.

    Attributes:
        classes_: labels, in the order of ``predict_proba``'s columns.
    """

    classes_: np.ndarray

    def _targets(self, y: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"expected at least two classes in y, got one class, {self.classes_[0]}; "
                "there is nothing to tell apart"
            )
        return torch.as_tensor(index), {"labels": self.classes_.tolist()}

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, averaged over draws: ``(N, classes)``.

        Args:
            X: rows, with the columns of training.
                Shape: (N, columns).
        """
        natural, _ = self._draws(X)
        return natural.mean(0).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, ``(N,)``; argument as of `predict_proba`."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]


class SparseBNNRegressor(RegressorMixin, _SparseBNN):
    """Regression by a structurally sparse Bayesian network."""

    def _targets(self, y: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        y = y.astype(np.float64)
        mean, std = float(y.mean()), float(y.std())
        std = std if y.min() < y.max() else 1.0  # of a constant it is a rounding error
        return torch.as_tensor((y - mean) / std).float(), {"mean": mean, "std": std}

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Mean of the prediction, ``(N,)``, and its standard deviation on request.

        Args:
            X: rows, with the columns of training.
                Shape: (N, columns).
            return_std: also return the standard deviation of a new target: that of the mean over
                draws of the posterior and that of the noise.
        """
        natural, noise = self._draws(X)
        mean, std = self.preprocessing_["target"]["mean"], self.preprocessing_["target"]["std"]
        prediction = (natural.mean(0) * std + mean).numpy()
        if not return_std:
            return prediction
        spread = (natural.var(0, correction=0) + noise.mean()).sqrt() * std
        return prediction, spread.numpy()


class SparseBNNPoissonRegressor(RegressorMixin, _SparseBNN):
    """Regression of counts: Poisson with the exponential of a network as its rate.

    Targets that are not negative but no whole numbers are taken as scikit-learn's
    ``PoissonRegressor`` takes them, see :class:`pyro_sparse.likelihoods.Poisson`.
    Further parameters and attributes: see `SparseBNNRegressor`.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        # Of targets that scatter less than counts do, as those of scikit-learn's check, little is
        # believed.
        tags.regressor_tags.poor_score = True
        return tags

    def _targets(self, y: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
        if y.min() < 0:
            raise ValueError(f"expected counts in y, 0 or more, got {y.min():g}")
        return torch.as_tensor(y.astype(np.float64)).float(), {"mean": 0.0, "std": 1.0}

    def _likelihood(self, y: np.ndarray) -> likelihoods.Likelihood:
        return likelihoods.Poisson(scale=float(y.mean()) or 1.0, fractions=True)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Mean count, ``(N,)``, and on request the standard deviation of a new one.

        Args:
            X: rows, with the columns of training.
                Shape: (N, columns).
            return_std: also return √(E λ + Var λ), over draws of the rate λ.
        """
        rates, _ = self._draws(X)
        prediction = rates.mean(0)
        if not return_std:
            return prediction.numpy()
        return prediction.numpy(), (prediction + rates.var(0, correction=0)).sqrt().numpy()
