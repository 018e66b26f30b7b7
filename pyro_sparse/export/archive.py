"""What a ``.pt2`` file may hold, so that reading one runs nothing that it brings along.

A ``.pt2`` file is a zip: operations as JSON, tensors as plain bytes. ``torch.export.load`` also
reads pickles there (weights, constants, custom objects, sample inputs), compiled libraries, Python
expressions (guards, sizes) and functions of torch by any name. Here a file is read as data first;
one with anything else is refused, and torch gets an archive that is made anew of what was checked.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["FormatError", "checked", "hollowed"]

TENSOR = r"data/(?:weights/weight|constants/tensor)_\d+"
MEMBERS = re.compile(
    rf"models/model\.json|data/sample_inputs/model\.pt|{TENSOR}|data/weights/model_weights_config\.json"
    r"|data/constants/model_constants_config\.json|archive_format|archive_version|byteorder"
    r"|\.data/(?:version|serialization_id)|\.format_version|\.storage_alignment"
)
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
MOST_NUMBERS = 2**31  # of a network without its weights

# Operations: of torch's own library, of torchvision's, and those that were registered in this
# process with torch.library.custom_op. Not those that read files.
LIBRARIES = ("aten", "torchvision")
FILES = ("from_file",)
WITH_A_GRAPH = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "scan")
ARITHMETIC = (
    "abs|add|and_|eq|floordiv|ge|getitem|gt|index|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow"
    "|rshift|sub|truediv|xor"
)
# What may stand in the formula of a size, beside symbols (s0, u1) and numbers.
FUNCTIONS = (
    "Abs|Add|And|CeilDiv|CleanDiv|Eq|False|FloatPow|FloatTrueDiv|FloorDiv|Ge|Gt|IntTrueDiv|Integer"
    "|Le|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Pow|PowByNatural|PythonMod|Rational"
    "|RoundToInt|ToFloat|True|TruncToInt|Where|ceiling|floor|int_oo|oo"
)
STRUCTURES = (
    *(None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"),
)
SYMBOL = re.compile(r"Symbol\('([a-z]{1,2}\d+)'(?:, [a-z_]+=(?:True|False))*\)")


class FormatError(ValueError):
    """The folder does not hold what this loader reads."""


def checked(content: bytes, *, hollow: bool = False) -> bytes:
    """The same archive, made anew of what was checked.

    Args:
        content: of a ``.pt2`` file.
        hollow: one whose weights were left out, see :func:`hollowed`.

    Raises:
        FormatError: for a damaged archive, and for anything in it but operations and tensors.
    """
    root, parts = _read(content)
    for name, part in parts.items():
        if name == "data/sample_inputs/model.pt" and part:
            raise FormatError("model.pt2 holds sample inputs, which are a pickle")
    for config in CONFIGS:
        _check_tensors(parts, config, hollow)
    _check_program(_json(parts, "models/model.json"))
    return _written(root, parts)


def hollowed(content: bytes) -> bytes:
    """The archive without the numbers of its weights, which torch then reads as 0."""
    root, parts = _read(content)
    return _written(
        root, {name: b"" if re.fullmatch(TENSOR, name) else part for name, part in parts.items()}
    )


def _read(content: bytes) -> tuple[str, dict[str, bytes]]:
    parts: dict[str, bytes] = {}
    roots = set()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                root, _, name = entry.filename.partition("/")
                if not MEMBERS.fullmatch(name) or name in parts:
                    raise FormatError(
                        f"model.pt2 holds {entry.filename!r}, which no network that was saved here "
                        "has: pickles, libraries and other files are not read"
                    )
                # Stored as they are: what a part says of its size cannot exceed the file.
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(content):
                    raise FormatError(f"model.pt2 is damaged: {entry.filename!r} is no stored part")
                roots.add(root)
                parts[name] = archive.read(entry)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise FormatError(f"model.pt2 is damaged: {error}") from error
    for name in ("models/model.json", "data/sample_inputs/model.pt", *CONFIGS):
        if name not in parts:
            raise FormatError(f"model.pt2 is no exported network: {name} is missing")
    if len(roots) != 1:
        raise FormatError("model.pt2 is no exported network: it has several folders")
    return roots.pop(), parts


def _written(root: str, parts: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), part)
    return made.getvalue()


def _json(parts: Mapping[str, bytes], name: str) -> Any:
    try:
        return json.loads(parts[name])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"model.pt2 is damaged: {name} is not valid JSON: {error}") from error


def _check_tensors(parts: Mapping[str, bytes], config: str, hollow: bool) -> None:
    folder, numbers = config.rpartition("/")[0], 0
    try:
        for name, entry in _json(parts, config)["config"].items():
            place = f"{folder}/{entry['path_name']}"
            if entry["use_pickle"] or not re.fullmatch(TENSOR, place) or place not in parts:
                raise FormatError(f"model.pt2 holds {name!r} as a pickle, which is not read")
            if not parts[place]:  # torch makes as many zeros as are declared
                numbers += math.prod(size["as_int"] for size in entry["tensor_meta"]["sizes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"model.pt2 is damaged: {config} does not say what it should") from error
    if numbers > (MOST_NUMBERS if hollow else 0):
        raise FormatError(f"model.pt2 is damaged: {numbers} numbers of its tensors are missing")


# -- the operations --------------------------------------------------------------------------------


def _check_program(program: Any) -> None:
    """Every text in the program is of the kind that its place asks for."""
    if not isinstance(program, dict) or "graph_module" not in program:
        raise FormatError("model.pt2 is damaged: model.json does not describe a network")
    try:
        _check_text(program, "")
    except RecursionError as error:
        raise FormatError("model.pt2 is damaged: model.json is nested too deeply") from error


def _check_text(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            if name in EMPTY and part:
                raise FormatError(f"model.pt2 holds {EMPTY[name]}, which is not read")
            if not re.fullmatch(r"[\w.]*", name):
                _formula(name)
            _check_text(part, name)
    elif isinstance(value, list):
        for part in value:
            _check_text(part, place)
    elif isinstance(value, str):
        KINDS.get(place, _names)(value)


def _refused(what: str, value: str) -> FormatError:
    return FormatError(f"model.pt2 names {what} {value[:80]!r}, which is not read")


def _names(value: str) -> None:
    if not re.fullmatch(r"[\w.]*", value):
        raise _refused("something called", value)


def _identifier(value: str) -> None:
    if value and not value.isidentifier():
        raise _refused("something called", value)


def _formula(value: str) -> None:
    """A size, which torch evaluates: sums and products of numbers, symbols and listed functions."""
    plain = SYMBOL.sub(r"\1", value)
    if not re.fullmatch(r"(?:[\w+\-*/%(),<>=&|~ ]|(?<=\d)\.(?=\d))*", plain) or any(
        not re.fullmatch(rf"{FUNCTIONS}|[a-z]{{1,2}}\d+", word)
        for word in re.findall(r"[A-Za-z_]\w*", plain)
    ):
        raise _refused("a size", value)


def _operation(value: str) -> None:
    library, _, rest = value.partition(".")
    if library == "_operator" and re.fullmatch(ARITHMETIC, rest):
        return
    if library == "math" and re.fullmatch(r"[a-z]\w*", rest):
        return
    if library == "torch" and re.fullmatch(r"_?sym_\w+", rest):
        return
    if re.fullmatch(r"torch\.ops\.higher_order\.\w+", value):
        if value.rpartition(".")[2] in WITH_A_GRAPH:
            return
    elif re.fullmatch(r"torch\.ops\.\w+\.\w+\.\w+", value):
        namespace, name, overload = value.split(".")[2:]
        known = namespace in LIBRARIES or f"{namespace}::{name}" in _registered()
        if known and name not in FILES:
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if isinstance(getattr(packet, overload, None), torch._ops.OpOverload):
                return
    raise FormatError(
        f"model.pt2 names the operation {value[:80]!r}: it is neither one of torch's that are "
        "read, nor registered here with torch.library.custom_op"
    )


def _registered() -> Iterable[str]:
    from torch._library.custom_ops import OPDEFS

    return OPDEFS.keys()


def _structure(value: str) -> None:
    """How inputs and outputs are nested: tuples, lists and dictionaries only."""

    def check(tree: Any) -> None:
        if tree["type"] not in STRUCTURES:
            raise _refused("a structure of type", str(tree["type"]))
        for name in json.loads(tree["context"] or "null") or ():
            if not isinstance(name, int):
                _identifier(name)
        for child in tree["children_spec"]:
            check(child)

    if not value:
        return
    try:
        _, tree = json.loads(value)
        check(tree)
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError("model.pt2 is damaged: the structure of its inputs is unclear") from error


def _anything(value: str) -> None:
    """A text that an operation takes, such as a mode: it stays a text."""


KINDS: dict[str, Callable[[str], None]] = {
    "name": _identifier,
    "forward_arg_names": _identifier,
    "target": _operation,
    "as_operator": _operation,
    "expr_str": _formula,
    "in_spec": _structure,
    "out_spec": _structure,
    "as_string": _anything,
    "as_strings": _anything,
    "torch_version": _anything,
}
EMPTY = {
    "guards_code": "Python expressions",
    "metadata": "notes on its operations",
    "custom_obj_values": "objects",
    "as_custom_obj": "objects",
    "custom_obj": "objects",
    "treespec_namedtuple_fields": "named tuples",
}
