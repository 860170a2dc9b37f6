"""SIGTERM and SIGINT ask for a stop at the end of the step. A second SIGINT, of someone who won't wait, is not caught.

A second SIGTERM is, and changes nothing: where a scheduler sends it to all processes of a job, torchrun passes on its
own as well.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopFlag:
    """The signal that asked for a stop, or 0."""

    signal_number = 0


@contextmanager
def stopping_softly() -> Iterator[StopFlag]:
    """Inside the block, SIGTERM and SIGINT set the flag; after the first of them SIGINT acts as it would without us.

    Outside the main thread, which alone may handle signals, it does nothing.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        flag.signal_number = flag.signal_number or number
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
