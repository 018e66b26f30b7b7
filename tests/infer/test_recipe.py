"""The optimisers of recipes."""

import math
from functools import partial

import pytest
import torch

from pyro_sparse.infer.recipe import FusedAdam


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size)) for size in (3, (4, 5), 1, 2)]


def trained(optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[torch.Tensor]:
    """The parameters after some steps on the same gradients; the last has one in every other."""
    values = [value for group in optimizer.param_groups for value in group["params"]]
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for number, value in enumerate(values):
            value.grad = torch.randn(value.shape, generator=generator)
            if number == 3 and step % 2:
                value.grad = None
        optimizer.step()
    return [value.detach().clone() for value in values]


def groups(values: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": values[:2], "lr": 0.1}, {"params": values[2:], "lr": 0.02}]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-4},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"amsgrad": True, "maximize": True},
    ],
)
def test_is_torchs_adam_to_the_bit(options):
    ours = trained(FusedAdam(groups(parameters()), **options), 7)
    stock = trained(torch.optim.Adam(groups(parameters()), fused=True, **options), 7)
    assert all(map(torch.equal, ours, stock))


def test_goes_on_with_torchs_state_and_torch_with_ours():
    whole = trained(FusedAdam(groups(parameters())), 6)
    stock = partial(torch.optim.Adam, fused=True)
    for first, then in ((FusedAdam, stock), (stock, FusedAdam)):
        values = parameters()
        before = first(groups(values))
        trained(before, 3)
        after = then(groups(values))
        after.load_state_dict(before.state_dict())
        assert all(map(torch.equal, trained(after, 3, first=3), whole))


def test_a_gradient_scaler_can_leave_out_a_step():
    values = parameters()[:1]
    optimizer = FusedAdam(values, lr=0.1)
    before = values[0].detach().clone()
    values[0].grad = torch.full((3,), math.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(values[0], before)
    assert float(optimizer.state[values[0]]["step"]) == 0
    values[0].grad, optimizer.found_inf = torch.full((3,), 4.0), torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[values[0]]["exp_avg"], torch.full((3,), 0.2))


def test_closures_and_hooks_are_called():
    values, seen = parameters(), []
    optimizer = FusedAdam(values, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        loss = sum(value.square().sum() for value in values)
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) > 0
    assert seen == ["after"]
