"""Selection rules: what each keeps, on which posteriors, and how they are named."""

import math

import pytest
import torch

from pyro_sparse import guides, likelihoods, models
from pyro_sparse.nets import count_macs, lenet5_caffe, mlp
from pyro_sparse.posterior import Posterior, importance, selection
from pyro_sparse.posterior.importance import NotOfferedError, Random, Shapley, magnitude
from pyro_sparse.posterior.reduction import delta_evidence, delta_evidence_joint
from pyro_sparse.posterior.selection import (
    BMRS,
    Connected,
    ExpectedCost,
    FalseDiscovery,
    LogAlpha,
    LogScale,
    MACBudget,
    MedianProbability,
    ModelReduction,
    SignalToNoise,
    Threshold,
    TopK,
    default_rule,
    parse,
)


def posterior(cls, net=None, example=None, guide_options=None, **options):
    net = mlp([3, 5, 4, 2]) if net is None else net
    example = torch.randn(4, 3) if example is None else example
    model = cls(net, example, num_data=50, **options)
    return Posterior(model, guides.for_model(model, **(guide_options or {})))


def set_noise(of, name, loc, log_scale):
    noise = of.guide.noises[name]
    with torch.no_grad():
        noise.noise_loc.copy_(torch.as_tensor(loc))
        noise.noise_log_scale.copy_(torch.as_tensor(log_scale))


def counts(keep):
    return {name: int(mask.sum()) for name, mask in keep.items()}


# -- which rule works on which posterior -----------------------------------------------------------

