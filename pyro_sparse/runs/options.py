"""What a model and a guide take: read from their constructors, so that it stands there only.

An `Option` has the name, type and default of a constructor's parameter and the first sentence that
its class's docstring says of it. ``**kwargs`` that a constructor hands on are followed up the class
hierarchy; names in a class's ``not_taken`` are parameters of a parent that mean nothing to it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pyro_sparse.names import AUTOGUIDES, nearest
from pyro_sparse.runs.zoo import ZOO, Entry

__all__ = ["Option", "Options", "guide_maker", "model_class", "of_guide", "of_model", "parse_value"]

SUPPLIED = ("likelihood", "num_data", "name", "start")
"""Parameters that a run gives, beside the network, the example and the model."""
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Option:
    """One parameter of a constructor.

    Attributes:
        name: of the parameter.
        hint: its type; None where nothing tells.
        default: what it is when not given; ``inspect.Parameter.empty`` where it must be given.
        text: what the docstring says, one sentence.
    """

    name: str
    hint: Any
    default: Any
    text: str = ""

    @property
    def has_default(self) -> bool:
        """Whether it need not be given."""
        return self.default is not inspect.Parameter.empty

    @property
    def recorded(self) -> bool:
        """Whether config.json can hold the default."""
        value = self.default
        return value is None or (
            isinstance(value, (str, int, float))
            and not (isinstance(value, float) and not math.isfinite(value))
        )


@dataclass(frozen=True)
class Options:
    """All options of a constructor.

    Attributes:
        known: by name.
        open: whether it hands unknown ones to something that nobody can read, as the function
            ``lambda model, **options: ...`` that was registered for a model does.
    """

    known: dict[str, Option]
    open: bool = False

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __contains__(self, name: object) -> bool:
        return self.open or name in self.known

    def parse(self, name: str, text: str) -> Any:
        """The value that ``text`` means for an option; ``ValueError`` says what it may be."""
        return parse_value(self.known[name].hint if name in self.known else None, text)

    def chosen(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options that are not their defaults."""
        unless = {name: one.default for name, one in self.known.items()}
        return {
            name: value
            for name, value in given.items()
            if name not in unless or value != unless[name]
        }

    def resolved(self, given: dict[str, Any]) -> dict[str, Any]:
        """What decides: the options given, and the defaults of all others, for config.json.

        Raises:
            ValueError: a value that JSON cannot hold, and that is not the default.
        """
        values = {name: one.default for name, one in self.known.items() if one.recorded}
        for name, value in given.items():
            one = self.known.get(name)
            if one is not None and not one.recorded and value == one.default:
                continue
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(
                    f"expected {name} to be a finite number, a word or a list of these, which "
                    f"config.json can hold, got {value!r}"
                ) from None
            values[name] = value
        return values


def model_class(entry: Entry) -> Any:
    """The class that an entry of the zoo names."""
    from pyro_sparse import models

    return _named(entry.model) if ":" in entry.model else getattr(models, entry.model)


def guide_maker(guide: str, model: Any) -> Any:
    """What makes the guide of a run: a class, or a function of the model.

    Args:
        guide: ``"matched"``, one of `AUTOGUIDES` or ``package.module:Class``: whatever makes a
            guide of a model, such as a function that returns one that is a function, too.
        model: the model's class.

    Raises:
        ValueError: the guide is not known, or cannot be imported.
    """
    from pyro_sparse import guides

    if guide == "matched":
        return guides.for_model.dispatch(model)
    if guide in AUTOGUIDES:
        return guides.Automatic
    if ":" in guide:
        return _named(guide)
    raise ValueError(nearest("guide", guide, ["matched", *AUTOGUIDES, "package.module:Class"]))


def of_model(entry: Entry) -> Options:
    """The options of an entry's model."""
    return _read(model_class(entry), skip=2)


def of_guide(guide: str, entry: Entry) -> Options:
    """The options of a guide for an entry's model."""
    model = model_class(entry)
    found = _read(guide_maker(guide, model), skip=1)
    if not found.open or guide != "matched":
        return found
    # A function that hands its options on, most likely to the guide of a parent.
    for parent in model.__mro__[1:]:
        inherited = _read(guide_maker(guide, parent), skip=1)
        if not inherited.open:
            return Options({**inherited.known, **found.known}, open=True)
    return found


