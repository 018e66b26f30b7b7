"""ResNet-20 on CIFAR-10: dense beside SS-GL and SS-GHS, pruned through its residual streams.

Fits each model on ``folder:FOLDER``, prunes it by its own rule, ships it, and prints one table of
everything that is finished in the output folder: so several processes may share that, one a model,
and the same command again goes on where it was stopped, or only prints the table. All shares of
the schedule are of the epochs, whatever their number::

    python -m benchmarks.resnet_cifar FOLDER --epochs 40 --out DIR
    python -m benchmarks.resnet_cifar FOLDER --models ss-gl --accelerator gpu \\
        --precision bf16-mixed --epochs 40 --out DIR
    python -m benchmarks.resnet_cifar FOLDER --quick --out DIR      # a smoke test, on the CPU

FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg. The weight of the KL is ``--kl-weight``
throughout: 300 epochs of the evidence lower bound itself are ``pyro-sparse fit ss-gl --data
folder:FOLDER``, with the authors' recipe.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from pyro_sparse import export, infer, names, nets
from pyro_sparse.export.onnx import onnx_available
from pyro_sparse.runs import deployment, experiment
from pyro_sparse.runs.settings import Settings, settings_for

MODELS = ("dense", "ss-gl", "ss-ghs")
# Few epochs, and steps that few numbers decide: Adam moves logits and scales at their own rate,
# whatever the size of their gradients. Units are decided in the middle of training, when the
# network is good enough to tell which it needs, and stay as they are while the rates fall to 0.
SHARED: dict[str, Any] = {
    "net": "resnet20",
    "optimizer": "adam",
    "lr": 3e-3,
    "inclusion_lr": 3e-2,
    "scale_lr": 1e-2,
    "schedule": "cosine",
    "lr_hold": 0.2,
    "inclusion_hold": 0.3,
    "inclusion_stop": 0.6,
    "kl_hold": 1.0,
    "kl_rise": 0.0,
    "clip_norm": 1.0,
    "augment": True,
}
QUICK = {"train": 60, "test": 20}
"""Images of each class."""


def settings_of(model: str, options: argparse.Namespace, folder: Path) -> Settings:
    """The settings of one run."""
    return settings_for(
        model,
        f"folder:{folder}",
        **SHARED,
        epochs=options.epochs,
        batch_size=options.batch_size,
        kl_start=options.kl_weight,
        precision=options.precision,
        seed=options.seed,
    )


def few_images(folder: Path, out: Path) -> Path:
    """A copy of the first images of every class."""
    for part, count in QUICK.items():
        for place in sorted(path for path in (folder / part).iterdir() if path.is_dir()):
            there = out / part / place.name
            there.mkdir(parents=True, exist_ok=True)
            for image in sorted(place.iterdir())[:count]:
                shutil.copy(image, there)
    return out


def finished(out: Path) -> list[dict[str, Any]]:
    """Summary, and scores of the network that was shipped, of every finished run."""
    rows = []
    for model in MODELS:
        config = out / "shipped" / model / "config.json"
        if config.is_file():
            shipped = infer.read_json(config)["metadata"]["scores"]["compact"]
            rows.append(infer.read_json(out / model / "summary.json") | {"shipped": shipped})
    return rows


def print_table(out: Path, epochs: int) -> None:
    """Everything that is finished, in one table, and the units that are left."""
    rows = finished(out)
    if not rows:
        print(f"nothing is finished in {out} yet")
        return
    print(f"\n{rows[0]['net']} on {rows[0]['data']}, {epochs} epochs")
    titles = ("model", "ensemble", "masked", "shipped", "|masked−compact|", "parameters", "MACs")
    print("  ".join(f"{title:>16}" for title in (*titles, "s an epoch")))
    for row in rows:
        cells = [row["model"]]
        cells += [f"{row[f'accuracy_{which}']:.2%}" for which in ("ensemble", "compact")]
        cells += [f"{row['shipped']['accuracy']:.2%}", f"{row['max_abs_diff_masked_compact']:.1e}"]
        for what in ("params", "macs"):
            count, dense = row[f"{what}_compact"], row[f"{what}_dense"]
            cells.append(f"{count:,} ({count / dense:.0%})")
        cells.append(f"{row['seconds_per_epoch']:.1f}")
        print("  ".join(f"{cell:>16}" for cell in cells))
    for row in rows:
        if row["kept"]:
            print(f"\n{row['model']}: units kept, and undecided ones")
        for name, kept in row["kept"].items():
            undecided = row["undecided"][name]
            print(f"  {name:<16} {kept:>3} of {row['units'][name]:>3}  ({undecided} undecided)")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the images")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--kl-weight", type=float, default=0.01, help="throughout; default 0.01")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--precision", default="32-true", choices=names.PRECISIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few images, two epochs")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.quick:
        folder = few_images(folder, options.out / "images")
        options.epochs = min(options.epochs, 2)
    for model in options.models:
        settings = settings_of(model, options, folder)
        # One for each: of a scaler, say, a run has its own.
        fabric = infer.make_fabric(accelerator=options.accelerator, precision=options.precision)
        dataset = experiment.load_data(settings, None)
        run = options.out / model
        experiment.run(settings, run, dataset=dataset, resume=True, fabric=fabric)
        shipped = options.out / "shipped" / model
        if not (shipped / "config.json").is_file():
            deployment.write_export(run, shipped, onnx=onnx_available())
            small = export.load(shipped)
            summary = infer.read_json(run / "summary.json")
            # What is in the folder is what the summary says, to the integer.
            assert nets.count_parameters(small) == summary["params_compact"]
            assert nets.count_macs(small, dataset.test.x[:1]) == summary["macs_compact"]
    print_table(options.out, options.epochs)


if __name__ == "__main__":
    main()
