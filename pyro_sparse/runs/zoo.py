"""The zoo: every model by its command-line name, with what one needs to choose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from pyro_sparse.names import nearest

__all__ = ["ZOO", "Entry", "find"]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: as the command line has it.
        model: name of the model's class in `pyro_sparse.models`, or ``package.module:Class``. A
            name, so that listing the zoo does not import torch.
        title: its full name.
        paper: where it comes from.
        prior: in a line.
        guide: in a line.
        rule: which units are kept.
        use: "use it when ..." in a line.
        settings: what differs from the defaults of a run, options of model and guide among them.
        bayesian: whether it is more than a baseline to compare with.
    """

    name: str
    model: str
    title: str
    paper: str
    prior: str
    guide: str
    rule: str
    use: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bayesian: bool = True
    model_options: InitVar[Sequence[str]] = ()
    guide_options: InitVar[Sequence[str]] = ()

    def __post_init__(self, model_options: Sequence[str], guide_options: Sequence[str]) -> None:
        """Lists of options are taken and not read: what a constructor takes, it says itself."""


# The bound itself from the first step on.
PLAIN: dict[str, Any] = {"kl_start": 1.0, "kl_hold": 0.0, "kl_rise": 0.0}
_NOISE: dict[str, Any] = {
    **PLAIN,
    "lr": 1e-3,
    "scale_lr": 4e-2,
    "schedule": "cosine",
    "lr_hold": 0.3,
}


