"""Calls in other processes: results, errors, deaths, and signals."""

import os
import signal
import subprocess
import sys
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


def slow_with_id(folder):
    (folder / f"{os.getpid()}.id").touch()
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


def test_nobody_trains_on_for_a_parent_that_was_killed(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[__name__.count('.')])!r})\n"
        "from pathlib import Path\n"
        f"import {__name__} as here\n"
        "if __name__ == '__main__':\n"
        f"    list(here.call_in_processes(here.slow_with_id, [(Path({str(tmp_path)!r}),)], 1))\n"
    )
    file = tmp_path / "script.py"
    file.write_text(script)
    parent = subprocess.Popen([sys.executable, file])
    while not (found := list(tmp_path.glob("*.id"))):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    worker = int(found[0].stem)
    for _ in range(200):  # a zombie without a parent is gone as soon as init sees it
        if not _alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on without its parent")


def _alive(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
