"""Running statistics of batch normalisations, against what they are by definition."""

import pytest
import torch
from torch import nn

from pyro_sparse.nets import estimate_statistics, kept_statistics, normalisations, resnet


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 2))


def test_averages_of_the_batches():
    net, batches = network(), list(torch.randn(3, 8, 4))
    estimate_statistics(net, net, batches)
    hidden = [net[0](batch).detach() for batch in batches]
    mean = torch.stack([one.mean(0) for one in hidden]).mean(0)
    variance = torch.stack([one.var(0) for one in hidden]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean)
    torch.testing.assert_close(net[1].running_var, variance)
    assert net[1].momentum == 0.1
    assert all(module.training for module in net.modules())


def test_deeper_layers_see_normalised_inputs():
    net = resnet(8, widths=(4, 6, 8)).eval()
    x = torch.randn(64, 3, 8, 8) * 3 + 1
    estimate_statistics(net, net, [x])
    assert not any(module.training for module in net.modules())
    estimated = net(x)
    for layer in normalisations(net):
        layer.train()
    # One batch: eval mode is train mode but for n/(n − 1) in the variance.
    torch.testing.assert_close(estimated, net(x), rtol=0.01, atol=0.01)


def test_kept_statistics_come_back():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def fails():
        with kept_statistics(net):
            net(torch.randn(8, 4))
            assert not torch.equal(net[1].running_mean, before["1.running_mean"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_only_normalisations_with_running_statistics():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert normalisations(net) == []
    ran = []
    estimate_statistics(net, ran.append, [torch.zeros(3, 2)])
    assert ran == []
