"""Data sets on the Hugging Face Hub, with a Hub that is a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mutoscope.data.dataset import VideoDataset
from mutoscope.data.sources.layouts import list_clips
from mutoscope.data.video import write_video
from mutoscope.hub import local_root
from mutoscope.recipe import ClipSet, Data

DISNEY = "hf://datasets/Wild-Heart/Disney-VideoGeneration-Dataset"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A Hub with the Disney set as it lies there: prompts.txt, videos.txt, videos/. What it was asked for."""
    folder = tmp_path / "snapshots" / "0123abc"
    (folder / "videos").mkdir(parents=True)
    for i in range(3):
        frames = np.random.default_rng(i).integers(0, 256, (9, 16, 16, 3), np.uint8)
        write_video(folder / f"videos/{i:05d}.mp4", frames, 8)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "prompts.txt").write_text("".join(f"A black and white sequence, number {i}.\n" for i in range(3)))
    (folder / "videos.txt").write_text("".join(f"videos/{i:05d}.mp4\n" for i in range(3)))
    asked: list[dict[str, Any]] = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_data_set_on_the_hub_is_a_folder_of_clips(asked: list[dict[str, Any]]) -> None:
    clips = list_clips(ClipSet(root=DISNEY))
    assert [clip.id for clip in clips] == ["videos/00000", "videos/00001", "videos/00002"]
    assert clips[1].captions == {"caption": ("A black and white sequence, number 1.",)}
    assert asked == [
        {
            "repository": "Wild-Heart/Disney-VideoGeneration-Dataset",
            "repo_type": "dataset",
            "revision": None,
            "allow_patterns": None,
        }
    ]
    data = VideoDataset(Data(root=DISNEY, frames=9, height=16, width=16, val_fraction=0.0), "train", seed=0)
    assert len(data) == 3


def test_revisions_and_folders(asked: list[dict[str, Any]]) -> None:
    assert local_root(f"{DISNEY}@main/videos/").endswith("0123abc/videos")
    assert asked[0]["revision"] == "main" and asked[0]["allow_patterns"] == ["videos/*"]
    assert local_root("hf://datasets/some/set.v2").endswith("0123abc")
    assert len(asked) == 2


def test_shards_on_the_hub_are_read_piece_by_piece(asked: list[dict[str, Any]]) -> None:
    for root in ("hf://datasets/some/set/data/*.tar", "hf://datasets/some/set/clips.csv", "s3://bucket/set", "clips"):
        assert local_root(root) == root
    assert asked == []


def test_without_a_network_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError) as raised:
        list_clips(ClipSet(root=DISNEY))
    assert str(raised.value) == (
        f"data.root={DISNEY}: not in the cache of the Hugging Face Hub, and the Hub can't be reached (Cannot find an "
        "appropriate cached snapshot folder); give the path of a copy on this machine"
    )
    with pytest.raises(ValueError, match="a data set on the Hugging Face Hub is hf://datasets/OWNER/NAME"):
        list_clips(ClipSet(root="hf://datasets/name"))
