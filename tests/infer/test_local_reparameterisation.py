"""Outputs sampled for weights: the same expectations, less variance, weights wherever in doubt."""

import copy
import math

import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_sparse import guides, models, nets
from pyro_sparse.infer import ELBO, LocalReparameterisation
from pyro_sparse.infer.local_reparameterisation import (
    FullScale,
    RandomRows,
    TiedScale,
    _noise_like,
)
from pyro_sparse.modules import own_parameters

UNITS, LENGTH, EXAMPLES = 4, 6, 5


@pytest.fixture(params=["tied", "rank", "full", "log", "point"])
def rows(request) -> RandomRows:
    return make_rows(request.param, torch.float64, requires_grad=False)[0]


def make_rows(
    kind: str, dtype: torch.dtype, requires_grad: bool = True
) -> tuple[RandomRows, list[Tensor]]:
    """Rows, and their parameters."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(requires_grad)

    loc = leaf(UNITS, LENGTH)
    parameters = {
        "tied": [leaf(UNITS), leaf(LENGTH)],
        "rank": [leaf(UNITS, 2), leaf(2, LENGTH)],
        "full": [leaf(UNITS, LENGTH)],
        "log": [leaf(UNITS, LENGTH)],
        "point": [],
    }[kind]
    scale: FullScale | TiedScale | None = None
    if kind == "full":
        scale = FullScale(parameters[0].exp())
    elif kind == "log":
        scale = FullScale(parameters[0], logarithmic=True)
    elif parameters:
        scale = TiedScale(*parameters)
    return RandomRows.make(loc, scale, None, EXAMPLES), [loc, *parameters]


def moments(rows: RandomRows) -> tuple[Tensor, Tensor]:
    """Mean and variance as ordinary tensors."""
    variance = torch.zeros(rows.shape).double()
    if isinstance(rows.law.scale, TiedScale):
        factors, lengths = (2 * rows.law.scale.rows).exp(), (2 * rows.law.scale.lengths).exp()
        if factors.dim() == 1:
            factors, lengths = factors.unsqueeze(1), lengths.unsqueeze(0)
        variance = (factors @ lengths)[:, slice(*rows.columns)].reshape(rows.shape)
    elif rows.law.scale is not None:
        variance = rows.law.scale.columns(slice(*rows.columns)).square().reshape(rows.shape)
    factor = torch.ones(UNITS).double() if rows.law.multiplier is None else rows.law.multiplier
    factor = factor.reshape(-1, *[1] * (rows.dim() - 1))
    return rows.loc * factor, variance * factor.square()


def assert_same(rows: RandomRows, mean: Tensor, variance: Tensor) -> None:
    assert type(rows) is RandomRows
    assert rows.shape == mean.shape
    torch.testing.assert_close(moments(rows), (mean, variance))


class TestOperations:
    @pytest.mark.parametrize(
        "index", [slice(0, 4), slice(2, None), slice(5, 6), slice(-2, None), 5, -1], ids=str
    )
    def test_columns(self, rows, index):
        mean, variance = moments(rows)
        assert_same(rows[:, index], mean[:, index], variance[:, index])

    def test_columns_of_columns(self, rows):
        mean, variance = moments(rows)
        inner, last = rows[:, 1:].split_with_sizes([3, 2], 1)
        assert_same(inner[:, 1:], mean[:, 2:4], variance[:, 2:4])
        assert_same(last[:, -1], mean[:, 5], variance[:, 5])
        assert_same(inner.reshape(UNITS, 3, 1), mean[:, 1:4, None], variance[:, 1:4, None])

    @pytest.mark.parametrize(
        "index",
        [
            0,
            slice(1, 3),
            (slice(1, 3), 0),
            (0, 0),
            (slice(None), [0, 3]),
            (slice(None), slice(0, 5, 2)),
        ],
        ids=str,
    )
    def test_other_slices_are_of_one_draw(self, rows, index):
        torch.testing.assert_close(rows[index], rows.draw()[index])
        assert type(rows[index]) is Tensor

    @pytest.mark.parametrize("shape", [(UNITS, 3, 2), (UNITS, -1), (UNITS, 1, 2, 3)], ids=str)
    def test_reshape_behind_the_units(self, rows, shape):
        mean, variance = moments(rows)
        assert_same(rows.reshape(shape), mean.reshape(shape), variance.reshape(shape))
        assert_same(rows.reshape(*shape), mean.reshape(shape), variance.reshape(shape))

    def test_reshape_of_one_column(self, rows):
        mean, variance = (part[:, 5] for part in moments(rows))
        assert_same(rows[:, 5:].reshape(UNITS), mean, variance)

    @pytest.mark.parametrize("shape", [(-1, LENGTH), (-1,), (2, 2 * LENGTH)], ids=str)
    def test_other_reshapes_are_of_one_draw(self, rows, shape):
        torch.testing.assert_close(rows.reshape(shape), rows.draw().reshape(shape))

    def test_one_factor_a_row(self, rows):
        first, second = torch.rand(UNITS, 1).double(), torch.rand(UNITS, 1).double()
        mean, variance = moments(rows)
        for product in (rows * first, first * rows, torch.mul(rows, first), rows.mul(first)):
            assert_same(product, mean * first, variance * first.square())
        both = first * second
        assert_same(rows * first * second, mean * both, variance * both.square())

    def test_one_factor_a_weight(self, rows):
        factor = torch.rand(UNITS, LENGTH).double()
        product, (mean, variance) = rows * factor, moments(rows)
        if isinstance(rows.law.scale, TiedScale):  # no longer one
            torch.testing.assert_close(product, rows.draw() * factor)
        else:
            assert_same(product, mean * factor, variance * factor.square())

    def test_other_products_are_of_one_draw(self, rows):
        for factor in (2.0, torch.rand(LENGTH).double(), torch.rand(2, UNITS, LENGTH).double()):
            torch.testing.assert_close(rows * factor, rows.draw() * factor)
        torch.testing.assert_close(rows * rows, rows.draw().square())
        one = torch.rand(UNITS, 1).double()
        torch.testing.assert_close(torch.mul(rows, other=one), rows.draw() * one)

    def test_everything_else_is_of_one_draw(self, rows):
        draw = rows.draw()
        assert rows.draw() is draw
        torch.testing.assert_close(rows + 1, draw + 1)
        torch.testing.assert_close(rows @ draw.T, draw @ draw.T)
        torch.testing.assert_close(torch.cat([rows, rows]), torch.cat([draw, draw]))
        torch.testing.assert_close(rows.square().sum(), draw.square().sum())
        # Also what could have stayed random, had it come first.
        torch.testing.assert_close(rows[:, 1:3], draw[:, 1:3])
        x = torch.randn(EXAMPLES, LENGTH).double()
        torch.testing.assert_close(F.linear(x, rows), F.linear(x, draw))

    def test_metadata_does_not_draw(self, rows):
        assert rows.shape == (UNITS, LENGTH)
        assert rows.size(1) == LENGTH
        assert (rows.dim(), rows.ndim, rows.numel(), len(rows)) == (2, 2, UNITS * LENGTH, UNITS)
        assert rows.dtype == torch.float64
        assert rows.device.type == "cpu"
        assert rows._draw is None

    def test_draws_have_the_moments(self, rows):
        mean, variance = moments(rows)
        one = torch.ones(UNITS).double()
        draws = torch.stack([rows.times(one).draw().detach() for _ in range(2000)])
        standard_error = (variance / len(draws)).sqrt()
        assert ((draws.mean(0) - mean).abs() <= 5 * standard_error + 1e-12).all()
        error = 5 * math.sqrt(2 / len(draws)) * variance
        assert ((draws.var(0) - variance).abs() <= error + 1e-12).all()

    def test_repr_and_deepcopy(self, rows):
        assert "tensor(" in repr(rows)
        torch.testing.assert_close(copy.deepcopy(rows), rows.draw())


class TestLinear:
    @pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES + 1])
    @pytest.mark.parametrize("multiplied", [False, True])
    @pytest.mark.parametrize("bias", ["random", "fixed", "none"])
    def test_samples_outputs(self, rows, bias, multiplied, examples):
        rows.law.examples = examples
        factor = torch.rand(UNITS, 1).double() if multiplied else torch.ones(UNITS, 1).double()
        given = rows * factor if multiplied else rows
        weight, random_bias = given[:, :-1], given[:, -1]
        fixed = torch.randn(UNITS).double()
        x = torch.randn(examples, LENGTH - 1).double()
        passed = {"random": random_bias, "fixed": fixed, "none": None}[bias]
        torch.manual_seed(0)
        output = F.linear(x, weight, bias=passed)
        torch.manual_seed(0)
        noise = torch.randn_like(output[: (examples + 1) // 2])
        noise = torch.cat([noise, -noise])[:examples]
        loc, variance = moments(rows)
        mean, spread = x @ loc[:, :-1].T, x.square() @ variance[:, :-1].T
        if bias == "random":
            mean, spread = mean + loc[:, -1], spread + variance[:, -1]
        expected = (mean + spread.sqrt() * noise) * factor.squeeze(-1)
        torch.testing.assert_close(output, expected + (fixed if bias == "fixed" else 0))
        assert type(output) is Tensor

    @pytest.mark.parametrize("shape", [(LENGTH,), (EXAMPLES, 3, LENGTH), (3 * EXAMPLES, LENGTH)])
    def test_shared_weights_are_drawn(self, rows, shape):
        """Positions of one example see one draw, also when a reshape hides them."""
        x = torch.randn(shape).double()
        torch.testing.assert_close(F.linear(x, rows), F.linear(x, rows.draw()))

    def test_rows_as_input(self, rows):
        weight = torch.randn(3, LENGTH).double()
        torch.testing.assert_close(F.linear(rows, weight), F.linear(rows.draw(), weight))

    def test_weight_and_bias_of_different_gates(self, rows):
        one, other = rows * torch.rand(UNITS, 1).double(), rows * torch.rand(UNITS, 1).double()
        weight, bias = one[:, :-1], other[:, -1]
        x = torch.randn(EXAMPLES, LENGTH - 1).double()
        torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x, weight._draw, bias._draw))

    def test_convolution_is_given_a_draw(self, rows):
        weight = rows[:, :4].reshape(UNITS, 1, 2, 2)
        image = torch.randn(EXAMPLES, 1, 5, 5).double()
        torch.testing.assert_close(F.conv2d(image, weight), F.conv2d(image, weight.draw()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["tied", "rank", "full", "log", "point"])
    def test_gradients_are_finite_where_all_inputs_are_zero(self, kind, dtype):
        rows, leaves = make_rows(kind, dtype)
        x = torch.zeros(EXAMPLES, LENGTH, dtype=dtype, requires_grad=True)
        output = F.linear(x, rows)
        assert output.abs().max() < 1e-15
        for gradient in torch.autograd.grad(output.square().sum() + output.sum(), [x, *leaves]):
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("gate", ["none", "batch", "example"])
    @pytest.mark.parametrize("bias", ["random", "none", "elsewhere"])
    @pytest.mark.parametrize("kind", ["tied", "rank", "full", "log", "point"])
    @pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES + 1])
    def test_gradients_are_those_of_the_formula(self, examples, kind, bias, gate):
        """Also against autograd through the composition that mixed precision uses."""
        torch.manual_seed(0)
        rows, leaves = make_rows(kind, torch.float64)
        width = LENGTH if bias == "none" else LENGTH - 1
        x = torch.randn(examples, width).double().requires_grad_()
        leaves = [x, *leaves]
        multiplier = None
        if gate != "none":
            shape = (UNITS,) if gate == "batch" else (examples, UNITS)
            multiplier = torch.randn(shape).double().requires_grad_()
            leaves.append(multiplier)

        def output(*_: Tensor) -> Tensor:
            torch.manual_seed(1)
            scale = FullScale(leaves[2].exp()) if kind == "full" else rows.law.scale
            fresh = RandomRows.make(rows.law.loc, scale, multiplier, examples)
            if bias == "elsewhere":  # rows of a layer that lie behind another's
                return F.linear(x, fresh[:, 1:], fresh[:, 0])
            return F.linear(x, fresh[:, :width], fresh[:, width] if bias == "random" else None)

        assert torch.autograd.gradcheck(output, leaves)
        fused = torch.autograd.grad(output().square().sum(), leaves)
        with torch.autocast("cpu", torch.bfloat16):
            composed = torch.autograd.grad(output().square().sum(), leaves)
        for one, other in zip(fused, composed, strict=True):
            assert (one - other).norm() < 0.05 * one.norm()


@pytest.mark.parametrize(("examples", "units"), [(1, 1), (2, 7), (5, 4), (128, 100), (131, 99)])
def test_noise_is_standard_normal_for_every_example(examples, units):
    """Of many numbers an eighth are drawn; two examples at a unit have independent or opposite."""
    torch.manual_seed(0)
    like = torch.empty(examples, units).double()
    draws = torch.stack([_noise_like(like) for _ in range(300)])
    assert draws.shape == (300, examples, units)
    assert abs(float(draws.mean())) < 4 / math.sqrt(300 * units)
    assert float(draws.var(0).mean()) == pytest.approx(1, abs=5 / math.sqrt(300 * units))
    one = draws[:, :, units // 2]
    # As a law of numbers, too: the fourth moment of a normal one is 3.
    assert float(one.square().square().mean()) == pytest.approx(3, abs=0.3 if units > 90 else 1.2)
    if examples > 1:
        correlations = torch.corrcoef(one.T)
        others = correlations[~torch.eye(examples, dtype=torch.bool)]
        opposite = others < -0.999
        assert int(opposite.sum()) == 2 * (examples // 2)
        # The largest of some thousand correlations of 300 independent pairs is 0.25 or so.
        assert all(others[~opposite].abs() < 0.35)


def sampled(model, guide, x, y, *, local: bool, count: int) -> tuple[Tensor, Tensor]:
    """Draws of the loss, and of its gradient."""
    losses, gradients = [], []
    elbo = ELBO(local_reparameterisation=local)
    parameters = list(guide.parameters())
    with own_parameters(model, guide):
        for _ in range(count):
            loss = elbo.differentiable_loss(model, guide, x, y)
            gradient = torch.autograd.grad(loss, parameters)
            losses.append(loss.detach())
            gradients.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(losses), torch.stack(gradients)


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same mean, to five standard errors of the difference."""
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    return bool(((one.mean(0) - other.mean(0)).abs() <= 5 * error + 1e-9).all())


