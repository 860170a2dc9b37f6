"""Bars of progress on stderr."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """One line of progress for each phase: how many of how many, how fast, and how long it will take."""

    def __init__(self, enabled: bool) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not enabled,
        )  # fmt: skip

    def say(self, line: str) -> None:
        """A line above the bars."""
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def start(self, what: str, total: int) -> Callable[[], None]:
        """A new line; call what comes back once for each of `total`."""
        task = self.progress.add_task(what, total=total, rate="", visible=total > 0)

        def tell() -> None:
            self.progress.advance(task)
            speed = self.progress.tasks[task].finished_speed or self.progress.tasks[task].speed
            self.progress.update(task, rate="" if speed is None else f"{speed:.1f}/s")

        return tell

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
