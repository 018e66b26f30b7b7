"""Every model of the zoo passes the shared case, in its default form and with its options."""

import inspect

import pytest

from pyro_sparse import guides, models
from pyro_sparse.runs.zoo import ZOO
from pyro_sparse.testing import ModelTestCase


def case(model, *, proper=True, guide_options=None, **options):
    """A test class of one model with these options."""

    class Case(ModelTestCase):
        def make_model(self, net, example, **shared):
            return model(net, example, **options, **shared)

        def make_guide(self, model):
            return guides.for_model(model, **(guide_options or {}))

    Case.proper = proper
    Case.model = model
    return Case


TestSpikeSlabGaussian = case(models.SpikeSlabGaussian)
TestSpikeSlabGaussianFull = case(models.SpikeSlabGaussian, guide_options={"variance": "full"})
TestSpikeSlabGroupLasso = case(models.SpikeSlabGroupLasso)
TestSpikeSlabGroupHorseshoe = case(models.SpikeSlabGroupHorseshoe)
TestLogNormalNoise = case(models.LogNormalNoise, proper=False)
TestLogNormalNoiseByExample = case(
    models.LogNormalNoise, prior_scale=1.0, guide_options={"noise_draws": "example"}
)
TestReducibleGaussian = case(models.ReducibleGaussian)
TestReducibleGaussianJoint = case(models.ReducibleGaussian, guide_options={"last_layer": "joint"})
TestTurboMarkov = case(models.TurboMarkov)
TestTurboMarkovBlocks = case(models.TurboMarkov, block_size=4)
TestGroupNormalJeffreys = case(models.GroupNormalJeffreys, proper=False)
TestGroupNormalJeffreysByExample = case(
    models.GroupNormalJeffreys,
    proper=False,
    guide_options={"scale_draws": "example", "variance": "tied"},
)
TestGroupHorseshoe = case(models.GroupHorseshoe)
TestGroupHorseshoeTied = case(
    models.GroupHorseshoe, global_scale=0.1, guide_options={"variance": "tied"}
)
TestDeterministic = case(models.Deterministic, proper=False)
TestDeterministicWeightDecay = case(models.Deterministic, prior_scale=1.0)


@pytest.mark.parametrize("entry", ZOO.values(), ids=lambda entry: entry.name)
def test_every_entry_has_a_case(entry):
    cases = [
        value.model
        for value in globals().values()
        if inspect.isclass(value) and issubclass(value, ModelTestCase) and hasattr(value, "model")
    ]
    assert getattr(models, entry.model) in cases


@pytest.mark.parametrize("entry", ZOO.values(), ids=lambda entry: entry.name)
def test_every_entry_says_everything(entry):
    for attribute in ("title", "paper", "prior", "guide", "rule", "use"):
        assert getattr(entry, attribute)


def test_a_wrong_guide_fails_the_case():
    """The case can fail: a guide of another model has other sites."""

    other = case(models.SpikeSlabGroupLasso)()

    def mismatched(model):
        wrong = guides.for_model(model)
        wrong.forward = lambda *args: wrong.sample_likelihood()
        return wrong

    other.make_guide = mismatched
    with pytest.raises(AssertionError, match="guide"):
        other.test_guide_has_the_sites_of_the_model()
