"""Where clips lie on disk: one function per layout, each from a root to a list of `Clip`.

A new layout is a new function here and a line in `list_clips`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mutoscope.data import flying_mnist as mnist
from mutoscope.data.flying_mnist import FLYING_MNIST, Split
from mutoscope.randomness import seed_of


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video, or a part of one, and what is known about it."""

    id: str
    """Unique in its data set and stable: the path below the root, without suffix."""
    path: str
    """The file, or flying-mnist://PRESET/SPLIT/INDEX."""
    split: Split
    captions: dict[str, str] = field(default_factory=dict)
    """Captions by kind; the plain one is "caption"."""
    label: int | None = None
    """Class index."""
    start: float = 0.0
    """Where the clip begins, in seconds from the first frame."""
    end: float | None = None
    """Where it ends; None at the end of the file."""


def list_clips(
    root: str,
    layout: Literal["auto", "split_folders", "captioned_folder", "flying_mnist"] = "auto",
    val_fraction: float = 0.05,
) -> list[Clip]:
    """All clips of both splits, sorted by id.

    auto takes a root that starts with flying-mnist:// as such, a folder with train/ in it as split_folders and any
    other as captioned_folder. Raises ValueError where the root or what lies in it does not fit the layout.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction={val_fraction} must lie in [0, 1)")
    if layout == "auto" and not root.startswith(FLYING_MNIST):
        layout = "split_folders" if (Path(root) / "train").is_dir() else "captioned_folder"
    if layout == "split_folders":
        return split_folders(root, val_fraction)
    if layout == "captioned_folder":
        return captioned_folder(root, val_fraction)
    return flying_mnist(root)


def split_folders(root: str, val_fraction: float) -> list[Clip]:
    """ROOT/train/**/*.mp4 and ROOT/val/**/*.mp4. Captions (same-named .txt) and labels ({"label": 3} in a same-named
    .json) are optional. Without val/, a share of train/ is held out by a hash of the ids."""
    folder = _folder(root)
    train, val = _videos(folder, "train"), _videos(folder, "val")
    if not train:
        raise ValueError(f"data.root={root}: no .mp4 file in {folder / 'train'}; layout split_folders needs some there")
    split = split_by_hash(train, 0.0 if val else val_fraction)
    split |= dict.fromkeys(val, "val")
    return [_clip(i, path, split[i]) for i, path in sorted((train | val).items())]


def captioned_folder(root: str, val_fraction: float) -> list[Clip]:
    """ROOT/**/*.mp4, each with its caption in a same-named .txt, or none with any; labels as in `split_folders`.
    A share is held out by a hash of the ids."""
    videos = _videos(_folder(root), ".")
    if not videos:
        raise ValueError(f"data.root={root}: no .mp4 file in this folder or below it")
    split = split_by_hash(videos, val_fraction)
    clips = [_clip(i, path, split[i]) for i, path in sorted(videos.items())]
    silent = [c.path for c in clips if not c.captions]
    if 0 < len(silent) < len(clips):
        raise ValueError(
            f"data.root={root}: {len(silent)} of {len(clips)} clips have no caption, such as {silent[0]}; "
            f"put it into {Path(silent[0]).with_suffix('.txt')}"
        )
    return clips


def flying_mnist(root: str) -> list[Clip]:
    """The clips of flying-mnist://PRESET, which are drawn when they are read. Label: the digit, where there is one."""
    if not root.startswith(FLYING_MNIST):
        raise ValueError(f"data.root={root}: layout flying_mnist needs {FLYING_MNIST}PRESET")
    preset = mnist.preset_named(root.removeprefix(FLYING_MNIST))
    clips = []
    split: Split
    for split in ("train", "val"):
        for index in range(preset.count(split)):
            digits = mnist.plan(preset, split, index)
            clip_id = f"{split}/{index:05d}"
            captions = {"caption": mnist.caption_of(digits)}
            path = f"{FLYING_MNIST}{preset.name}/{clip_id}"
            clips.append(Clip(id=clip_id, path=path, split=split, captions=captions, label=mnist.label_of(digits)))
    return clips


def split_by_hash(ids: Iterable[str], val_fraction: float) -> dict[str, Split]:
    """The split of each id: val where the hash of the id, as a number in [0, 1), lies below `val_fraction`.

    So a clip keeps its split whatever is added beside it. Where no clip would be in val, the one of the lowest hash
    is, if there are two or more; an added clip may send that one back to train. From two clips on, none ever goes from
    train to val.
    """
    place = {i: seed_of("split", i) / 2**63 for i in ids}
    held_out = {i for i in place if place[i] < val_fraction}
    if not held_out and len(place) > 1 and val_fraction > 0:
        held_out = {min(place, key=lambda i: place[i])}
    return {i: "val" if i in held_out else "train" for i in place}


def _folder(root: str) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        kind = "not a folder" if folder.exists() else "no such folder"
        hint = f"; for clips drawn in memory write {FLYING_MNIST}PRESET" if "://" in root else ""
        raise ValueError(f"data.root={root}: {kind}{hint}")
    return folder


def _videos(root: Path, below: str) -> dict[str, Path]:
    """The mp4 files below a part of the root, by id."""
    found: dict[str, Path] = {}
    for path in sorted((root / below).rglob("*")):
        # macOS leaves a ._NAME.mp4 beside every file that it copies to a foreign disk.
        if path.suffix.lower() != ".mp4" or path.name.startswith(".") or not path.is_file():
            continue
        clip_id = path.relative_to(root).with_suffix("").as_posix()
        if clip_id in found:
            raise ValueError(f"two clips with the id {clip_id}: {found[clip_id]} and {path}; rename one")
        found[clip_id] = path
    return found


def _clip(clip_id: str, path: Path, split: Split) -> Clip:
    """The clip in a file, with what the .txt and the .json beside it say."""
    caption = _caption(path.with_suffix(".txt"))
    captions = {} if caption is None else {"caption": caption}
    return Clip(id=clip_id, path=str(path), split=split, captions=captions, label=_label(path.with_suffix(".json")))


def _caption(path: Path) -> str | None:
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save the caption as UTF-8") from error
    if not caption:
        raise ValueError(f"{path}: the caption is empty; write one, or remove the file")
    return caption


def _label(path: Path) -> int | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both.
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f'{path}: must be an object, as in {{"label": 3}}')
    label = facts.get("label")
    if label is not None and (type(label) is not int or label < 0):
        raise ValueError(f'{path}: the label must be a number from 0 on, as in {{"label": 3}}; it says {label!r:.40}')
    return label
