"""What worker processes have in common."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext

PRELOADED = ["mutoscope.data.loader", "mutoscope.encode"]
"""What the server imports, and torch and PyAV with it."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt's, in malloc.h."""
KEPT = 2**28
"""Bytes that a worker keeps at most."""
LARGEST = 2**25
"""Bytes of a tensor up to which it is kept: the most that glibc takes."""


def worker_context() -> ForkServerContext | SpawnContext:
    """How worker processes are started: forked from a server, which is started here where it is not running yet, that
    has imported what they need and done nothing else.

    A fork of this process would copy locks of torch's and CUDA's threads; a worker that is spawned imports torch anew,
    for one to two seconds. The server imports beside whatever this process does meanwhile: call this as soon as it is
    known that there will be workers. It keeps the environment that it was started in, and ends with this process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Ctrl-C reaches all processes: none may print a traceback while it still imports. The tracker is started by hand,
    # for it would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def keep_memory(*_: object) -> None:
    """For a worker that handles one clip after the other: let malloc keep what is freed, for the next clip needs it.

    glibc gives large tensors back to the system and is given other pages for the next ones, which costs an encoding
    worker 10 to 30 % of its time. Only there; elsewhere nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, LARGEST)


def follow_parent() -> None:
    """For a worker to call first: leave Ctrl-C, which reaches all processes, to the parent, and end when it does.

    A worker that a killed job leaves behind would go on writing what the resumed job takes up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