KINDS = {
    "ss-ig": models.SpikeSlabGaussian,
    "ss-gl": models.SpikeSlabGroupLasso,
    "ss-ghs": models.SpikeSlabGroupHorseshoe,
    "sbp": models.LogNormalNoise,
    "bmr": models.ReducibleGaussian,
    "bc-gnj": models.GroupNormalJeffreys,
    "bc-ghs": models.GroupHorseshoe,
    "turbo-vbi": models.TurboMarkov,
    "dense": models.Deterministic,
}
SPIKES = {"ss-ig", "ss-gl", "ss-ghs", "turbo-vbi"}
X, Y = torch.zeros(6, 3), torch.zeros(6, dtype=torch.long)
RULES = {
    "median": (MedianProbability(), "inclusion", SPIKES),
    "snr": (SignalToNoise(), "noise", {"sbp"}),
    "bmrs-n": (BMRS(), "noise", {"sbp"}),
    "bmrs-u": (BMRS("u"), "noise", {"sbp"}),
    "log-alpha": (LogAlpha(), "log_alpha", {"bc-gnj"}),
    "log-scale": (LogScale(), "log_scales", {"bc-ghs"}),
    "reduction": (ModelReduction(), "gaussians", {"bmr"}),
    "reduction by rows": (ModelReduction("rows"), "gaussians", {"bmr"}),
    "reduction by columns": (ModelReduction("columns"), "gaussians", {"bmr"}),
    "budget": (MACBudget(30), "inclusion", SPIKES),
    "top": (TopK(importance.inclusion_probability, 2), "inclusion", SPIKES),
    "threshold": (Threshold(importance.noise_signal, 1.0), "noise", {"sbp"}),
    "top weights": (TopK(importance.weight_signal, 0.5), "gaussians", {"bmr"}),
    "connected": (Connected(), None, set(KINDS)),
    "magnitude": (MACBudget(30, magnitude), None, set(KINDS)),
    "random": (TopK(Random(), 0.5), None, set(KINDS)),
    "shapley": (TopK(Shapley(X, Y, orders=1), 1), None, set(KINDS)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_works_or_says_what_it_needs(rule, kind):
    rule, need, offering = RULES[rule]
    of = posterior(KINDS[kind])
    if kind in offering:
        keep = rule(of)
        assert keep
        for name, mask in keep.items():
            group = of.model.graph[name]
            assert mask.dtype == torch.bool
            whole = tuple(of.model.row_shape(group)) if group.writers else None
            assert tuple(mask.shape) in {(group.size,), whole}
        return
    with pytest.raises(NotOfferedError) as caught:
        rule(of)
    text = str(caught.value)
    assert importance.OFFERS[need] in text
    assert type(of.model).__name__ in text
    here = [name for name in importance.OFFERS if getattr(of, name)()]
    assert all(importance.OFFERS[name] in text for name in here)
    assert bool(here) != ("point estimates only" in text)


def test_default_rules():
    expected = {
        **dict.fromkeys(SPIKES, MedianProbability),
        "sbp": SignalToNoise,
        "bmr": Connected,
        "bc-gnj": LogAlpha,
        "bc-ghs": LogScale,
        "dense": Connected,
    }
    for kind, rule in expected.items():
        of = posterior(KINDS[kind])
        with torch.no_grad():
            for parameter in of.guide.parameters():
                parameter.add_(torch.randn_like(parameter))
        keep, own = of.keep(rule()), of.keep()
        assert all(torch.equal(mask, keep[name]) for name, mask in own.items())


def test_a_rule_of_ones_own_for_a_model():
    class Mine(models.SpikeSlabGaussian):
        pass

    @default_rule.register
    def _(model: Mine):
        return TopK(importance.magnitude, 2)

    assert int(posterior(Mine).keep()["fc1"].sum()) == 2


# -- noise -----------------------------------------------------------------------------------------


def test_a_constant_that_is_tiny_is_no_signal():
    """SNR 20 with E θ = 3e-7 goes, SNR 20 with E θ = 0.4 stays, a collapsed unit goes."""
    of = posterior(models.LogNormalNoise)
    set_noise(of, "fc1", [-15.0, -1.0, -5.0, -1.0, -7.5], [-3.0, -3.0, 18.0, 0.3, -3.0])
    law = of.noise()["fc1"]
    assert law.signal_to_noise[:2].tolist() == pytest.approx([20.06, 20.06], abs=0.1)
    assert float(law.mean[0]) == pytest.approx(3.06e-7, rel=1e-2)
    assert SignalToNoise()(of)["fc1"].tolist() == [False, True, False, True, False]
    # The ratio alone would keep it.
    assert SignalToNoise(mean=0.0)(of)["fc1"].tolist() == [True, True, False, True, True]
    assert SignalToNoise(threshold=10.0)(of)["fc1"].tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    "options", [{"threshold": -0.1}, {"mean": -1e-3}, {"threshold": math.nan}, {"mean": math.nan}]
)
def test_thresholds_of_the_noise(options):
    with pytest.raises(ValueError, match="thresholds of at least 0"):
        SignalToNoise(**options)


@pytest.mark.parametrize("kind", ["n", "u"])
def test_prior_odds_decide_about_collapsed_units(kind):
    """Where q = p, ΔF = 0 whatever the reduced prior: only odds above 1 remove these units."""
    of = posterior(models.LogNormalNoise)
    set_noise(of, "fc1", [-18.0, -10.0, 0.0, 0.0, -0.5], [18.0, 18.0, 18.0, -5.0, -2.0])
    useful = [False, False, False, True, True]
    for odds in (1.001, 20.0):
        assert BMRS(kind, prior_odds=odds)(of)["fc1"].tolist() == useful
    assert BMRS(kind, prior_odds=0.999)(of)["fc1"].tolist() == [True] * 5
    # A unit that is off by its posterior goes even against odds.
    set_noise(of, "fc1", -19.5, 0.0)
    if kind == "n":
        assert not BMRS(kind, prior_odds=0.9)(of)["fc1"].any()
    set_noise(of, "fc1", -14.0, -1.0)
    assert BMRS("u", prior_odds=0.9)(of)["fc1"].tolist() == [False] * 5


def test_uniform_windows_differ_by_their_bits():
    """A unit about 2⁻⁶ is off with 4 bits, on with 8."""
    of = posterior(models.LogNormalNoise)
    set_noise(of, "fc1", -6 * math.log(2), -2.0)
    assert not BMRS("u", 4)(of)["fc1"].any()
    assert BMRS("u", 8)(of)["fc1"].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "x"}, "kind 'n' or 'u'"),
        ({"bits": 0}, "bits between"),
        ({"bits": 23}, "bits between"),
        ({"prior_odds": 0.0}, "prior odds"),
        ({"prior_odds": math.inf}, "prior odds"),
        ({"prior_odds": math.nan}, "prior odds"),
    ],
)
def test_bmrs_options(options, message):
    with pytest.raises(ValueError, match=message):
        BMRS(**options)


