"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mutoscope.training import saver as saver_module
from mutoscope.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, verify
from mutoscope.training.engine import Engine
from mutoscope.training.saver import Saver

ALONE = Engine(rank=0, world=1, device=torch.device("cpu"))


def test_what_changes_meanwhile_is_not_saved(tmp_path: Path) -> None:
    """And each checkpoint has its own numbers, though their copies use the same memory."""
    weight = torch.zeros(1000)
    with Saver(tmp_path, ALONE, keep_last=9, keep_every=0) as saver:
        for step in range(1, 4):
            weight.fill_(step)
            saver.save(step, {"model": {"w": weight}}, {"clips": step})
            weight.fill_(-1)
    for path in list_checkpoints(tmp_path):
        verify(path)
        found = torch.empty(1000)
        state = load_checkpoint(path, {"model": {"w": found}})
        assert state == {"step": int(path.name), "clips": int(path.name)}
        assert (found == int(path.name)).all()


def test_the_last_and_every_so_manieth_are_kept(tmp_path: Path) -> None:
    with Saver(tmp_path, ALONE, keep_last=1, keep_every=4) as saver:
        for step in range(2, 12, 2):
            saver.save(step, {"w": torch.zeros(1)}, {})
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [4, 8, 10]


def test_an_error_comes_where_somebody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills leaves the checkpoint before, and the next save tells."""
    tree = {"w": torch.zeros(1)}
    saver = Saver(tmp_path, ALONE, keep_last=2, keep_every=0)
    saver.save(1, tree, {})
    saver.wait()

    def full(*args: object, **kwargs: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    saver.save(2, tree, {})
    with pytest.raises(OSError, match="No space"):
        saver.save(3, tree, {})
    monkeypatch.setattr(saver_module, "save_checkpoint", save_checkpoint)
    saver.save(4, tree, {})
    saver.wait()
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [1, 4]
