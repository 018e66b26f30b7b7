"""A network's forward as a graph of torch's own operations, captured by ``torch.export``.

The graph is that of eval mode, in the training IR: linear layers, convolutions, normalisations and
attention are one operation each, and sizes are numbers. It says which units there are, what they
cost and how they are removed; the network itself goes on running its own code.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_sparse.inputs import Inputs, named_tensors
from pyro_sparse.threads import ALONE

__all__ = [
    "Captured",
    "Output",
    "UntraceableError",
    "capture",
    "evaluating",
    "without_traces",
    "without_weight_norm",
]


class UntraceableError(ValueError):
    """The network's forward cannot be recorded as a graph."""


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[nn.Module]:
    """``net`` in eval mode and without gradients, every module's own mode restored afterwards."""
    with ALONE:
        modes = [(module, module.training) for module in net.modules()]
        net.eval()
        try:
            with torch.no_grad():
                yield net
        finally:
            for module, mode in modes:
                module.training = mode


# -- what comes out -------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """Which of a network's outputs the likelihood reads.

    name: of a dictionary's or a dataclass's entry, or its place in a tuple; None for the only
        tensor, or the one that is called ``logits``.
    """

    name: str | int | None = None

    def __call__(self, outputs: Any) -> Tensor:
        """The tensor among what the network has returned.

        Raises:
            ValueError: where there is none of this name, or several and no name.
        """
        if isinstance(outputs, Tensor) and self.name is None:
            return outputs
        found = named_tensors(outputs)
        if self.name is not None:
            if str(self.name) in found:
                return found[str(self.name)]
            listed = ", ".join(repr(name) for name in found) or "none"
            raise ValueError(f"the network has no output {self.name!r}; its tensors are {listed}")
        if "logits" in found:
            return found["logits"]
        floating = {name: v for name, v in found.items() if v.is_floating_point()}
        if len(floating) == 1:
            return next(iter(floating.values()))
        listed = ", ".join(repr(name) for name in found)
        raise ValueError(
            f"the network returns several tensors ({listed}): say by output= which of them the "
            "likelihood reads"
            if found
            else f"the network returns no tensor, but {type(outputs).__name__}"
        )


class _Chosen(nn.Module):
    """A network whose outputs are tensors only: all of them, or the one that is read."""

    def __init__(self, net: nn.Module, output: Output | None) -> None:
        super().__init__()
        self.net = net
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.net(*args, **kwargs)
        return self.output(outputs) if self.output else tuple(named_tensors(outputs).values())


# -- the graph -----------------------------------------------------------------------------------


@dataclass
class Captured:
    """A network's graph, in eval mode.

    graph: of torch's operations; parameters and buffers are ``get_attr`` nodes with the network's
        own names, the inputs are placeholders.
    tensors: what these nodes name. Tensors that forward makes of numbers are among them.
    inputs: with which it was captured.
    fixed: why the graph is one of this batch size only; empty where it is not.
    output: the one that the graph returns; None for all.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    inputs: Inputs
    fixed: str = ""
    output: Output | None = None

    def hollow(self, net: nn.Module) -> Captured:
        """Without the numbers of the network's tensors, which `of` puts there again."""
        own = _own_tensors(net)
        tensors = {
            name: value.detach().to("meta") if name in own else value
            for name, value in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def of(self, net: nn.Module, inputs: Inputs, output: Output | None) -> Captured | None:
        """What :func:`capture` would find of a copy of the network, where that is sure.

        The graph is the same object, and must be left as it is.
        """
        own = _own_tensors(net)
        tensors = {name: own.get(name, value) for name, value in self.tensors.items()}
        same = output == self.output and _kind(inputs) == _kind(self.inputs)
        same &= all(
            not value.is_meta and (value.shape, value.dtype) == (was.shape, was.dtype)
            for value, was in zip(tensors.values(), self.tensors.values(), strict=True)
        )
        return replace(self, tensors=tensors, inputs=inputs) if same else None


def _own_tensors(net: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(net.named_parameters(remove_duplicate=False)),
        **dict(net.named_buffers(remove_duplicate=False)),
    }


def _kind(inputs: Inputs) -> str:
    """All that a graph depends on: how tensors lie in memory, and what else there is."""
    kinds = inputs.map(lambda v: (v.shape, v.stride(), v.dtype, v.device))
    return repr((kinds.args, kinds.kwargs))


WRAPPED = "net."
ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn")


def capture(
    net: nn.Module,
    inputs: Inputs,
    output: Output | None = None,
    *,
    any_batch: bool = False,
) -> Captured:
    """Capture the forward of ``net``, which is in eval mode afterwards as before.

    Args:
        output: the output to return; all tensors among the outputs when absent.
        any_batch: for batches of any size, where the network's code allows that.

    Raises:
        ValueError: where the network does not accept the inputs.
        UntraceableError: where its forward depends on the values of tensors.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    # Torch's fused attention is one operation, of which nothing could be removed.
    torch.backends.mha.set_fastpath_enabled(False)
    # An attribute that forward sets would stay on the user's network.
    before = [(module, dict(vars(module))) for module in net.modules()]
    try:
        with evaluating(net), without_traces(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outputs = inputs.call(net)
            except Exception as error:
                raise ValueError(
                    f"{type(net).__name__} does not accept the example input of shape "
                    f"{inputs.described}: {error}"
                ) from error
            if output is not None:
                output(outputs)
            wrapped = not isinstance(outputs, Tensor)
            root = _Chosen(net, output) if wrapped else net
            program, fixed = _exported(root, net, inputs, any_batch)
            module = program.module(check_guards=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for owner, state in before:
            for name in set(vars(owner)) - set(state):
                del vars(owner)[name]
    found = _tidied(module, WRAPPED if wrapped else "", inputs, fixed)
    return replace(found, output=output)


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """An export without the lines of code behind each node, which take a fifth of its time."""
    config: Any = fx.config
    name = "do_not_emit_stack_traces"
    if not hasattr(config, name):  # of earlier versions
        yield
        return
    before = getattr(config, name)
    setattr(config, name, True)
    try:
        yield
    finally:
        setattr(config, name, before)


def _exported(
    root: nn.Module, net: nn.Module, inputs: Inputs, any_batch: bool
) -> tuple[torch.export.ExportedProgram, str]:
    def export(**more: Any) -> torch.export.ExportedProgram:
        return torch.export.export(root, inputs.args, inputs.kwargs, strict=False, **more)

    fixed = ""
    if any_batch:
        static = inputs
        # A size of 1 is always taken for a constant. Torch marks the tensors, hence copies.
        inputs = (inputs.rows([0, 0]) if inputs.batch == 1 else inputs).map(torch.clone)
        shapes = torch.export.ShapesCollection()
        for value in inputs.tensors:
            if value.ndim and len(value) == inputs.batch:
                shapes[value] = {0: torch.export.Dim.DYNAMIC}
        try:
            return export(
                dynamic_shapes=shapes.dynamic_shapes(root, inputs.args, inputs.kwargs)
            ), ""
        except Exception as error:  # whatever the network's code does with a size
            inputs = static
            fixed = f"its code needs batches of {inputs.batch}: {_first_line(error)}"
    try:
        return export(), fixed
    except Exception as error:  # whatever the network's own code does
        raise UntraceableError(
            f"torch.export cannot trace {type(net).__name__}: {_first_line(error)} (its forward "
            "must not branch or loop on values of tensors)"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _tidied(module: fx.GraphModule, prefix: str, inputs: Inputs, fixed: str) -> Captured:
    """The graph without assertions, with the network's names for its tensors."""
    graph, tensors = module.graph, {}
    _inline(module)
    graph.owning_module = None  # its nodes are renamed
    for node in list(graph.nodes):
        if any(part in str(node.target) for part in ASSERTIONS) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(changes_something)
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(owner), leaf)
            node.target = str(node.target).removeprefix(prefix)
            tensors[node.target] = value
        node.meta["prefix"] = prefix
    return Captured(graph, tensors, inputs, fixed)


