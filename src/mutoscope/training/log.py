"""What a run says while it goes on: a progress bar, metrics.jsonl, TensorBoard, and wandb where it is asked for."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from mutoscope.run import Run

console = Console(stderr=True, highlight=False)
"""Where people read; standard output is left to results."""


class Log:
    """The log of one run, written by the main process; on the others every method does nothing."""

    def __init__(self, run: Run, name: str, steps: int, wandb: str | None, enabled: bool) -> None:
        self.run, self.enabled, self.name, self.steps = run, enabled, name, steps
        self.file: TextIO | None = None
        self.started, self.first_step, self.last = time.monotonic(), 0, (time.monotonic(), 0)
        if not enabled:
            return
        self.tensorboard = SummaryWriter(str(run.folder / "tensorboard"))
        self.wandb = _start_wandb(wandb, run) if wandb else None
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
            TimeRemainingColumn(), TextColumn("{task.fields[status]}"), console=console,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.bar = self.progress.add_task(name, total=steps, status="")

    def __enter__(self) -> Log:
        if self.enabled:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self.progress.stop()
            if self.file is not None:
                self.file.close()
            self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=0 if kind is None else 1)

    def start_at(self, step: int, samples: int) -> None:
        """Go on after optimizer step `step`, when so many training samples were taken: what was logged past it is
        forgotten, and time is measured from here."""
        self.started, self.first_step, self.last = time.monotonic(), step, (time.monotonic(), samples)
        if self.enabled:
            self.run.forget_after(step)
            self.file = open(self.run.metrics_file, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
            self.progress.update(self.bar, completed=step)

    def train(self, step: int, values: dict[str, float], samples: int) -> None:
        """Log training at optimizer step `step`, after so many samples; with throughput since the last call, and
        memory."""
        if not self.enabled:
            return
        now, (then, samples_then) = time.monotonic(), self.last
        self.last = now, samples
        rate = (samples - samples_then) / max(now - then, 1e-9)
        memory = peak_memory()
        self.scalars(step, {**values, "samples_per_second": rate, "peak_memory_gib": memory / 2**30})
        status = f"loss {values['loss']:.4f} · {rate:.1f} samples/s · {memory / 2**30:.2f} GiB"
        self.progress.update(self.bar, completed=step, status=status)
        if not console.is_terminal:
            eta = (now - self.started) / max(step - self.first_step, 1) * (self.steps - step)
            console.print(f"{self.name}  {step}/{self.steps}  {status} · ETA {int(eta) // 60}:{int(eta) % 60:02d}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers of optimizer step `step` to all logs."""
        if not self.enabled:
            return
        assert self.file is not None, "start_at comes first"
        self.file.write(json.dumps({"step": step, "seconds": time.monotonic() - self.started, **values}) + "\n")
        for key, value in values.items():
            self.tensorboard.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def ticker(self, what: str, total: int) -> Callable[[], None]:
        """For work before training: a bar on a terminal, else a line every ten seconds. Call what comes back for each
        of `total`."""
        if not self.enabled:
            return lambda: None
        bar = self.progress.add_task(what, total=total, status="")
        done, told = 0, time.monotonic()

        def tick() -> None:
            nonlocal done, told
            done += 1
            self.progress.update(bar, completed=done, visible=done < total)
            if not console.is_terminal and time.monotonic() - told > 10:
                told = time.monotonic()
                self.say(f"{what}: {done} of {total}")

        return tick

    def say(self, text: str) -> None:
        """A line for people."""
        if self.enabled:
            console.print(f"{self.name}  {text}", markup=False, soft_wrap=True)


def peak_memory() -> int:
    """Peak memory of this process so far, in bytes: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _start_wandb(project: str, run: Run) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError('recipe.wandb is set, but wandb is not installed: pip install "mutoscope[wandb]"') from None
    return wandb.init(project=project, name=run.folder.name, dir=run.folder, resume="allow")