# -- budgets and numbers ---------------------------------------------------------------------------


def images():
    return lenet5_caffe(widths=(4, 6, 9), size=16), torch.randn(2, 1, 16, 16)


@pytest.mark.parametrize("net", ["mlp", "images"])
@pytest.mark.parametrize("share", [0.25, 0.4, 0.8])
def test_a_budget_is_kept_and_used_up(net, share):
    net, x = images() if net == "images" else (mlp([3, 8, 9, 2]), torch.randn(2, 3))
    of = posterior(models.SpikeSlabGaussian, net, x)
    dense = of.macs({})
    assert dense == count_macs(net, x[:1])
    for seed in range(5):
        measure = Random(seed)
        keep = MACBudget(share * dense, measure)(of)
        assert of.macs(keep) <= share * dense
        assert all(mask.any() for mask in keep.values())
        # The best unit that is left out would be too much.
        left = {
            (float(value), name, j)
            for name, values in measure(of).items()
            for j, value in enumerate(values)
            if not keep[name][j]
        }
        _, name, j = max(left)
        more = {key: mask.clone() for key, mask in keep.items()}
        more[name][j] = True
        assert of.macs(more) > share * dense
        # One ranking: beside each group's best unit, nothing below what is left out.
        for key, values in measure(of).items():
            best = values.argmax()
            for k in keep[key].nonzero().flatten().tolist():
                assert k == best or float(values[k]) > max(left)[0]


def test_a_budget_for_everything():
    of = posterior(models.SpikeSlabGaussian)
    assert all(mask.all() for mask in MACBudget(of.macs({}))(of).values())


def test_a_budget_below_one_unit_a_group():
    of = posterior(models.SpikeSlabGaussian)
    least = 3 * 1 + 1 * 1 + 1 * 2
    assert counts(MACBudget(least)(of)) == {"fc1": 1, "fc2": 1}
    with pytest.raises(ValueError, match="one unit a group already costs 6 MACs"):
        MACBudget(least - 0.5)(of)
    for wrong in (0.0, -3.0, math.nan):
        with pytest.raises(ValueError, match="positive budget"):
            MACBudget(wrong)


def ranked(posterior):
    return {
        "fc1": torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2]),
        "fc2": torch.tensor([0.05, 0.02, 0.04, 0.03]),
    }


def test_top_k():
    of = posterior(models.SpikeSlabGaussian)
    keep = TopK(ranked, 2)(of)
    assert keep["fc1"].tolist() == [False, True, False, True, False]
    assert keep["fc2"].tolist() == [True, False, True, False]
    assert counts(TopK(ranked, 9)(of)) == {"fc1": 5, "fc2": 4}
    assert counts(TopK(ranked, {"fc1": 1, "fc2": 3})(of)) == {"fc1": 1, "fc2": 3}
    # A group that is not spoken of keeps all.
    assert counts(TopK(ranked, {"fc2": 1})(of)) == {"fc1": 5, "fc2": 1}
    # A share of all together: 4 of 9, and each group's best.
    keep = TopK(ranked, 4 / 9)(of)
    assert keep["fc1"].tolist() == [False, True, True, True, True]
    assert keep["fc2"].tolist() == [True, False, False, False]
    assert counts(TopK(ranked, 1.0)(of)) == {"fc1": 5, "fc2": 4}
    assert counts(TopK(ranked, 1e-6)(of)) == {"fc1": 1, "fc2": 1}
    assert Threshold(ranked, 0.2)(of)["fc1"].tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, 2.0, math.nan, {"fc1": 0}, {"fc1": 0.5}])
def test_top_k_out_of_range(k):
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
        TopK(ranked, k)


# -- Gaussian weights ------------------------------------------------------------------------------


def gaussian(last_layer="mean-field", net=None):
    of = posterior(
        models.ReducibleGaussian,
        net,
        guide_options={"last_layer": last_layer, "initial_scale": 0.4},
    )
    with torch.no_grad():
        for _, family in of.guide.layers():
            family.loc.mul_(2.0)
            if last_layer == "joint" and hasattr(family, "below"):
                family.below.copy_(0.5 * torch.randn_like(family.below))
    return of


