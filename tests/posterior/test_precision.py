"""The precision that a posterior suggests: formats by hand, the bound, and what rounding costs."""

import math

import pytest
import torch

import pyro_sparse as ps
from pyro_sparse import guides, models
from pyro_sparse.nets import lenet5_caffe, mlp
from pyro_sparse.posterior import Posterior, accuracy, suggested_bits
from pyro_sparse.posterior.precision import Bits, round_to, rounded_parameters


def posterior_of(loc, scale, cls=models.SpikeSlabGaussian, net=None, **options):
    """A posterior whose first layer has the given means and standard deviations."""
    net = mlp([2, 3, 2]) if net is None else net
    model = cls(net, torch.zeros(2, 2), num_data=9).double()
    guide = guides.for_model(model, variance="full", **options)
    family = guide.row_families["fc1"]
    with torch.no_grad():
        family.loc.copy_(torch.as_tensor(loc, dtype=torch.float64).expand_as(family.loc))
        scale = torch.as_tensor(scale, dtype=torch.float64)
        family.log_scale.copy_(scale.log().expand_as(family.loc))
    return Posterior(model, guide)


@pytest.mark.parametrize(
    ("loc", "scale", "expected"),
    [
        # 1.5 within 2^-5: an error of 2^(0-t-1) allows t = 4; one exponent and 0: 1 bit
        (1.5, 2**-5, Bits(exponent=1, mantissa=4, lowest=0, highest=0)),
        (1.5, 2**-5 * 0.99, Bits(exponent=1, mantissa=5, lowest=0, highest=0)),
        # 0.3 is in [2^-2, 2^-1)
        (-0.3, 2**-10, Bits(exponent=1, mantissa=7, lowest=-2, highest=-2)),
        # less than a standard deviation from 0
        (0.3, 0.31, Bits(exponent=0, mantissa=0)),
        # a power of 2 needs no mantissa if half of it is tolerated
        (0.5, 0.26, Bits(exponent=1, mantissa=0, lowest=-1, highest=-1)),
        # 0.99 rounds to 1 with 1 mantissa bit
        (0.99, 0.125, Bits(exponent=1, mantissa=1, lowest=0, highest=0)),
        # exponents -3 ... 2 and 0: 7 codes; the weights at 6 need 2 - 1 + 4 bits
        (
            [[6.0, 0.15, -1.0], [6.0, 0.15, -1.0], [6.0, 0.15, -1.0]],
            2**-4,
            Bits(exponent=3, mantissa=5, lowest=-3, highest=2),
        ),
        # the uncertain one is off the scale, and does not count
        (
            [[6.0, 1e-9, -1.0], [6.0, 1e-9, -1.0], [6.0, 1e-9, -1.0]],
            2**-4,
            Bits(exponent=2, mantissa=5, lowest=0, highest=2),
        ),
    ],
)
def test_known_variances(loc, scale, expected):
    bits = suggested_bits(posterior_of(loc, scale))["fc1"]
    assert bits == expected
    assert bits.total == 1 + expected.exponent + expected.mantissa


def test_only_what_the_compact_network_has_counts():
    posterior = posterior_of([[1.5, 1.5, 1.5], [1e4, 1.5, 1.5], [1.5, 1.5, 1.5]], 2**-5)
    keep = posterior.keep()
    assert suggested_bits(posterior, keep)["fc1"].mantissa > 10
    keep["fc1"] = torch.tensor([True, False, True])
    assert suggested_bits(posterior, keep)["fc1"].mantissa == 4
    # The column of the next layer that reads the unit is gone, too.
    family = posterior.guide.row_families["out"]
    with torch.no_grad():
        family.loc.fill_(1.5)
        family.loc[:, 1] = 1e4
        family.log_scale.fill_(-5 * math.log(2))
    assert suggested_bits(posterior, keep)["out"].mantissa == 4
    keep["fc1"] = torch.tensor([True, True, False])
    assert suggested_bits(posterior, keep)["out"].mantissa > 10


@pytest.mark.parametrize(
    "cls",
    [
        models.SpikeSlabGaussian,
        models.SpikeSlabGroupLasso,
        models.SpikeSlabGroupHorseshoe,
        models.GroupNormalJeffreys,
        models.GroupHorseshoe,
        models.ReducibleGaussian,
    ],
)
def test_rounding_stays_below_the_standard_deviation(cls):
    model = cls(mlp([6, 30, 20, 3]), torch.zeros(2, 6), num_data=9)
    guide = guides.for_model(model)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "scale" in name.rpartition(".")[2] and "global" not in name and "local" not in name:
                parameter.add_(torch.randn_like(parameter))
    posterior = Posterior(model, guide)
    formats, variances = suggested_bits(posterior), posterior.row_variances()
    keep = posterior.keep()
    rounded, exact = rounded_parameters(posterior), posterior.masked_parameters()
    used = 0
    for name, bits in formats.items():
        inside = keep[name].unsqueeze(1).to(variances[name].device)
        before = posterior.model.graph.rows(exact, name)
        error = (posterior.model.graph.rows(rounded, name) - before).abs()
        deviation = variances[name].sqrt()
        assert (error <= deviation * (1 + 1e-6))[inside.expand_as(error)].all()
        used += bits.total
        # One bit less would not do, but where none are left.
        if bits.mantissa:
            fewer = Bits(bits.exponent, bits.mantissa - 1, bits.lowest, bits.highest)
            error = (round_to(before, fewer) - before).abs()
            needed = (before.abs() > deviation) & inside
            bound = torch.ldexp(
                torch.ones_like(before), torch.frexp(before).exponent - 1 - bits.mantissa
            )
            assert (bound > deviation)[needed].any()
    assert 0 < used < 32 * len(formats)


