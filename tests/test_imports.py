"""No circle of imports in the package: not of modules, those that only types need included."""

import ast
import importlib
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "pyro_sparse": ROOT / "pyro_sparse",
    "pyro_sparse.models": ROOT / "models",
    "pyro_sparse.guides": ROOT / "guides",
}


def modules() -> dict[str, Path]:
    """Every file of the package, by the name that a user imports it by."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module names outside its functions."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    found.add(full if full in known else base)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & known


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that reach themselves, by strong component (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def walk(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                walk(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = set()
            while node not in component:
                component.add(stack.pop())
            if len(component) > 1 or node in graph[node]:
                found.append(component)

    for node in graph:
        if node not in index:
            walk(node)
    return found


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [{"b", "c"}, {"d"}]


def test_no_module_reaches_itself():
    known = modules()
    # The package's own face imports what is used first when it is used, and names it for types.
    del known["pyro_sparse"]
    graph = {name: imported(name, path, set(known)) for name, path in known.items()}
    assert graph["pyro_sparse.runs.cli"] >= {"pyro_sparse.runs.zoo", "pyro_sparse.names"}
    assert circles(graph) == []


def test_no_function_hides_a_module():
    """``pyro_sparse.nets.build`` cannot be a function and a file."""
    hidden = set()
    for name in modules():
        package, _, last = name.rpartition(".")
        if package and not isinstance(
            getattr(importlib.import_module(package), last, None), types.ModuleType | None
        ):
            hidden.add(name.removeprefix("pyro_sparse."))
    assert not hidden