def test_reduction_of_single_weights():
    of = gaussian()
    keep = ModelReduction()(of)
    assert list(keep) == ["fc1", "fc2", "out"]
    gains = {
        name: delta_evidence(law.loc, law.variance, law.prior_variance)
        for name, law in of.gaussians().items()
    }
    for name, mask in keep.items():
        assert torch.equal(mask, gains[name] < 0)
        assert 0 < int(mask.sum()) < mask.numel()
        assert torch.equal(ModelReduction(margin=1.0)(of)[name], gains[name] < -1.0)
    # Single weights are pruned, not masked.
    with pytest.raises(ValueError, match=r"goes to prune\(\)"):
        of.keep(ModelReduction())
    assert of.prune(ModelReduction()) == sum(int((~mask).sum()) for mask in keep.values())
    assert of.prune(ModelReduction()) == 0
    assert all(torch.equal(of.model.support[name], mask) for name, mask in keep.items())


def test_reduction_by_rows_and_columns():
    of = gaussian()
    gains = {
        name: delta_evidence(law.loc, law.variance, law.prior_variance)
        for name, law in of.gaussians().items()
    }
    rows = ModelReduction("rows")(of)
    for name in ("fc1", "fc2"):
        expected = (gains[name].sum(1) < 0).unsqueeze(1).expand_as(gains[name])
        assert torch.equal(rows[name], expected)
    # The output's units are no groups.
    assert rows["out"].all()
    columns = ModelReduction("columns")(of)
    for name in ("fc1", "fc2", "out"):
        expected = torch.ones_like(gains[name], dtype=torch.bool)
        expected[:, :-1] = gains[name][:, :-1].sum(0) < 0  # the last entry of a row is the bias
        assert torch.equal(columns[name], expected)
    assert not all(mask.all() for mask in columns.values())


def test_what_is_out_is_no_part_of_a_group():
    of = gaussian()
    of.prune(ModelReduction())
    inside = {name: of.model.support[name].clone() for name in of.model.support}
    keep = ModelReduction("rows", margin=3.0)(of)
    for name in ("fc1", "fc2"):
        law = of.gaussians()[name]
        gain = delta_evidence(law.loc, law.variance, law.prior_variance) * inside[name]
        expected = inside[name] & (gain.sum(1) < -3.0).unsqueeze(1)
        assert torch.equal(keep[name], expected)


def test_columns_of_a_joint_last_layer():
    """The joint ΔF of a column, with its covariances: another than the sum over the marginals."""
    of = gaussian("joint")
    law = of.gaussians()["out"]
    index = torch.arange(10).reshape(2, 5)
    joint = torch.stack(
        [
            delta_evidence_joint(
                law.loc.flatten()[index[:, j]],
                law.covariance[index[:, j]][:, index[:, j]],
                law.prior_variance,
            )
            for j in range(4)
        ]
    )
    single = delta_evidence(law.loc, law.variance, law.prior_variance)[:, :4].sum(0)
    assert (joint - single).abs().min() > 1e-3
    # A margin between both tells which one the rule goes by.
    for j in range(4):
        margin = -float(joint[j] + single[j]) / 2
        kept = ModelReduction("columns", margin=margin)(of)["out"][:, j]
        assert kept.tolist() == [bool(joint[j] < -margin)] * 2
        assert bool(joint[j] < -margin) != bool(single[j] < -margin)