def test_variances_are_marginal_over_scales():
    """A unit's own scale is uncertain, too: more variance, fewer bits."""
    options = {"cls": models.GroupNormalJeffreys}
    sharp = posterior_of(1.5, 2**-8, initial_unit_scale=1e-6, **options)
    blurred = posterior_of(1.5, 2**-8, initial_unit_scale=0.1, **options)
    keep = sharp.keep()
    assert suggested_bits(sharp, keep)["fc1"].mantissa == 7
    # 0.15² + σ² (1 + 0.1²): 2^-3 is below, 2^-2 above
    expected = math.ceil(-1 - 0.5 * math.log2(0.15**2 + 1.01 * 2**-16))
    assert suggested_bits(blurred, keep)["fc1"].mantissa == expected == 2


def test_round_to():
    bits = Bits(exponent=2, mantissa=2, lowest=-1, highest=1)
    values = torch.tensor([0.0, 0.2, 0.3, 0.5, 0.56, 0.6, -1.3, 1.9, 3.3, 9.0, -9.0])
    expected = [0.0, 0.0, 0.5, 0.5, 0.5, 0.625, -1.25, 2.0, 3.5, 3.5, -3.5]
    assert round_to(values, bits).tolist() == expected
    assert round_to(values, Bits(exponent=0, mantissa=0)).tolist() == [0.0] * 11
    assert round_to(values.half(), bits).dtype == torch.float16
    numbers = torch.randn(1000)
    fine = Bits(exponent=8, mantissa=23, lowest=-126, highest=127)
    assert torch.equal(round_to(numbers, fine), numbers)


def test_models_with_point_estimates_offer_none():
    for cls in (models.Deterministic, models.LogNormalNoise):
        model = cls(mlp([2, 3, 2]), torch.zeros(2, 2), num_data=9)
        posterior = Posterior(model, guides.for_model(model))
        assert posterior.row_variances() == {}
        with pytest.raises(ps.posterior.importance.NotOfferedError, match="Gaussian weights"):
            suggested_bits(posterior)


@pytest.mark.parametrize("cls", [models.GroupNormalJeffreys, models.GroupHorseshoe])
def test_a_network_in_few_bits_is_as_good(cls):
    """Trained on digits, the compact network keeps its accuracy at the suggested bits, not at 4."""
    data = ps.data.load("digits", None, validation=0.0, seed=0)
    x, y = data.train.x, data.train.y
    torch.manual_seed(0)
    model = cls(mlp([64, 30, 10]), x[:2], num_data=len(x))
    guide = guides.for_model(model)
    loader = ps.data.Batches(x, y, 64, seed=0)
    ps.fit(model, guide, loader, epochs=60, lr=1e-2, scale_lr=1e-2, progress=False)
    posterior = Posterior(model, guide)
    keep = {group.name: torch.ones(group.size, dtype=torch.bool) for group in model.graph}
    formats = suggested_bits(posterior, keep)

    def score(parameters):
        output = torch.func.functional_call(model.net, parameters, (data.test.x,))
        return accuracy(output, data.test.y)

    full = score(posterior.masked_parameters(keep))
    few = score(rounded_parameters(posterior, keep))
    assert full > 0.93
    assert abs(full - few) <= 0.01
    assert all(bits.total <= 12 for bits in formats.values())
    # ... and the bits are not for nothing.
    masked = posterior.masked_parameters(keep)
    poor = {}
    for name in formats:
        rows = model.graph.rows(masked, name)
        top = int(torch.frexp(rows.abs().max()).exponent) - 1
        poor[name] = round_to(rows, Bits(exponent=1, mantissa=0, lowest=top, highest=top))
    assert score({**masked, **model.graph.parameters(poor)}) < few - 0.02


def test_convolutions():
    model = models.GroupHorseshoe(
        lenet5_caffe(widths=(3, 4, 6)), torch.zeros(2, 1, 28, 28), num_data=9
    )
    posterior = Posterior(model, guides.for_model(model))
    keep = {
        "conv1": torch.tensor([True, False, True]),
        "conv2": torch.tensor([True, True, False, True]),
    }
    formats = suggested_bits(posterior, keep)
    assert set(formats) == {"conv1", "conv2", "fc1", "out"}
    rounded = rounded_parameters(posterior, keep)
    assert (rounded["conv1.weight"][1] == 0).all()
    assert rounded["conv2.weight"].shape == model.net.conv2.weight.shape
