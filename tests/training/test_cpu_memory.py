"""Memory that was freed is taken again, in place of new pages from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from mutoscope.training.cpu_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
step = lambda: [torch.ones(2_000_000) for _ in range(20)]  # 20 × 8 MB: what a step makes and frees again
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept() -> None:
    """In processes of their own: there is no way back."""
    run = lambda how: subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    kept, given_back = (int(run(how).stdout) for how in ("kept", "given back"))
    assert kept < 1000 < given_back
