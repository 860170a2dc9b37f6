"""Clips that turned out broken while a run goes on without them: each told once, kept in the run, and counted."""

from __future__ import annotations

import json
from collections.abc import Iterable

from mutoscope.data.dataset import Broken
from mutoscope.run import Run
from mutoscope.training.engine import Engine
from mutoscope.training.log import Log


class Quarantine:
    """The broken clips of a run, the same on all processes."""

    def __init__(self, run: Run, limit: int, engine: Engine, log: Log) -> None:
        """limit: broken clips that the run may go on without. Clips of an earlier start of the run count, and are not
        told again."""
        self.run, self.limit, self.engine, self.log = run, limit, engine, log
        self.reasons: dict[str, str] = {}
        if run.quarantine_file.exists():
            for line in run.quarantine_file.read_text().splitlines():
                self.reasons |= {(entry := json.loads(line))["id"]: entry["reason"]}

    def add(self, found: Iterable[Broken], step: int) -> None:
        """Take in what this process has found; all processes call it together.

        Raises ValueError, on all of them, where there are now more than may be.
        """
        news = [json.dumps([b.id, b.reason]) for b in found if b.id not in self.reasons]
        if not self.engine.any(bool(news)):
            return
        fresh = {i: reason for i, reason in map(json.loads, self.engine.gather(news)) if i not in self.reasons}
        self.reasons |= fresh
        if self.engine.main and fresh:
            with open(self.run.quarantine_file, "a") as file:
                for clip, reason in fresh.items():
                    file.write(json.dumps({"step": step, "id": clip, "reason": reason}) + "\n")
            for reason in fresh.values():
                self.log.say(f"step {step}: a clip is broken and left out ({len(self.reasons)} so far): {reason}")
        if len(self.reasons) > self.limit:
            raise ValueError(
                f"{len(self.reasons)} clips are broken, data.max_broken={self.limit} may be; "
                f"{self.run.quarantine_file} lists them. Mend or remove them (`mutoscope data check` finds all) or "
                "raise data.max_broken"
            )
