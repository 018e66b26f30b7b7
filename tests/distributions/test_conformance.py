"""The laws of single numbers pass the case that users' own are offered."""

import math

from pyro.distributions import Normal

from pyro_sparse.distributions import (
    LogScaleNormal,
    LogUniform,
    SpikeAndSlab,
    TruncatedLogNormal,
    TruncatedNormal,
)
from pyro_sparse.testing import DistributionTestCase


class TestTruncatedNormal(DistributionTestCase):
    parameters = {"loc": [0.3, -4.0], "scale": [0.8, 1.5], "low": [-1.0] * 2, "high": [2.0] * 2}
    grid = (-1.0, 2.0)
    values = [0.4, 0.7]

    def make_law(self, **parameters):
        return TruncatedNormal(**parameters, validate_args=False)


class TestTruncatedLogNormal(DistributionTestCase):
    parameters = {"loc": [0.3, -4.0], "scale": [0.8, 1.5], "low": [-1.0] * 2, "high": [2.0] * 2}
    grid = (math.exp(-1), math.exp(2))
    values = [1.4, 1.7]

    def make_law(self, **parameters):
        return TruncatedLogNormal(**parameters, validate_args=False)


class TestLogUniform(DistributionTestCase):
    parameters = {"low": [-1.0] * 2, "high": [1.0] * 2}
    grid = (math.exp(-1), math.exp(1))
    values = [1.4, 0.7]

    def make_law(self, **parameters):
        return LogUniform(**parameters, validate_args=False)


class TestLogScaleNormal(DistributionTestCase):
    parameters = {"loc": [0.3, -1.0], "log_scale": [-0.5, 0.4]}
    grid = (-15.0, 15.0)
    values = [0.1, 0.7]

    def make_law(self, **parameters):
        return LogScaleNormal(**parameters, validate_args=False)


class TestSpikeAndSlab(DistributionTestCase):
    parameters = {"logits": [0.3, -1.0], "loc": [0.5, -0.5], "scale": [0.7, 1.2]}
    grid = (-15.0, 15.0)
    atoms = (0.0,)
    values = [0.6, -0.8]

    def make_law(self, logits, loc, scale):
        slab = Normal(loc, scale, validate_args=False)
        return SpikeAndSlab(logits=logits, slab=slab, validate_args=False)
