"""Run by test_processes.py: fits in two processes on the CPU, and what each of them ends with."""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pyro_sparse import guides, models
from pyro_sparse.data import Batches
from pyro_sparse.infer import OPTIMIZERS, Interrupted, fit, launch, make_fabric, on_first


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator)
    return x, (x[:, 0] > 0).long()


def dense():
    """A model without noise or batch normalisation: what it learns depends on the data only."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model = models.Deterministic(net, data()[0][:2], num_data=24, prior_scale=1.0)
    return model, guides.for_model(model)


def fit_dense(**options):
    model, guide = dense()
    x, y = data()
    options = {"lr": 0.3, "optimizer": OPTIMIZERS["sgd"], "clip_norm": 0.5, **options}
    run = fit(model, guide, Batches(x, y, 8, seed=2), epochs=3, progress=False, **options)
    return guide, run


def fit_sparse(**options):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    x, y = data()
    model = models.SpikeSlabGroupLasso(net, x[:2], num_data=24)
    guide = guides.for_model(model)
    options = {"epochs": 3, "lr": 0.01, "progress": False, "validation": (x, y), **options}
    fit(model, guide, Batches(x, y, 9, seed=2), **options)
    return {
        **{f"guide.{name}": value for name, value in guide.state_dict().items()},
        **{f"model.{name}": value.clone() for name, value in model.state_dict().items()},
    }


def main(folder: Path) -> None:
    fabric = make_fabric(devices=2, accelerator="cpu", strategy="ddp")
    launch(fabric)
    rank = fabric.global_rank

    def save(name, tensors):
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}-{rank}.safetensors")

    guide, run = fit_dense(fabric=fabric)
    loss = torch.tensor([entry["loss"] for entry in run.history], dtype=torch.float64)
    save("dense", {**guide.state_dict(), "loss": loss})

    noise = []
    save(
        "sparse",
        fit_sparse(
            fabric=fabric, out=folder / "sparse", on_epoch=lambda _: noise.append(torch.rand(1))
        ),
    )
    save("noise", {"noise": torch.cat(noise)})

    def stop(metrics):
        torch.rand(1)
        if rank == 1 and metrics["epoch"] == 1:  # only one is told
            os.kill(os.getpid(), signal.SIGTERM)

    where = {"fabric": fabric, "out": folder / "stopped"}
    try:
        fit_sparse(**where, on_epoch=stop)
    except Interrupted:
        save("resumed", fit_sparse(**where, resume=True, on_epoch=lambda _: torch.rand(1)))

    def refuse():
        raise ValueError("only the first process knows")

    try:
        on_first(fabric, refuse)
    except ValueError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
