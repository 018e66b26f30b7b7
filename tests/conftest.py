"""What every test shares: one thread, a known seed, an empty parameter store, the data folder."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Set before torch and matplotlib are imported, here and in the processes that tests start: several
# workers share few cores, and no test may need a display.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pyro_sparse.data import Dataset

torch.set_num_threads(1)


# A shell that starts its commands in the background has them ignore Ctrl-C, and so would the
# processes that tests start: those of signals need Python's own handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-root",
        default=os.environ.get("PYRO_SPARSE_DATA"),
        metavar="DIR",
        help="folder with MNIST/ and uci/, for the tests on real data "
        "(default: the environment variable PYRO_SPARSE_DATA; they are skipped without it)",
    )


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config) -> Path:
    """Folder of the data sets that are not embedded, as `--data-root` of the command line."""
    given = pytestconfig.getoption("--data-root")
    if not given:
        pytest.skip("needs data: give --data-root DIR or set PYRO_SPARSE_DATA")
    root = Path(given).resolve()
    if not root.is_dir():
        pytest.skip(f"needs data: the data root {root} is no folder")
    return root


@pytest.fixture(scope="module")
def digits() -> "Dataset":
    """The embedded digits."""
    from pyro_sparse import data

    return data.load("digits", validation=0.05)


@pytest.fixture(scope="module")
def folder(digits: "Dataset", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SS-GHS on digits: one layer of 8 units, two epochs."""
    from pyro_sparse.runs import experiment  # seconds that few tests need

    out = tmp_path_factory.mktemp("runs") / "run"
    settings = experiment.settings_for("ss-ghs", "digits", net="mlp:8", epochs=2, inclusion_lr=1e-4)
    experiment.run(settings, out, dataset=digits, progress=False)
    return out


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seed torch, NumPy and random, and let no parameter or default dtype leak between tests."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(dtype)


def _outcome(folder: Path) -> tuple[dict[str, dict], dict[str, str]]:
    tensors = {
        str(path.relative_to(folder)): {
            name: (value.dtype, tuple(value.shape), value.numpy().tobytes())
            for name, value in load_file(path).items()
            if name.startswith(("guide.", "model."))
        }
        for path in sorted(folder.rglob("*.safetensors"))
    }
    numbers = {
        str(path.relative_to(folder)): re.sub(
            r'"[a-z_]*seconds[a-z_]*": [-+.e0-9]+', "", path.read_text()
        )
        for path in sorted([*folder.rglob("*.jsonl"), *folder.rglob("*.json")])
    }
    return tensors, numbers


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], tuple[dict[str, dict], dict[str, str]]]:
    """``outcome(run folder)``: all that a run leaves but for times; bits of all parameters."""
    return _outcome