class Twice(nn.Module):
    """One layer applied two times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.again(torch.tanh(self.again(self.first(x))))))


class Positions(nn.Module):
    """One layer on all positions of a sequence, folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.out = nn.Linear(1, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.each(x.reshape(-1, 1))).reshape(-1, 6))


class TestExpectations:
    @pytest.mark.parametrize(
        ("name", "variance"), [("ss-ig", "tied"), ("ss-ig", "full"), ("ss-ghs", "tied")]
    )
    def test_the_same_with_less_variance(self, classifier, name, variance, record_property):
        model, guide, x, y = classifier(name, variance=variance, initial_inclusion=0.95)
        loss, gradient = sampled(model, guide, x, y, local=True, count=150)
        weight_loss, weight_gradient = sampled(model, guide, x, y, local=False, count=150)
        assert agree(loss, weight_loss)
        assert agree(gradient, weight_gradient)
        ratio = float(gradient.var(0).sum() / weight_gradient.var(0).sum())
        record_property("gradient variance, local over weights", ratio)
        assert ratio < 1

    @pytest.mark.parametrize("net", [Twice(), Positions()], ids=lambda net: type(net).__name__)
    def test_unbiased_where_a_layer_is_shared(self, net):
        torch.manual_seed(0)
        x = torch.randn(4, 3)
        y = torch.tensor([0, 1, 0, 1])
        model = models.SpikeSlabGaussian(net, x[:1], num_data=4)
        guide = guides.for_model(model, initial_scale=1.0)
        losses = [sampled(model, guide, x, y, local=flag, count=200)[0] for flag in (True, False)]
        assert agree(*losses)

    def test_sites_it_takes_over(self, classifier):
        x = torch.randn(4, 3)

        def values(net: nn.Module, **options) -> dict[str, bool]:
            model = models.SpikeSlabGaussian(net, x[:1], num_data=4)
            guide = guides.for_model(model, **options)
            with LocalReparameterisation(len(x)):
                trace = poutine.trace(guide).get_trace(x)
            return {
                name: isinstance(site["value"], RandomRows)
                for name, site in trace.nodes.items()
                if site["type"] == "sample"
            }

        net = nets.mlp([3, 4, 2])
        assert values(net) == {"fc1.rows": True, "out.rows": True}
        assert values(net, variance="full") == {"fc1.rows": True, "out.rows": True}
        # The score needs the joint draw; a layer that is applied twice one and the same.
        assert values(net, inclusion="score") == {"fc1.rows": False, "out.rows": True}
        assert values(Twice()) == {"first.rows": False, "out.rows": True}

    def test_networks_without_bias(self):
        torch.manual_seed(0)
        x, y = torch.randn(6, 3), torch.randint(2, (6,))
        model = models.SpikeSlabGroupLasso(nets.mlp([3, 4, 2], bias=False), x[:1], num_data=6)
        guide = guides.for_model(model)
        ELBO()(model, guide)(x, y).backward()
        assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())

    def test_convolutions(self):
        """A convolution is given a draw, the linear layer behind it is sampled; gradients flow."""
        torch.manual_seed(0)
        x, y = torch.randn(4, 1, 6, 6), torch.randint(2, (4,))
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
        )
        model = models.SpikeSlabGroupHorseshoe(net, x[:1], num_data=4)
        guide = guides.for_model(model, initial_scale=0.3)
        losses = [sampled(model, guide, x, y, local=flag, count=60) for flag in (True, False)]
        assert agree(losses[0][0], losses[1][0])
        assert agree(losses[0][1], losses[1][1])
