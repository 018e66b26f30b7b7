"""The package as installed: its public names, its weight, its version, and what it leaves alone."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import pyro_sparse as ps

REPOSITORY = Path(__file__).resolve().parent.parent


def run_elsewhere(code, folder):
    """Run code in a fresh interpreter in another folder; its output, without the last newline."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ps.__all__)
def test_public_names_resolve(name):
    assert getattr(ps, name) is not None


@pytest.mark.parametrize("name", ["Posterior", "compact", "fit"])
def test_shortcuts_are_callable(name):
    assert callable(getattr(ps, name))  # and not the module of the same name


def test_models_and_guides_are_inside_the_package_only(tmp_path):
    code = (
        "import pyro_sparse.models, pyro_sparse.guides\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('models'), find_spec('guides'))"
    )
    assert run_elsewhere(code, tmp_path) == "None None"


def test_import_waits_for_nothing_heavy(tmp_path):
    code = (
        "import sys, pyro_sparse, pyro_sparse.runs.cli\n"
        "heavy = {'torch', 'pyro', 'lightning_fabric', 'arviz', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_elsewhere(code, tmp_path) == "[]"


def test_one_version():
    assert ps.__version__ == version("pyro-sparse")
    assert f"\nversion: {ps.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"\n## [{ps.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["experiment", "report", "settings", "zoo"])
def test_modules_that_moved_are_found_and_name_their_place(name):
    place = "terminal" if name == "report" else name
    there = importlib.import_module(f"pyro_sparse.runs.{place}")
    old = importlib.import_module(f"pyro_sparse.{name}")
    for public in there.__all__:
        with pytest.warns(DeprecationWarning, match=f"is now pyro_sparse.runs.{place}"):
            assert getattr(old, public) is getattr(there, public)


def test_the_command_line_by_its_old_name(tmp_path):
    code = "from pyro_sparse import cli, runs\nimport pyro_sparse.runs.cli\n"
    code += "print(cli.main is runs.cli.main)"
    assert run_elsewhere(code, tmp_path) == "True"
