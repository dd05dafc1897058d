"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

from replknet.engine.allocator import has_mallopt

FAULTS = """
import resource, torch
from replknet.engine.allocator import keep_freed_memory
keep_freed_memory()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({elements})
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def faults() -> int:
    """Page faults of the last of six tensors of 64 MiB, each freed before the next is made."""
    program = FAULTS.format(elements=2**24)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not has_mallopt(), reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    pages = 4 * 2**24 // 4096
    assert faults() < pages / 100
