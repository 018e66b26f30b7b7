"""Calls in other processes: results, errors, deaths, and signals."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from pyro_sparse.runs.parallel import Failed, call_in_processes

pytestmark = pytest.mark.slow  # every process imports torch and Pyro


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """A new process finds the functions of this file by its module's name."""
    folder = Path(__file__).parents[__name__.count(".")]
    monkeypatch.syspath_prepend(folder)


def square(number, folder=None):
    if folder is not None:
        (folder / str(os.getpid())).touch()
    return number**2, torch.get_num_threads()


def troubled(kind):
    if kind == "error":
        raise FloatingPointError("not finite any more")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return kind


def slow(folder, index):
    (folder / str(index)).touch()
    time.sleep(60)


def test_results_of_all_calls(tmp_path):
    found = dict(call_in_processes(square, [(n, tmp_path) for n in range(3)], jobs=2))
    assert found == {n: (n**2, 1) for n in range(3)}
    assert len(list(tmp_path.iterdir())) == 3  # a process each


def test_what_fails_stops_no_other_call():
    found = dict(call_in_processes(troubled, [("error",), ("killed",), ("well",)], jobs=3))
    assert found.pop(2) == "well"
    assert all(isinstance(outcome, Failed) for outcome in found.values())
    assert str(found[0]) == "FloatingPointError: not finite any more"
    assert str(found[1]) == "its process was ended by signal 9"


def test_ctrl_c_stops_all_of_them(tmp_path):
    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(call_in_processes(slow, [(tmp_path, n) for n in range(3)], jobs=2))
    assert time.monotonic() - began < 50
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}  # the third never began
