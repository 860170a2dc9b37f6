"""Work that may hang, in threads, or crash, in processes: what happens to one job, no other job notices."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, TypeVar

from mutoscope.workers import follow_parent, worker_context

J = TypeVar("J")
R = TypeVar("R")
Alive = Callable[..., None]
"""For a job to call as it gets on; an argument is news of it, for whoever supervises."""


@dataclass(frozen=True)
class Lost:
    """In the place of a job's result: the job hung, or crashed its process."""

    reason: str


def in_threads(work: Callable[[J], R], jobs: Sequence[J], threads: int, timeout: float) -> Iterator[tuple[J, R | Lost]]:
    """What `work` makes of each job, as they finish.

    A job that takes longer than `timeout` seconds is lost; its thread, which can't be stopped, is left to itself, and
    another takes its place. Raises what `work` raises.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, R | Exception]] = queue.SimpleQueue()
    begun: dict[int, float] = {}  # Who takes a job out of here, its thread or the watch below, tells its result.

    def serve() -> None:
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            begun[number] = time.monotonic()
            result: R | Exception
            try:
                result = work(jobs[number])
            except Exception as error:
                result = error
            if begun.pop(number, None) is None:
                return
            done.put((number, result))

    for number in range(len(jobs)):
        todo.put(number)
    start = lambda: threading.Thread(target=serve, daemon=True).start()
    for _ in range(min(threads, len(jobs))):
        start()
    left = len(jobs)
    try:
        while left:
            try:
                number, result = done.get(timeout=min(1.0, timeout))
            except queue.Empty:
                for number, since in list(begun.items()):
                    if time.monotonic() - since > timeout and begun.pop(number, None) is not None:
                        start()
                        left -= 1
                        yield jobs[number], Lost(f"given up after {timeout:g} seconds")
                continue
            if isinstance(result, Exception):
                raise result
            left -= 1
            yield jobs[number], result
    finally:
        with suppress(queue.Empty):  # Left early: let the threads end.
            while True:
                todo.get_nowait()


def supervise(
    work: Callable[[J, Alive], R],
    jobs: Sequence[J],
    workers: int,
    timeout: float,
    on_news: Callable[[Any], None] = lambda news: None,
) -> Generator[tuple[J, R | Lost]]:
    """What `work` makes of each job, as they finish, in as many processes (spawned; at least one).

    on_news: called in this process with what a job tells of itself by `Alive`.

    A job that crashes its process, or gives no sign of life for `timeout` seconds, is lost, and a new process goes on
    with the others. When the caller stops, by Ctrl-C or otherwise, the processes are killed at once. Raises
    RuntimeError, with the traceback, for what `work` raises.
    """
    waiting = list(reversed(jobs))
    staff: dict[connection.Connection, _Worker] = {}
    try:
        while waiting or staff:
            unborn = sum(worker.job is None for worker in staff.values())
            slots = {worker.slot for worker in staff.values()}
            free = [slot for slot in range(max(workers, 1)) if slot not in slots]
            for slot in free[: max(len(waiting) - unborn, 0)]:
                worker = _Worker(work, slot)
                staff[worker.pipe] = worker
            for pipe in connection.wait(list(staff), timeout=min(1.0, timeout)):
                assert isinstance(pipe, connection.Connection)
                worker = staff[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):  # It may have died in the midst of a message.
                    del staff[pipe]
                    yield worker.job, Lost(worker.how_it_died())
                    continue
                worker.since = time.monotonic()
                if isinstance(message, _Raised):
                    raise RuntimeError(f"in a worker process:\n{message.trace}")
                if isinstance(message, _News):
                    on_news(message.news)
                if isinstance(message, _Done):
                    job, worker.job = worker.job, None
                    yield job, message.result
                if worker.job is None and waiting:
                    worker.give(waiting.pop())
                elif worker.job is None:
                    worker.end()
                    del staff[pipe]
            for pipe, worker in list(staff.items()):
                if worker.job is not None and time.monotonic() - worker.since > timeout and not pipe.poll():
                    worker.end()
                    del staff[pipe]
                    yield worker.job, Lost(f"given up after {timeout:g} seconds without a sign of life")
    finally:
        for worker in staff.values():
            worker.end()


@dataclass(frozen=True)
class _Done:
    result: Any


@dataclass(frozen=True)
class _News:
    news: Any


@dataclass(frozen=True)
class _Raised:
    trace: str


class _Worker:
    """A process and what it works on."""

    def __init__(self, work: Callable[[Any, Alive], Any], slot: int) -> None:
        context = worker_context()
        self.slot = slot
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True, name=f"{_SLOT}{slot}")
        # Interrupted half-way, it would be a process that nobody knows and ends.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.job: Any = None
        self.since = time.monotonic()

    def give(self, job: Any) -> None:
        self.job, self.since = job, time.monotonic()
        with suppress(BrokenPipeError):  # It has died; that is seen when it is asked for the result.
            self.pipe.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def how_it_died(self) -> str:
        """Raises RuntimeError where it never came to work."""
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        reason = f"exit code {code}" if code >= 0 else f"{signal.strsignal(-code)} (signal {-code})"
        if self.job is None:
            raise RuntimeError(f"a worker process ended before it began to work: {reason}")
        return f"the process that worked on it died: {reason}" + ("; out of memory?" if code == -signal.SIGKILL else "")


_SLOT = "worker-"


def slot() -> int:
    """Within a job: which of the `workers` processes this is, from 0. Where one has died, another takes its number."""
    name = multiprocessing.current_process().name
    return int(name.removeprefix(_SLOT)) if name.startswith(_SLOT) else 0


def _serve(work: Callable[[Any, Alive], Any], pipe: connection.Connection) -> None:
    """The life of a worker process."""
    follow_parent()
    last = time.monotonic()
    pipe.send(None)  # A sign of life: the imports are done.

    def alive(news: object = None, /) -> None:
        nonlocal last
        if news is not None or time.monotonic() - last > 0.1:
            last = time.monotonic()
            pipe.send(None if news is None else _News(news))

    while True:
        try:
            job = pipe.recv()
        except EOFError:  # The parent has ended.
            return
        try:
            pipe.send(_Done(work(job, alive)))
        except Exception:  # whatever a job raises, the parent raises with this traceback
            pipe.send(_Raised(traceback.format_exc()))
