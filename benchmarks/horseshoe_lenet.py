"""BC-GHS on LeNet-5-Caffe and MNIST: how small and how good.

Four stages, each on the network that the last one left, with its posterior:

1. the dense network, 4 epochs;
2. the horseshoe on all 20-50-500 units, the KL's weight rising from 0.1 to 1: most units of the
   last layers lose their scale;
3. the KL at three times its weight, which makes those go that hardly pay for themselves;
4. the units with the largest scales that 158 kMACs allow, at a tenth of the KL's weight: the
   shipped network's accuracy needs sharper weights than the bound's optimum has.

The run that these stages write down (seed 0, the last epoch's network; the ends of stages 2 and 3
were chosen by hand while it ran) kept 5-10-14 by the default rule: 154,380 MACs, test error 0.93 %,
and the same at the suggested 9 to 11 bits a weight. The 11-11-16 units of stage 3 (354,976 MACs,
three times the KL's weight) had 1.31 %.

Takes about 15 minutes on one free core. Prints units, MACs, test error, and the bits that the
posterior variance suggests with the error at them::

    python -m benchmarks.horseshoe_lenet --data-root DIR [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pyro_sparse import data, guides, models, nets
from pyro_sparse.infer import fit
from pyro_sparse.infer.schedules import Schedule, cosine, ramp
from pyro_sparse.posterior import Posterior, TopK, accuracy, importance, suggested_bits
from pyro_sparse.posterior.precision import rounded_parameters

LAYERS = ("conv1", "conv2", "fc1")


def horseshoe(widths: list[int], x: Tensor, **trained: Tensor) -> Posterior:
    """BC-GHS on a LeNet-5 of these widths, from trained parameters where given."""
    net = nets.lenet5_caffe(widths=widths)
    if trained:
        net.load_state_dict(trained)
    model = models.GroupHorseshoe(net, x[:2], num_data=len(x))
    return Posterior(model, guides.for_model(model))


@torch.no_grad()
def narrowed(posterior: Posterior, kept: dict[str, int], x: Tensor) -> Posterior:
    """The posterior of the units with the largest scales alone, on a network of their number."""
    keep = posterior.keep(TopK(importance.log_scale, kept))
    small = horseshoe([int(keep[name].sum()) for name in LAYERS], x)
    graph = posterior.model.graph
    inside = {name: torch.ones(shape) for name, shape in graph.shapes.items()}
    inside = graph.masked_parameters(inside, keep)
    for name in LAYERS:
        inside = graph.scale_columns(inside, name, keep[name])
    old_guide, guide = posterior.guide, small.guide
    assert isinstance(old_guide, guides.GroupHorseshoe)
    assert isinstance(guide, guides.GroupHorseshoe)
    for (group, family), (_, old) in zip(guide.layers(), old_guide.layers(), strict=True):
        entries = graph.rows(inside, group.name) != 0
        for name, parameter in family.named_parameters():
            parameter.copy_(old.get_parameter(name)[entries].reshape(parameter.shape))
    for name in LAYERS:
        local, everywhere = guide.local_family(name), guide.global_family(name)
        for attribute in ("loc", "log_scale"):
            old = getattr(old_guide.local_family(name), attribute)
            getattr(local, attribute).copy_(old[keep[name]])
            getattr(everywhere, attribute).copy_(getattr(old_guide.global_family(name), attribute))
    return small


@torch.no_grad()
def report(posterior: Posterior, x: Tensor, y: Tensor) -> None:
    """Print what the default rule keeps, its cost and error, and the sorted log scales."""
    keep = posterior.keep()
    kept = "-".join(str(int(keep[name].sum())) for name in LAYERS)
    error = 1 - accuracy(posterior.masked(x, keep), y)
    print(f"{kept}: {posterior.macs(keep):,} MACs, test error {100 * error:.2f} %", flush=True)
    for name, scales in posterior.log_scales().items():
        largest = scales.sort(descending=True).values[:60]
        print(f"  {name}", *(f"{scale:.1f}" for scale in largest), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with MNIST/")
    parser.add_argument("--out", type=Path, help="run folder of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale-epochs", type=float, default=1.0, help="factor on all numbers of epochs"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mnist = data.load("mnist", arguments.data_root, validation=0.05, seed=arguments.seed)
    x, y, test = mnist.train.x, mnist.train.y, mnist.test

    def train(
        posterior: Posterior, epochs: int, lr: float, schedule: Schedule, kl_weight: Schedule,
        out: Path | None = None,
    ) -> None:  # fmt: skip
        fit(
            posterior.model, posterior.guide, data.Batches(x, y, 256, seed=arguments.seed),
            epochs=max(1, round(epochs * arguments.scale_epochs)), lr=lr, scale_lr=2e-2,
            schedule=schedule, kl_weight=kl_weight, seed=arguments.seed, out=out,
        )  # fmt: skip
        if posterior.log_scales():
            report(posterior, test.x, test.y)

    torch.manual_seed(arguments.seed)
    dense = models.Deterministic(nets.lenet5_caffe(), x[:2], num_data=len(x))
    point = Posterior(dense, guides.for_model(dense))
    train(point, 4, 1e-3, cosine(hold=0.4), ramp())

    posterior = horseshoe([20, 50, 500], x, **point.mean_parameters())
    # 17 of 24 epochs
    train(
        posterior, 17, 1e-2,
        lambda done: cosine(hold=0.5)(done * 17 / 24),
        lambda done: ramp(0.1, hold=0.13, change=0.4)(done * 17 / 24),
    )  # fmt: skip
    posterior = narrowed(posterior, {"conv1": 14, "conv2": 25, "fc1": 31}, x)
    train(posterior, 6, 1e-2, lambda done: 1.0, lambda done: 3.0)
    posterior = narrowed(posterior, {"conv1": 5, "conv2": 10, "fc1": 17}, x)
    train(posterior, 46, 1e-2, cosine(hold=0.3), lambda done: 0.1, arguments.out)

    keep = posterior.keep()
    output = torch.func.functional_call(
        posterior.model.net, rounded_parameters(posterior, keep), (test.x,)
    )
    for name, bits in suggested_bits(posterior, keep).items():
        print(f"{name}: 1 + {bits.exponent} + {bits.mantissa} = {bits.total} bits a weight")
    print(f"at these bits: test error {100 * (1 - accuracy(output, test.y)):.2f} %")


if __name__ == "__main__":
    main()
