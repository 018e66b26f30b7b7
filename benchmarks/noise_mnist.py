"""SBP and BMRS on MNIST: how small and how good, for LeNet-5-Caffe and LeNet-500-300.

Each network goes through stages, each on what the last one left:

LeNet-5-Caffe
    3 epochs dense; 6 of SBP with the KL at ten times its weight, which lets go of units that a
    trained network hardly needs; the 5-17-283 units with the largest signal-to-noise ratios; and
    25 epochs of the evidence lower bound itself on the network with these only.
LeNet-500-300
    from scratch, inputs prunable: 45 epochs of the bound; the 245-160-55 inputs and units with the
    largest signal-to-noise ratios; 45 more epochs with a falling rate.

The numbers of units are those of Neklyudov et al. (2017). Prints units, MACs and test error after
each epoch, and in the end by the rules of SBP and of BMRS; no epoch is selected::

    python -m benchmarks.noise_mnist lenet5-caffe --data-root DIR
    python -m benchmarks.noise_mnist mlp:500-300 --data-root DIR
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_sparse import compact, data, guides, models, nets
from pyro_sparse.infer import fit, schedules
from pyro_sparse.posterior import BMRS, Posterior, SignalToNoise, TopK, accuracy, importance

KEPT = {
    "lenet5-caffe": {"conv1": 5, "conv2": 17, "fc1": 283},
    "mlp:500-300": {"input": 245, "fc1": 160, "fc2": 55},
}


def noise(net: nn.Module, x: Tensor, inputs: bool) -> Posterior:
    """SBP on a network."""
    model = models.LogNormalNoise(net, x[:2], num_data=len(x), prune_inputs=inputs)
    return Posterior(model, guides.for_model(model))


def describe(posterior: Posterior, keep: dict[str, Tensor], split: data.Split) -> str:
    """Units, MACs and test error of the network that these masks keep."""
    units = "-".join(str(int(mask.sum())) for name, mask in keep.items() if name != "out")
    score = accuracy(posterior.masked(split.x, keep).softmax(-1), split.y)
    return f"{units}  {posterior.macs(keep):,} MACs  test error {1 - score:.2%}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("net", choices=KEPT)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shorter", type=float, default=1.0, help="factor on all epochs")
    options = parser.parse_args()
    torch.set_num_threads(1)

    dataset = data.load("mnist", options.data_root, validation=0.0, seed=options.seed)
    x, y, test = dataset.train.x, dataset.train.y, dataset.test
    convolutional = options.net == "lenet5-caffe"
    loader = data.Batches(x, y, 256 if convolutional else 128, seed=options.seed)
    started = time.process_time()

    def train(posterior: Posterior, epochs: int, **how: object) -> None:
        def report(metrics: dict[str, object]) -> None:
            print(
                f"  epoch {metrics['epoch']}: {describe(posterior, posterior.keep(), test)}",
                flush=True,
            )

        epochs = max(1, round(epochs * options.shorter))
        fit(
            posterior.model, posterior.guide, loader, epochs=epochs, seed=options.seed,
            progress=False, on_epoch=report, **how,  # type: ignore[arg-type]
        )  # fmt: skip

    torch.manual_seed(options.seed)
    net = nets.build(options.net, dataset.input_shape, dataset.outputs, activation="relu")
    constant = schedules.constant()
    bound = {"kl_weight": constant}
    if convolutional:
        print("dense")
        model = models.Deterministic(net, x[:2], num_data=len(x))
        dense = Posterior(model, guides.for_model(model))
        train(dense, 3, lr=2e-3, schedule=schedules.cosine(0.3))
        posterior = noise(compact(dense), x, inputs=False)
        print("SBP, the KL at ten times its weight")
        train(posterior, 6, lr=1e-3, scale_lr=3e-2, schedule=constant, kl_weight=lambda _: 10.0)
    else:
        posterior = noise(net, x, inputs=True)
        print("SBP")
        train(posterior, 45, lr=1e-3, scale_lr=4e-2, schedule=constant, **bound)

    # Of what the noise has left, the best.
    cut = TopK(importance.noise_signal, KEPT[options.net])
    keep = {name: mask & posterior.keep(cut)[name] for name, mask in posterior.keep().items()}
    print(f"cut to {describe(posterior, keep, test)}")
    if convolutional:
        posterior = noise(compact(posterior, keep), x, inputs=False)
        train(posterior, 25, lr=2e-3, scale_lr=2e-2, schedule=schedules.cosine(0.3), **bound)
    else:
        posterior.prune(cut)
        train(posterior, 45, lr=1e-3, scale_lr=2e-2, schedule=schedules.cosine(0.2), **bound)
    print(f"{time.process_time() - started:.0f} CPU-seconds")
    rules = {
        "SBP": SignalToNoise(),
        "BMRS_N": BMRS(),
        "BMRS_U8": BMRS("u", 8),
        "BMRS_U4": BMRS("u", 4),
    }
    for name, rule in rules.items():
        keep = posterior.keep(rule)
        # The network that one would ship: smaller, and with a gather where inputs went.
        small = compact(posterior, keep)
        with torch.no_grad():
            error = 1 - accuracy(small(test.x).softmax(-1), test.y)
        print(
            f"{name:8} {describe(posterior, keep, test)}; compact: "
            f"{nets.count_macs(small, x):,} MACs, {error:.2%}"
        )


if __name__ == "__main__":
    main()
