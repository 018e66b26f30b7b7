"""The model card: what an exported folder is, how good, how large, how fast, and how to load it.

It is made from config.json and, where ``bench`` has measured the folder, bench.json; nothing that
was not measured stands in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._load import read_config

__all__ = ["model_card", "refresh_card"]

MISSING = "not measured"


def refresh_card(directory: str | Path) -> None:
    """Write README.md of an exported folder anew, after its bench.json has changed."""
    directory = Path(directory)
    measured = directory / "bench.json"
    bench = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    text = model_card(read_config(directory), bench)
    (directory / "README.md").write_text(text, encoding="utf-8")


def model_card(config: Mapping[str, Any], bench: Mapping[str, Any] | None = None) -> str:
    """The text of README.md.

    Args:
        config: the folder's config.json.
        bench: its bench.json.
    """
    parts = [
        _introduction(config),
        "\n".join(f"- {one}" for one in _about(config).get("cautions", [])),
        _scores(config),
        _formats(config),
        _size(config),
        _latency(bench),
        _loading(config),
        _preprocessing(config),
        _origin(config),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _about(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config["metadata"] or {}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _introduction(config: Mapping[str, Any]) -> str:
    about, draws = _about(config), config["draws"]
    where = f" on {about['data']}" if "data" in about else ""
    cost = config["cost"]
    parameters = cost["compact"]["parameters"]
    if draws:
        what = (
            f"{draws} plain torch networks in one, of {parameters // draws:,} parameters each: "
            "draws of a Bayesian posterior, given the units that it keeps"
        )
    else:
        what = f"A plain torch network of {parameters:,} parameters"
    if "dense" in cost:
        what += (
            f", cut out of a network with {cost['dense']['parameters']:,} by removing whole units"
        )
    title = f"{about['net']}{where}, pruned" if "net" in about else f"Pruned network{where}"
    spread = "Their spread is the uncertainty about the weights. " if draws else ""
    return (
        f"# {title}\n\n{what}. {spread}"
        "Made with pyro-sparse; nothing here needs it, or Pyro, to run.\n"
    )


def _scores(config: Mapping[str, Any]) -> str:
    about = _about(config)
    scores = about.get("scores")
    if not scores:
        return ""
    columns = [
        (key, title, form)
        for key, title, form in (
            ("accuracy", "accuracy", "{:.2%}"),
            ("rmse", "RMSE", "{:.4g}"),
            ("nll", "NLL (nats)", "{:.4f}"),
            ("ece", "calibration error", "{:.4f}"),
        )
        if any(key in (row or {}) for row in scores.values())
    ]
    names = {
        "dense": "dense network of the same architecture, trained alone",
        "trained": "trained network that this one was cut out of",
        "ensemble": "full-size posterior, average of draws",
        "compact": "one compact network at posterior means" if config["draws"] else "this network",
        "exported": f"this network, average of its {config['draws']} draws",
    }
    rows = []
    first = "trained" if "trained" in scores else "dense"
    for which in (first, "ensemble", "compact", "exported"):
        row = scores.get(which)
        if row is None and which == "exported":
            continue
        cells = [
            form.format(row[key]) if row and key in row else MISSING for key, _, form in columns
        ]
        rows.append([names[which], *cells])
    text = f"\n## How good\n\nOn {about.get('scored_on', 'the test set')}.\n\n"
    text += _table(["", *(title for _, title, _ in columns)], rows)
    if "ece" in [key for key, _, _ in columns]:
        text += "\nCalibration error: expected calibration error of the top class, 15 bins.\n"
    return text


def _ratio(dense: float | None, compact: float | None) -> str:
    return f"{dense / compact:.1f}×" if dense and compact else MISSING


def _size(config: Mapping[str, Any]) -> str:
    cost, about = config["cost"], _about(config)
    dense = cost.get("dense", {})
    rows = []
    for key, title in (("parameters", "parameters"), ("macs", "MACs for one input")):
        before, after = dense.get(key), cost["compact"][key]
        rows.append(
            [
                title,
                *(f"{value:,}" if value is not None else MISSING for value in (before, after)),
                _ratio(before, after),
            ]
        )
    text = "\n## How large\n\n" + _table(["", "dense", "this network", "ratio"], rows)
    units, kept = about.get("units"), about.get("kept")
    if units and kept:
        text += "\nUnits kept: "
        text += ", ".join(f"{name} {kept[name]} of {units[name]}" for name in kept) + ".\n"
    difference = about.get("max_abs_diff_masked_compact")
    if difference is not None:
        text += (
            "\nThe full-size network with the other units switched off computes the same: largest "
            f"difference {difference:.1e} over test inputs.\n"
        )
    return text


def _latency(bench: Mapping[str, Any] | None) -> str:
    text = "\n## How fast\n\n"
    if bench is None:
        return f"{text}{MISSING.capitalize()}; `pyro-sparse bench FOLDER` does and adds it here.\n"
    times = {(row["network"], row["runtime"], row["batch"]): row for row in bench["timings"]}
    rows = [
        [
            str(ratio["batch"]),
            ratio["title"],
            *(
                _milliseconds(times[network, runtime, ratio["batch"]])
                for network, runtime in (
                    ("dense", ratio["dense_runtime"]),
                    ("compact", ratio["compact_runtime"]),
                )
            ),
            f"{ratio['median']:.1f}× ({ratio['low']:.1f}–{ratio['high']:.1f})",
        ]
        for ratio in bench["ratios"]
    ]
    text += _table(["batch", "runtime", "dense (ms)", "this network (ms)", "speed-up"], rows)
    versions = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    text += (
        "\nMedian time of a whole batch, and quartiles, over interleaved rounds (torch: eager; the "
        "arrow: dense in torch, this network in ONNX Runtime); "
        f"{bench['threads']} thread{'s' if bench['threads'] > 1 else ''} on {bench['cpu']}, "
        f"{bench['clock']}; "
        f"{versions}. Dense MACs over this network's: "
        f"{_ratio(bench['macs']['dense'], bench['macs']['compact'])}.\n"
    )
    if "ONNX Runtime" not in bench["versions"]:
        text += "ONNX Runtime: not measured, since it was not installed.\n"
    return text


def _milliseconds(row: Mapping[str, Any]) -> str:
    median, low, high = (1e3 * row[key] for key in ("median", "low", "high"))
    return f"{median:.3g} ({low:.3g}–{high:.3g})"


def _formats(config: Mapping[str, Any]) -> str:
    """Every file on the same rows."""
    files = config["files"]
    names = {"torch": "torch", "pt2": "model.pt2", "onnx": "model.onnx", "int8": "model-int8.onnx"}
    test = config.get("test")
    text = "\n## The files\n\n"
    header, rows = ["file", "size (kB)", "largest difference"], []
    if test:
        score = "RMSE" if "rmse" in test["scores"]["torch"] else "accuracy (95 % interval)"
        header.append(score)
        rows.append([names["torch"], "", "", _score(test["scores"]["torch"])])
    for key in ("pt2", "onnx", "int8"):
        if key not in config["formats"]:
            continue
        row = [
            f"`{names[key]}`",
            f"{files[names[key]]['bytes'] / 1000:.1f}",
            f"{config['formats'][key]['max_abs_diff']:.1e}",
        ]
        rows.append([*row, _score(test["scores"][key])] if test else row)
    text += _table(header, rows)
    size = config["formats"]["pt2"]["max_abs_output"]
    text += f"\nDifferences are from the network in torch, on outputs of up to {size:.3g}"
    text += f"; scores are on the same {test['rows']:,} test inputs.\n" if test else ".\n"
    if "int8" in config["formats"]:
        text += (
            "Int8: weights and activations in 8 bits, ranges of activations from training inputs"
        )
        same = test and test["scores"]["int8"].get("same")
        text += f"; the same class as in torch for {same:.2%} of them.\n" if same else ".\n"
    return text


def _score(row: Mapping[str, float]) -> str:
    if "rmse" in row:
        return f"{row['rmse']:.4g}"
    return f"{row['accuracy']:.2%} ({row['low']:.2%}–{row['high']:.2%})"


def _loading(config: Mapping[str, Any]) -> str:
    only = config["batch"] != "any"
    batch = config["batch"]["only"] if only else 2
    said = (
        f"it runs at a batch of {batch} only ({config['batch']['reason']})"
        if only
        else "the batch size is free"
    )
    text = f"\n## How to load it\n\nRun in this folder; {said}."
    given = config["inputs"]

    def zeros(library: str, one: Mapping[str, Any]) -> str:
        shape = [batch, *one["shape"]] if one["batch"] else one["shape"]
        return f"{library}.zeros({tuple(shape)}, dtype={library}.{one['dtype']})"

    tensors = {one["name"]: zeros("torch", one) for one in given}
    args, kwargs = config["call"]
    call = ", ".join(
        [_written(value, tensors) for value in args]
        + [f"{name}={_written(value, tensors)}" for name, value in kwargs.items()]
    )
    text += _block(
        "**torch** (`model.pt2`), nothing else.",
        [
            "import torch",
            "",
            'net = torch.export.load("model.pt2").module()',
            f"outputs = net({call})",
        ],
    )
    for name, key in (("model.onnx", "onnx"), ("model-int8.onnx", "int8")):
        if key in config["formats"]:
            arrays = ", ".join(f'"{one["name"]}": {zeros("numpy", one)}' for one in given)
            title = "**ONNX Runtime**" if key == "onnx" else "**ONNX Runtime, 8-bit integers**"
            others = config["outputs"][1:]
            text += _block(
                f"{title} (`{name}`), without torch.",
                [
                    "import numpy",
                    "import onnxruntime",
                    "",
                    f'session = onnxruntime.InferenceSession("{name}")',
                    f"(outputs,{' *others' if others else ''}) = session.run(None, {{{arrays}}})",
                ],
            )
    meaning = _outputs(config)
    text += "\n\n" + (f"{meaning}\n" if meaning else "")
    text += (
        "No file here holds a pickle or code: `model.pt2` is a zip with the operations as JSON "
        "and the weights as plain bytes. `model.safetensors` has the weights by the network's own "
        "names; `config.json` the digests of all files."
    )
    return text + "\n"


def _written(value: Any, tensors: Mapping[str, str]) -> str:
    """An argument as Python; tensors stand there by the names of the inputs."""
    if isinstance(value, str):
        return tensors[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}": {_written(v, tensors)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "(" + "".join(f"{_written(part, tensors)}, " for part in value).strip() + ")"
    return repr(value)


def _block(title: str, lines: Sequence[str]) -> str:
    code = "\n".join(lines)
    return f"\n\n{title}\n\n```python\n{code}\n```"


def _outputs(config: Mapping[str, Any]) -> str:
    """What the numbers mean that the network returns."""
    target = (config["preprocessing"] or {}).get("target", {})
    draws = config["draws"]
    text = f"`outputs` has shape `({draws}, batch, ...)`, one entry a draw.\n" if draws else ""
    if "labels" in target:
        text += (
            "The outputs are logits of the classes: their softmax over the last axis gives "
            "probabilities"
        )
        if draws:
            text += (
                " (in torch `p = outputs.softmax(-1)`), `p.mean(0)` is the prediction, `p.std(0)` "
                "how far the draws are apart"
            )
            temperature = _about(config).get("temperature", 1.0)
            if temperature != 1:
                text += (
                    ". Calibrated on validation rows it is "
                    f"`p.mean(0) ** (1 / {temperature:.3g})`, divided by its sum "
                    "(`metadata.temperature`)"
                )
        text += ".\n"
        labels = target["labels"]
        if len(labels) <= 20:
            text += f"Classes, in order: {', '.join(map(str, labels))}.\n"
    elif "std" in target:
        text += (
            f"The output is the mean of the target, standardised: times {target['std']:g}, plus "
            f"{target['mean']:g}, in the target's own unit.\n"
        )
        noise = _about(config).get("noise_scale")
        if noise:
            every = "; `config.json` has that of every draw" if len(noise) > 1 else ""
            text += (
                "Observations scatter around it with a standard deviation of about "
                f"{sum(noise) / len(noise):.4g} in this unit (`metadata.noise_scale`{every}).\n"
            )
    return text


def _preprocessing(config: Mapping[str, Any]) -> str:
    steps = (config["preprocessing"] or {}).get("inputs")
    if steps is None:
        return ""
    text = "\n## What to do to inputs\n\n"
    columns = config["preprocessing"].get("columns")
    if columns:
        text += (
            f"The inputs, in order: {', '.join(one['name'] for one in columns)}. "
            "`config.json` has what each is made of under `preprocessing.columns`: a `number` of "
            "the table, a `date` in days since 1970, 1 where the cell is a `level`, 1 where it is "
            "`missing`"
        )
        fill = "; missing numbers become `preprocessing.inputs.fill`" if "fill" in steps else ""
        text += f"{fill}.\n\n"
    if {"divide_by", "mean", "std"} <= steps.keys():
        mean, std = _single(steps["mean"]), _single(steps["std"])
        if mean is not None and std is not None:
            return (
                f"{text}Divide by {steps['divide_by']:g}, subtract {mean:g}, divide by {std:g}.\n"
            )
        text += f"Divide by {steps['divide_by']:g}, subtract the mean, divide by the standard "
        return f"{text}deviation; `config.json` has both under `preprocessing.inputs`.\n"
    return f"{text}`config.json` says it under `preprocessing.inputs`.\n"


def _single(values: Any) -> float | None:
    """The number in nested lists that hold one; None for several."""
    while isinstance(values, list):
        if len(values) != 1:
            return None
        values = values[0]
    return float(values)


def _origin(config: Mapping[str, Any]) -> str:
    about = _about(config)
    known = [
        (title, about[key])
        for key, title in (
            ("model", "model"),
            ("net", "dense network"),
            ("data", "data"),
            ("epochs", "epochs"),
            ("seed", "seed"),
        )
        if key in about
    ]
    if not known:
        return ""
    text = "\n## Where it comes from\n\n"
    text += "".join(f"- {title}: {value}\n" for title, value in known)
    text += "\nEverything else that was recorded stands in `config.json` under `metadata`.\n"
    return text