def test_columns_behind_a_flatten():
    """The columns of a channel are a block of the linear layer's."""
    net, x = images()
    of = posterior(models.ReducibleGaussian, net, x)
    with torch.no_grad():
        for _, family in of.guide.layers():
            family.loc.mul_(3.0)
    keep = ModelReduction("columns", margin=5.0)(of)
    law = of.gaussians()["fc1"]
    gain = delta_evidence(law.loc, law.variance, law.prior_variance)[:, :-1]
    out = gain.reshape(gain.shape[0], 6, -1).sum((0, 2)) >= -5.0
    expected = torch.ones_like(law.loc, dtype=torch.bool)
    expected[:, :-1] = ~out.repeat_interleave(gain.shape[1] // 6)
    assert torch.equal(keep["fc1"], expected)


def test_reduction_by_something_else():
    with pytest.raises(ValueError, match="'weights', 'rows' or 'columns'"):
        ModelReduction("units")


def test_connected_units_of_a_reduced_network():
    """After weights were pruned the network computes the same with connected units only."""
    of = gaussian()
    x = torch.randn(7, 3)
    masks = {name: torch.rand(of.model.support[name].shape) < 0.4 for name in of.model.support}
    masks["fc1"][0] = False  # no weights in
    masks["fc2"][:, 1] = False  # not read
    masks["fc1"][:, 2] = False  # an input that nothing reads
    of.model.support.restrict(masks)
    before = of.masked(x, {})
    keep = of.keep()
    assert not keep["fc1"][0]
    assert not keep["fc1"][1]
    assert not keep["input"][2]
    torch.testing.assert_close(of.masked(x, keep), before)
    assert counts(of.keep(Connected())) == counts(keep)


# -- names -----------------------------------------------------------------------------------------

NAMES = {
    "median": MedianProbability(),
    "median:0.1": MedianProbability(0.1),
    "fdr": FalseDiscovery(),
    "fdr:0.2": FalseDiscovery(0.2),
    "cost": ExpectedCost(),
    "cost:4": ExpectedCost(4.0),
    "snr": SignalToNoise(),
    "snr:2": SignalToNoise(2.0),
    "log-alpha": LogAlpha(),
    "log-alpha:3": LogAlpha(3.0),
    "log-scale": LogScale(),
    "log-scale:-1.5": LogScale(-1.5),
    "bmrs-n": BMRS("n"),
    "bmrs-n:3": BMRS("n", prior_odds=3.0),
    "bmrs-u4": BMRS("u", 4),
    "bmrs-u8:5": BMRS("u", 8, prior_odds=5.0),
    "connected": Connected(),
    "macs:1000": MACBudget(1000.0),
    "macs:0.25:magnitude": MACBudget(250.0, magnitude),
    "macs:0.1:random": MACBudget(100.0, Random()),
    "macs:50:noise-signal": MACBudget(50.0, importance.noise_signal),
    "top:3": TopK(importance.inclusion_probability, 3),
    "top:0.5:log-scale": TopK(importance.log_scale, 0.5),
    "top:2:retention": TopK(importance.retention, 2),
}


@pytest.mark.parametrize("text", NAMES)
def test_parse(text):
    rule = parse(text, X, Y, 1000)
    assert rule == NAMES[text]
    if isinstance(rule, TopK):
        assert type(rule.k) is type(NAMES[text].k)


def test_parse_shapley():
    rule = parse("macs:9:shapley", X, Y, 1000)
    assert isinstance(rule.measure, Shapley)
    assert rule.measure.x is X
    assert rule.measure.y is Y


def test_every_name_in_the_list_is_understood():
    heads = {
        head.split("[")[0].split(":")[0] for name in selection.RULES for head in name.split(", ")
    }
    assert heads == {name.split(":")[0] for name in NAMES}
    for measure in selection.MEASURES:
        parse(f"top:1:{measure}", X, Y, 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("medain", "Did you mean median"),
        ("", "rule"),
        ("macs", "form of"),
        ("macs:magnitude", "form of"),
        ("macs:magnitude:10", "form of"),
        ("macs:10:magnitud", "Did you mean magnitude"),
        ("macs:10:magnitude:4", "form of"),
        ("macs:-1", "positive budget"),
        ("top", "form of"),
        ("top:0", "share"),
        ("top:2.5", "share"),
        ("top:inf", "share"),
        ("top:nan", "share"),
        ("median:a", "form of"),
        ("median:1.5", "threshold in"),
        ("snr:high", "form of"),
        ("snr:nan", "thresholds of at least 0"),
        ("snr:1:2", "form of"),
        ("bmrs-n:0", "prior odds"),
        ("bmrs-n:odds", "form of"),
        ("bmrs-u5", "Did you mean"),
        ("connected:1", "form of"),
        ("log-alpha:nan", "number as threshold"),
    ],
)
def test_names_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, X, Y, 1000)


def test_regressions_have_rules_too():
    model = models.ReducibleGaussian(
        mlp([3, 4, 1]), torch.zeros(2, 3), likelihood=likelihoods.Normal(), num_data=5
    )
    of = Posterior(model, guides.for_model(model))
    x, y = torch.randn(5, 3), torch.randn(5)
    assert counts(parse("top:2:shapley", x, y, 16)(of)) == {"fc1": 2}