def _reference(name: str, title: str, paper: str, rule: str, use: str, retrain: float) -> Entry:
    """A pruner that is no Bayesian model: a dense network, pruned by a rule, and trained on."""
    return Entry(
        name=name,
        model="Deterministic",
        title=f"{title} (baseline, not Bayesian)",
        paper=paper,
        prior="flat, or N(0, σ²) as weight decay",
        guide="a point mass",
        rule=rule,
        use=use,
        settings={"passes": 1, "retrain": retrain},
        bayesian=False,
    )


ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="ss-ig",
            model="SpikeSlabGaussian",
            title="spike-and-slab, independent Gaussian (SS-IG)",
            paper="Jantre, Bhattacharya, Maiti, Neural Networks 167 (2023)",
            prior="z ~ Bernoulli(λ_l), w | z=1 ~ N(0, σ0² I)",
            guide="Bernoulli(γ) × Gaussian, tied or full variance",
            rule="inclusion probability > ½",
            use="you want the simplest spike-and-slab prior, and inclusion probabilities to read",
        ),
        Entry(
            name="ss-gl",
            model="SpikeSlabGroupLasso",
            title="spike-and-slab group lasso (SS-GL)",
            paper="Jantre, Bhattacharya, Maiti, IEEE TNNLS 36 (2025)",
            prior="as SS-IG with w | z=1 ~ N(0, σ0² τ² I), τ² ~ Gamma((m+1)/2, ς²/2)",
            guide="as SS-IG, log-normal τ² a unit and ς² a network",
            rule="inclusion probability > ½",
            use="units should differ in scale, and the network learns how strongly to shrink",
        ),
        Entry(
            name="ss-ghs",
            model="SpikeSlabGroupHorseshoe",
            title="spike-and-slab group horseshoe (SS-GHS)",
            paper="Jantre, Bhattacharya, Maiti, IEEE TNNLS 36 (2025)",
            prior="as SS-IG with w | z=1 ~ N(0, σ0² ρ̃² I), ρ = sτ, s and τ half-Cauchy",
            guide="as SS-IG, log-normal factors of s and of τ a unit",
            rule="inclusion probability > ½",
            use="you want the smallest network: heavy tails keep few units, shrink the others",
        ),
        Entry(
            name="sbp",
            model="LogNormalNoise",
            title="structured Bayesian pruning (SBP)",
            paper="Neklyudov, Molchanov, Ashukha, Vetrov, NeurIPS 2017",
            prior="a noise θ a unit, log θ ~ U[−20, 0]; weights flat",
            guide="truncated log-normal θ, point estimates of weights",
            rule="signal-to-noise ratio of θ > 1, and E θ > 0.001",
            use="training must cost no more than a dense network's, or units, channels and inputs "
            "of a trained network are to be thinned out",
            settings=_NOISE,
        ),
        Entry(
            name="bmrs",
            model="LogNormalNoise",
            title="Bayesian model reduction for structured pruning (BMRS)",
            paper="Wright, Igel, Selvan, NeurIPS 2024",
            prior="as SBP",
            guide="as SBP",
            rule="evidence of a prior on θ at 0 at least 1/ω of the full one's, prior odds ω = 20",
            use="you use SBP, and want the evidence rather than a threshold to decide",
            settings={**_NOISE, "rule": "bmrs-n"},
        ),
        Entry(
            name="bmr",
            model="ReducibleGaussian",
            title="Bayesian model reduction of weights (BMR)",
            paper="Beckers, van Erp, Zhao, Kondrashov, de Vries (2022), arXiv 2210.09134",
            prior="w ~ N(0, s0²) each, all layers",
            guide="mean-field Gaussian, or a joint one on the last layer",
            rule="weights with ΔF < 0, again until none goes; then units with weights in and out",
            use="the network is small, as for tables, and the evidence should choose its weights",
            settings={
                **PLAIN,
                "lr": 1e-2,
                "scale_lr": 1e-2,
                "lr_hold": 0.5,
                "variance": "full",
                "initial_scale": 0.1,
                "passes": 30,
            },
        ),
        Entry(
            name="bc-gnj",
            model="GroupNormalJeffreys",
            title="group normal-Jeffreys (BC-GNJ)",
            paper="Louizos, Ullrich, Welling, NeurIPS 2017",
            prior="p(z) ∝ 1/|z| a unit, w | z ~ N(0, z² I)",
            guide="Gaussian z a unit, Gaussian rows, full or tied variance",
            rule="log dropout rate log α < 0",
            use="you want a prior without anything to tune, and weights in few bits",
            settings={"variance": "tied"},
        ),
        Entry(
            name="bc-ghs",
            model="GroupHorseshoe",
            title="group horseshoe (BC-GHS)",
            paper="Louizos, Ullrich, Welling, NeurIPS 2017",
            prior="w ~ N(0, s² τ² I), s half-Cauchy a layer and τ a unit",
            guide="log-normal factors of s and τ, Gaussian rows, full or tied variance",
            rule="mean log scale within 2 of the layer's largest",
            use="you want continuous shrinkage without a spike, and weights in few bits",
            settings={"variance": "tied", "initial_scale": "balanced"},
        ),
        Entry(
            name="turbo-vbi",
            model="TurboMarkov",
            title="three-layer hierarchy with a Markov support (Turbo-VBI)",
            paper="Xia, Tsang, Lau, IEEE TSP 71 (2023)",
            prior="s a Markov chain of units, ρ | s ~ Gamma(a_s, b_s), w | ρ ~ N(0, 1/ρ)",
            guide="s a chain by sum-product, ρ | s gamma, both closed; Gaussian w by SVI",
            rule="inclusion probability > ½",
            use="neighbouring units, or blocks of weights, should be kept or dropped together",
            settings={"lr": 8e-3, "kl_start": 0.03, "kl_hold": 0.3, "kl_rise": 0.4},
        ),
        _reference(
            "magnitude",
            "pruning by magnitude",
            "folklore",
            "largest norms of rows, relative to their layer, within a budget of MACs",
            "you need to know what a Bayesian rule is worth",
            0.2,
        ),
        _reference(
            "random",
            "random pruning",
            "folklore",
            "random units within a budget of MACs",
            "you need to know what choosing units is worth at all",
            0.2,
        ),
        _reference(
            "shapley",
            "game-theoretic pruning by Shapley values",
            "the idea of Diaz-Ortiz et al. (GTAP, 2023); our own estimator",
            "largest mean marginal gains in likelihood over random orders, within a budget of MACs",
            "you need the strongest of the baselines, and can wait for it",
            0.2,
        ),
        Entry(
            name="dense",
            model="Deterministic",
            title="dense network, point estimates",
            paper="the baseline",
            prior="flat, or N(0, σ²) as weight decay",
            guide="a point mass",
            rule="all units",
            use="you need the number to compare with",
            bayesian=False,
        ),
    )
}


def find(name: str) -> Entry:
    """The entry called ``name``; ``ValueError`` with the nearest names where there is none."""
    if name not in ZOO:
        raise ValueError(nearest("model", name, ZOO))
    return ZOO[name]
