"""When a process stands still, it says so, and where all of them stand: most often they wait for one that is late.

A thread of each process tells a store what the process is at, and looks whether it goes on. Nothing is stopped: what
takes long may be meant to.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mutoscope.training.engine import Engine


class Watchdog:
    """Watches one process of a run."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        """folder: of the run; tracebacks go to FOLDER/stalls/rank-RANK.txt."""
        self.engine, self.seconds, self.folder = engine, engine.parallel.stall, folder
        self.name = f"rank {engine.rank} of {engine.world} ({socket.gethostname()}, pid {os.getpid()})"
        self._at = (0, "starting", time.time())
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def at(self, step: int, what: str) -> None:
        """The process has taken `step` steps and now begins with `what`."""
        self._at = (step, what, time.time())

    def _watch(self) -> None:
        store = self._store()
        told = None
        while not self._over.wait(self.seconds / 4):
            step, what, since = self._at
            if store is not None:
                store.set(f"stands {self.engine.rank}", json.dumps([self.name, *self._at]))
            if time.time() - since > self.seconds and told != since:
                told = since
                self._tell()
                # One of them tells of the others, when they have had the time to say where they are
                if store is not None and store.add(f"told {step} {what}", 1) == 1 and not self._over.wait(self.seconds):
                    _tell_of_all(store, self.engine.world)

    def _store(self) -> Store | None:
        """The one that the processes met by, over a connection of this thread's own."""
        if not dist.is_initialized():
            return None
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=self.seconds))
        return PrefixStore(f"watchdog {self.engine.meeting}", store)

    def _tell(self) -> None:
        file = self.folder / "stalls" / f"rank-{self.engine.rank}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as out:
            print(time.strftime("%F %T"), _position(json.dumps([self.name, *self._at])), file=out, flush=True)
            faulthandler.dump_traceback(out, all_threads=True)
        print(f"[{self.name}] {_position(json.dumps([self.name, *self._at]))}; tracebacks: {file}", file=sys.stderr)


def _tell_of_all(store: Store, world: int) -> None:
    lines = []
    for rank in range(world):
        key = f"stands {rank}"
        lines.append(_position(store.get(key)) if store.check([key]) else f"rank {rank}: has not started")
    print("\n".join(["where the processes stand:", *(f"  {line}" for line in lines)]), file=sys.stderr, flush=True)


def _position(said: str | bytes) -> str:
    name, step, what, since = json.loads(said)
    return f"{name}: {what} for {time.time() - since:.0f} s, after step {step}"