def anywhere() -> set[str]:
    """The names of all options of the zoo's models and their own guides."""
    return {
        name for entry in ZOO.values() for name in (*of_model(entry), *of_guide("matched", entry))
    }


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"expected package.module:Class, got {path!r}: {error}") from error


def _read(made: Any, skip: int) -> Options:
    """Options of a class, or of a function that makes an instance; ``skip`` parameters are none."""
    if not inspect.isclass(made):
        returned = _evaluated(inspect.signature(made).return_annotation, made)
        own, handed_on = _parameters(made, skip, inspect.getdoc(made) or "")
        if handed_on and inspect.isclass(returned):
            inherited = _read(returned, skip)
            return Options({**inherited.known, **own}, inherited.open)
        return Options(own, handed_on)
    known: dict[str, Option] = {}
    handed_on = True
    documented = [one.__doc__ or "" for one in made.__mro__]
    without = getattr(made, "not_taken", ())
    for one in made.__mro__:
        constructor = one.__dict__.get("__init__")
        if constructor is None:
            continue
        own, handed_on = _parameters(constructor, skip + 1, *documented)
        known = {**own, **known}
        if not handed_on:
            break
    return Options({name: one for name, one in known.items() if name not in without}, handed_on)


def _parameters(
    function: Callable[..., Any], skip: int, *documented: str
) -> tuple[dict[str, Option], bool]:
    """The options that a function names, and whether it takes others."""
    found = {}
    parameters = list(inspect.signature(function).parameters.values())
    for index, one in enumerate(parameters):
        positional = one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) or one.name in SUPPLIED:
            continue
        if positional and index < skip:
            continue
        hint = _evaluated(one.annotation, function)
        if hint is None and one.default is not one.empty and one.default is not None:
            hint = type(one.default)
        found[one.name] = Option(one.name, hint, one.default, _sentence(one.name, documented))
    return found, any(one.kind == one.VAR_KEYWORD for one in parameters)


def _evaluated(annotation: Any, function: Any) -> Any:
    """A type from an annotation; None where it cannot be found."""
    if annotation is inspect.Parameter.empty:
        return None
    if isinstance(annotation, str):
        try:
            return eval(annotation, getattr(function, "__globals__", {}))
        except Exception:  # such as a name that only type checkers import
            return None
    return annotation


def _sentence(name: str, documented: Iterable[str]) -> str:
    """What the first docstring that has an entry of this name says, to its first full stop."""
    for text in documented:
        found = re.search(
            rf"^[ \t]*(?::param )?(?:\w+, )*{name}(?:, \w+)*(?: \([^)]*\))?: (.+?)"
            r"(?:[.;]\s|[.:;]?\n\s*\n|\n\s*:?\w+(?: \w+)?: |\Z)",
            text,
            re.DOTALL | re.MULTILINE,
        )
        if found:
            words = re.sub(r":\w+:`[~.]*(?:[\w.]+\.)?([^`]+)`|`+([^`]+)`+", r"\1\2", found[1])
            return " ".join(words.split()).rstrip(".")
    return ""


def parse_value(hint: Any, text: str) -> Any:
    """``text`` as the first type of ``hint`` that it can be.

    Args:
        hint: a type, a union, or a Literal; anything else takes what the text looks like.
        text: as it was given.

    Raises:
        ValueError: it can be none of them; the message says what it may be.
    """
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    choices = [one for kind in kinds for one in typing.get_args(kind) if _is_literal(kind)]
    if choices:
        for one in choices:
            if str(one) == text:
                return one
        raise ValueError(f"one of {', '.join(map(str, choices))}")
    if not set(kinds) <= {int, float, bool, str, type(None)}:
        kinds = (type(None), bool, int, float, str)
    if type(None) in kinds and text == "none":
        return None
    if bool in kinds and text in BOOLEANS:
        return BOOLEANS[text]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    raise ValueError(" or ".join(names[kind] for kind in kinds))


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal
