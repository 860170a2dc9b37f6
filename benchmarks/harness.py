"""What the benchmarks share: two sides measured in turn in one process, a table, and the last line that tools read."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch


def compare(
    ours: Callable[[], object], peer: Callable[[], object] | None, repeats: int = 5
) -> list[tuple[float, float]]:
    """(ours, peer's) CPU seconds of each repeat, A/B/A/B after one warm-up each; the peer's are nan without it.

    CPU time, not wall time, so that other load on the machine counts little; only meaningful with one thread, because
    idle OpenMP threads spin.
    """
    torch.set_num_threads(1)
    for side in (ours, peer):
        if side is not None:
            side()
    return [(cpu_seconds(ours), cpu_seconds(peer) if peer else float("nan")) for _ in range(repeats)]


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of this process while it calls `run`."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak_memory(make: Callable[..., Callable[[], object]], *args: object) -> float:
    """MiB by which the resident memory of a fresh process grows at its peak while it calls `make(*args)()` once.

    `make` is called before the measurement starts and has to warm up what it returns, so that libraries are loaded.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (make, args))


def _growth(make: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> float:
    torch.set_num_threads(1)
    run = make(*args)
    # Not ru_maxrss: its peak would be the warm-up's or the imports'. Linux resets this one on request.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header, the first column to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells))


def timing_row(name: str, pairs: Sequence[tuple[float, float]]) -> list[str]:
    """[name, ours in ms, the peer's in ms, ratio] of what `compare` measured: medians."""
    ours, peer = (median(side) * 1e3 for side in zip(*pairs, strict=True))
    return [name, f"{ours:.1f}", f"{peer:.1f}" if peer == peer else "-", f"{peer / ours:.2f}x" if peer == peer else "-"]


def last_line(name: str, peer: str, pairs: Sequence[tuple[float, float]]) -> None:
    """``NAME: 1.83x vs PEER (median of 5, min 1.71, max 1.90)``, or that no ratio was taken."""
    ratios = [theirs / ours for ours, theirs in pairs if theirs == theirs]
    if not ratios:
        print(f"{name}: no ratio was taken; give the checkout of {peer} with --peer PATH")
    else:
        spread = f"median of {len(ratios)}, min {min(ratios):.2f}, max {max(ratios):.2f}"
        print(f"{name}: {median(ratios):.2f}x vs {peer} ({spread})")
