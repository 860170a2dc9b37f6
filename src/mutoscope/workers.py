"""What worker processes have in common."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, SpawnContext

PRELOADED = ["mutoscope.data.loader", "mutoscope.encode"]
"""What the server imports, and torch and PyAV with it."""


def worker_context() -> ForkServerContext | SpawnContext:
    """How worker processes are started: forked from a server that has imported what they need and done nothing else.

    A fork of this process would copy locks of torch's and CUDA's threads; a worker that is spawned imports torch anew,
    for one to two seconds. The server keeps the environment that it was started in, and ends with this process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def prepare_workers() -> None:
    """Start that server, which imports beside what this process does meanwhile."""
    if worker_context().get_start_method() == "forkserver":
        forkserver.ensure_running()


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
