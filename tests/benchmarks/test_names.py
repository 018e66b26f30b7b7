"""Benchmarks take too long to run here: what they use of the package is there."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_exist(path: Path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module(f"benchmarks.{path.stem}")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = getattr(module, node.value.id, None)
            if isinstance(owner, ModuleType):
                assert hasattr(owner, node.attr), f"line {node.lineno}: {ast.unparse(node)}"
