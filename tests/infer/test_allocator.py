"""What the C library does with freed memory."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from pyro_sparse.infer.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory() and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(10_000_000)
before = faults()
for _ in range(10):
    torch.ones(10_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_pages_are_not_asked_for_again():
    def count(keep: bool) -> int:
        code = FAULTS.format(keep=keep)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert count(True) < count(False) / 4


def test_elsewhere_it_says_so(monkeypatch):
    from pyro_sparse.infer.allocator import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory.__wrapped__() is False
