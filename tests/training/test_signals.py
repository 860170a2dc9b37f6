"""What a process makes of signals, one after the other."""

from __future__ import annotations

import os
import signal

import pytest

from mutoscope.training.signals import stopping_softly


def test_sigterm_twice_is_once_and_a_second_ctrl_c_is_heeded() -> None:
    """torchrun passes on what the scheduler has sent to all processes already."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopping_softly() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_number == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with stopping_softly() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal_number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_number == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
