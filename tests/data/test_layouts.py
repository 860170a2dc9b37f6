from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.data.flying_mnist import PRESETS, render
from mutoscope.data.layouts import Clip, list_clips, split_by_hash


def put(path: Path, caption: str | bytes | None = None, facts: object = None) -> Path:
    """A clip that is listed but never read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    if facts is not None:
        path.with_suffix(".json").write_text(json.dumps(facts))
    return path


def splits(clips: list[Clip]) -> dict[str, str]:
    return {c.id: c.split for c in clips}


def test_split_folders(tmp_path: Path) -> None:
    put(tmp_path / "train/b.mp4", "two")
    put(tmp_path / "train/cats/a.MP4", facts={"label": 3, "digits": []})
    put(tmp_path / "val/b.mp4", facts={"label": None})
    put(tmp_path / "train/._b.mp4")
    put(tmp_path / "train/notes.txt")
    clips = list_clips(str(tmp_path))
    assert clips == [
        Clip(id="train/b", path=str(tmp_path / "train/b.mp4"), split="train", captions={"caption": "two"}),
        Clip(id="train/cats/a", path=str(tmp_path / "train/cats/a.MP4"), split="train", label=3),
        Clip(id="val/b", path=str(tmp_path / "val/b.mp4"), split="val"),
    ]


def test_split_folders_without_val_hold_out_a_share(tmp_path: Path) -> None:
    for k in range(40):
        put(tmp_path / f"train/{k}.mp4")
    clips = list_clips(str(tmp_path), val_fraction=0.25)
    assert splits(clips) == split_by_hash([f"train/{k}" for k in range(40)], 0.25)
    assert {c.split for c in clips} == {"train", "val"}
    assert [c.id for c in clips] == sorted(c.id for c in clips)


def test_captioned_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", b"\xef\xbb\xbfa caf\xc3\xa9 \xf0\x9f\x8e\xac\r\n\r\n", {"label": 0})  # BOM, CRLF, emoji.
    put(tmp_path / "deep/er/b.v2.mp4", "line one\r\nline two\n")
    a, b = list_clips(str(tmp_path))
    assert (a.id, a.captions, a.label) == ("a", {"caption": "a café 🎬"}, 0)
    assert (b.id, b.captions, b.label) == ("deep/er/b.v2", {"caption": "line one\nline two"}, None)


def test_a_folder_without_any_caption_is_fine(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4"), put(tmp_path / "b.mp4")
    assert [c.captions for c in list_clips(str(tmp_path))] == [{}, {}]


@pytest.mark.parametrize(("caption", "facts", "text"), [
    (" \r\n", None, "a.txt: the caption is empty; write one, or remove the file"),
    (b"caf\xe9", None, r"a.txt: not UTF-8 \(byte 3\)"),
    ("fine", {"label": -1}, "a.json: the label must be a number from 0 on"),
    ("fine", {"label": "cat"}, "says 'cat'"),
    ("fine", {"label": True}, "says True"),
    ("fine", [3], "a.json: must be an object"),
])  # fmt: skip
def test_bad_captions_and_labels_name_the_file(caption: str | bytes, facts: object, text: str, tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", caption, facts)
    with pytest.raises(ValueError, match=text):
        list_clips(str(tmp_path))


def test_a_json_that_is_none_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4").with_suffix(".json").write_text('{"label": 3')
    with pytest.raises(ValueError, match=r"a.json: not JSON: Expecting"):
        list_clips(str(tmp_path))


def test_some_captions_missing_is_an_error_with_the_first(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", "one"), put(tmp_path / "b.mp4"), put(tmp_path / "c.mp4")
    with pytest.raises(ValueError, match=r"2 of 3 clips have no caption, such as \S+b.mp4; put it into \S+b.txt"):
        list_clips(str(tmp_path))


def test_bad_roots(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    file = put(tmp_path / "file.mp4")
    (tmp_path / "empty").mkdir()
    for root, layout, text in (
        (tmp_path / "nowhere", "auto", "nowhere: no such folder$"),
        (file, "auto", "not a folder"),
        (tmp_path, "auto", "no .mp4 file in .*train"),
        (tmp_path / "empty", "auto", "no .mp4 file in this folder or below it"),
        (tmp_path, "flying_mnist", "needs flying-mnist://PRESET"),
        ("flying_mnist://tiny", "auto", "no such folder; for clips drawn in memory write flying-mnist://PRESET"),
        ("flying-mnist://tinny", "auto", "no Flying MNIST preset 'tinny'; .*tiny"),
    ):
        with pytest.raises(ValueError, match=text):
            list_clips(str(root), layout)
    with pytest.raises(ValueError, match=r"val_fraction=1.0 must lie in \[0, 1\)"):
        list_clips(str(tmp_path), val_fraction=1.0)


def test_ids_are_unique(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4"), put(tmp_path / "a.MP4")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("the file system takes a.mp4 and a.MP4 for one")
    with pytest.raises(ValueError, match="two clips with the id a: "):
        list_clips(str(tmp_path))


def test_flying_mnist_lists_what_is_drawn() -> None:
    preset = PRESETS["tiny"]
    clips = list_clips("flying-mnist://tiny")
    assert len({c.id for c in clips}) == len(clips) == preset.train + preset.val
    assert [c.id for c in clips] == sorted(c.id for c in clips)
    clip = clips[12]
    assert (clip.id, clip.path, clip.split) == ("train/00012", "flying-mnist://tiny/train/00012", "train")
    drawn = render(preset, "train", 12)
    assert clip.captions == {"caption": drawn.caption} and clip.label == drawn.digits[0].digit


def test_the_split_is_what_it_always_was() -> None:
    """Golden: a clip that was trained on must not be validated on by a later version."""
    assert [i for i, s in split_by_hash([f"clip{k}" for k in range(40)], 0.1).items() if s == "val"] == [
        "clip5",
        "clip7",
        "clip8",
        "clip14",
    ]


def test_the_held_out_share_is_about_what_was_asked() -> None:
    for fraction in (0.05, 0.3):
        held_out = list(split_by_hash(map(str, range(4000)), fraction).values()).count("val") / 4000
        assert abs(held_out - fraction) < 0.02


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text(max_size=8), min_size=2), st.sets(st.text(max_size=8)), st.floats(0, 0.99))
def test_added_clips_move_none_into_val(some: set[str], more: set[str], fraction: float) -> None:
    before, after = split_by_hash(sorted(some), fraction), split_by_hash(sorted(some | more), fraction)
    moved = {i for i in some if before[i] != after[i]}
    assert all(before[i] == "val" for i in moved)
    assert len(moved) <= 1  # And out of it only the one that is there for want of others.
    assert ("val" in before.values()) == (fraction > 0)