def changes_something(node: fx.Node) -> bool:
    """Whether a node matters although nobody uses its output."""
    if node.op == "call_module":  # a choice of inputs, of a graph that is no module yet
        return False
    schema = getattr(node.target, "_schema", None)
    return node.is_impure() or (schema is not None and schema.is_mutable)


def _inline(module: fx.GraphModule) -> None:
    """Bodies of contexts that change nothing here: no gradients, no autocast."""
    graph = module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "_name", "") or getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in (
            "wrap_with_set_grad_enabled",
            "wrap_with_autocast",
        ):
            continue
        enabled, (body_node, *arguments) = {
            "wrap_with_set_grad_enabled": lambda a: (False, a[1:]),
            "wrap_with_autocast": lambda a: (a[2], a[4:]),
        }[name](node.args)
        if enabled:
            continue
        body = getattr(module, body_node.target)
        _inline(body)
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        mapping = dict(zip(places, arguments, strict=True))
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "get_attr":
                    flat = f"{body_node.target}_{str(inner.target).replace('.', '_')}"
                    setattr(module, flat, getattr(body, str(inner.target)))
                    mapping[inner] = graph.get_attr(flat)
                elif inner.op not in ("placeholder", "output"):
                    mapping[inner] = graph.node_copy(inner, mapping.__getitem__)
        (results,) = next(n for n in body.graph.nodes if n.op == "output").args
        results = results if isinstance(results, tuple | list) else [results]
        for user in list(node.users):
            user.replace_all_uses_with(mapping[results[user.args[1]]])
            graph.erase_node(user)
        graph.erase_node(node)
        graph.erase_node(body_node)


def without_weight_norm(net: nn.Module) -> nn.Module:
    """``net``, or a copy in which weight normalisations are plain weights.

    A weight normalisation takes any weight to any weight: a prior on the weight itself is what is
    meant. Other parametrisations restrict the weight and are left alone.
    """
    kind = nn.utils.parametrizations._WeightNorm

    def found(net: nn.Module) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Modules of which all parametrisations are weight normalisations, by tensor."""
        for module in net.modules():
            made = dict(getattr(module, "parametrizations", {}))
            if made and all(len(p) == 1 and isinstance(p[0], kind) for p in made.values()):
                yield module, made
            hooks: list[Any] = list(module._forward_pre_hooks.values())
            for hook in hooks:
                if type(hook).__name__ == "WeightNorm" and hasattr(hook, "compute_weight"):
                    yield module, {hook.name: None}

    if not any(True for _ in found(net)):
        return net
    net = copy.deepcopy(net)
    for module, names in list(found(net)):
        for name, made in names.items():
            if made is None:
                nn.utils.remove_weight_norm(module, name)
                continue
            # By hand: torch would take the property off a class that the copy shares.
            weight = getattr(module, name).detach()
            trained = any(value.requires_grad for value in made.parameters())
            del module.parametrizations[name]
            module.__dict__.setdefault("_folded", {})[name] = nn.Parameter(weight, trained)
        if "_folded" in module.__dict__:
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, weight in module.__dict__.pop("_folded").items():
                module.register_parameter(name, weight)
    return net
