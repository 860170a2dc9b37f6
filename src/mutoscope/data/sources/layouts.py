"""Where clips lie on disk: one function per layout, each from a set of clips to a list of `Clip`.

A new layout is a new function here, a line in `_function` and, so that it is found, one in `detect.py`. What each
looks like is in docs/data-layouts.md.
"""

from __future__ import annotations

import gc
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mutoscope.data import flying_mnist as mnist
from mutoscope.data.flying_mnist import FLYING_MNIST, Split
from mutoscope.data.media import IMAGES as IMAGES
from mutoscope.data.media import VIDEOS as VIDEOS
from mutoscope.data.media import Media, is_url
from mutoscope.data.sources import tables
from mutoscope.data.sources.detect import LOOKED_FOR, check_options, detect, find_line_files, find_tables
from mutoscope.data.sources.folder import Folder
from mutoscope.data.sources.splits import cut_from, split_by_hash
from mutoscope.data.sources.tables import PLAIN, SPLIT_NAMES, SplitName
from mutoscope.errors import listed
from mutoscope.hub import local_root
from mutoscope.recipe import ClipSet, Data

MEDIA = VIDEOS | IMAGES
_SUFFIXES = " ".join(sorted(MEDIA))
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video or image, or a part of one, and what is known about it."""

    id: str
    """Unique in its data set and stable: for a file, its path below the root, without suffix."""
    media: Media
    """Where its bytes are; of a clip drawn in memory, flying-mnist://PRESET/SPLIT/INDEX."""
    split: Split
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Captions by kind, one or more of each; the plain kind is "caption"."""
    label: int | None = None
    """Class index."""
    start: float = 0.0
    """Where the clip begins, in seconds from the first frame."""
    end: float | None = None
    """Where it ends; None at the end of the file."""
    embeddings: str | None = None
    """A file with its caption's embeddings, where the data set brings them (Cosmos: t5_xxl/*.pickle)."""
    set: int = 0
    """Which of `Data.sets` it is from."""

    @property
    def path(self) -> str:
        """Its media's name, for messages."""
        return str(self.media)


def list_data(data: Data) -> list[Clip]:
    """All clips of all of `Data.sets`, set by set, sorted by id within each. Ids of set k > 0 begin with "k:".
    A set's id_token is put in where a caption is drawn (captions.py), so that a template has it once.

    Raises ValueError as `list_clips`, and where an id of the first set is taken for one of another.
    """
    clips = list_clips(data, data.val_fraction)
    for k, clip_set in enumerate(data.mix, 1):
        clips += [replace(clip, id=f"{k}:{clip.id}", set=k) for clip in list_clips(clip_set, data.val_fraction)]
    twice = [clip_id for clip_id, count in Counter(clip.id for clip in clips).items() if count > 1]
    if twice:
        raise ValueError(f"data.root={data.root}: ids there look like those of data.mix, which begin with the number "
                         f"of the set; rename {len(twice)}:{listed(twice)}")  # fmt: skip
    return clips


def list_clips(clip_set: ClipSet, val_fraction: float = 0.05) -> list[Clip]:
    """All clips of both splits, sorted by id.

    Where the data set has no val part, a share is held out by a hash of the ids, or, of clips that are parts of a film,
    of the film. A test part is the val part where there is no other, and else left out.

    Raises ValueError where the root does not fit the layout, and for all that is wrong with what lies in it, together:
    missing files, duplicate ids, empty captions, counts that do not match, bad labels and times. FileNotFoundError for
    a data set on the Hugging Face Hub that can't be had.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction={val_fraction} must lie in [0, 1)")
    clip_set = replace(clip_set, root=local_root(clip_set.root))
    with rare_collections():
        layout = detect(clip_set) if clip_set.layout == "auto" else clip_set.layout
        check_options(clip_set, layout)
        return _function(layout)(clip_set, val_fraction)


def _function(layout: str) -> Callable[[ClipSet, float], list[Clip]]:
    from mutoscope.data.sources import archives  # Which itself makes clips.

    return {
        "split_folders": split_folders,
        "captioned_folder": captioned_folder,
        "line_paired": line_paired,
        "table": table,
        "cosmos": cosmos,
        "webdataset": archives.webdataset,
        "parquet": archives.parquet_videos,
        "arrow": archives.arrow_dataset,
        "flying_mnist": flying_mnist,
    }[layout]


def split_folders(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """ROOT/train/**/*.mp4 and ROOT/val/**/*.mp4 (or validation, or test). Captions (same-named .txt) and labels
    ({"label": 3} in a same-named .json) are optional."""
    found = _Found(clip_set.root)
    for name in sorted(found.folder.names()):
        if name in SPLIT_NAMES:
            files = found.folder.files(found.faults, name)
            found.add_files(files, set(files), SPLIT_NAMES[name])
    if not any(split == "train" for split, _ in found.clips.values()) and not found.faults:
        raise ValueError(f"data.root={clip_set.root}: layout split_folders wants videos or images in "
                         f"{found.folder.path('train')}; there is none ({_SUFFIXES})")  # fmt: skip
    return found.settled(val_fraction)


def captioned_folder(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """ROOT/**/*.mp4, each with its caption in a same-named .txt, or none with any; labels as in `split_folders`."""
    found = _Found(clip_set.root)
    files = found.folder.files(found.faults)
    found.add_files(files, set(files))
    if not found.clips and not found.faults:
        raise ValueError(f"data.root={clip_set.root}: no video or image in this folder or below it ({_SUFFIXES}), and "
                         f"nothing that tells of another layout: {LOOKED_FOR}")  # fmt: skip
    found.check_captions()
    return found.settled(val_fraction)


def cosmos(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """ROOT/videos/*.mp4 with captions in ROOT/metas/*.txt or .json, for all or for none. Embeddings in
    ROOT/t5_xxl/*.pickle are noted and never opened: a pickle runs what code it likes."""
    found = _Found(clip_set.root)
    videos, metas, pickles = (found.folder.files(found.faults, name) for name in ("videos", "metas", "t5_xxl"))
    stems = {_stem(name).removeprefix("videos/") for name in videos if _is_media(name)}
    if not stems and not found.faults:
        raise ValueError(f"data.root={clip_set.root}: layout cosmos wants videos in {found.folder.path('videos')}; "
                         f"there is none ({_SUFFIXES})")  # fmt: skip
    beside = lambda stem: f"metas/{stem.removeprefix('videos/')}"
    found.add_files(videos, set(metas), beside=beside)
    found.check_captions(beside)
    for name in pickles:
        clip_id = f"videos/{_stem(name).removeprefix('t5_xxl/')}"
        if name.endswith(".pickle") and clip_id in found.clips:
            split, clip = found.clips[clip_id]
            found.clips[clip_id] = (split, replace(clip, embeddings=found.folder.path(name)))
    for name in metas:
        if name.endswith((".txt", ".json")) and _stem(name).removeprefix("metas/") not in stems:
            path = found.folder.path(name)
            found.faults.append(f"{path}: no video of this name in videos/; add it, or remove this file")
    return found.settled(val_fraction)


def line_paired(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """ROOT/prompts.txt and ROOT/videos.txt: line n of the one is the caption of the video in line n of the other, whose
    path is relative to ROOT. Blank lines at the end do not count."""
    found = _Found(clip_set.root)
    paths = [found.folder.path(name) for name in find_line_files(clip_set, found.folder)]
    read = [found.attempt("", _lines, path) for path in paths]
    captions, videos = ([] if lines is None else lines for lines in read)
    if None not in read and len(captions) != len(videos):
        found.faults.append(f"{paths[0]} has {len(captions)} lines, {paths[1]} {len(videos)}: line n of the one must "
                            "be the caption of the video in line n of the other")  # fmt: skip
    if not found.faults and not videos:
        found.faults.append(f"{paths[1]}: no line with a clip")
    for path, lines in zip(paths, (captions, videos), strict=True):
        blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
        found.faults += [f"{path}, line {n}: blank; write it, or remove the line in both files" for n in blank]
    for number, (caption, video) in enumerate(zip(captions, videos, strict=False), 1):
        if video.strip():
            where = f"{paths[1]}, line {number}"
            if place := found.attempt(where, found.locate, video):
                media = Media(place[0])
                captioned: dict[str, tuple[str, ...]] = {PLAIN: (caption.strip(),)}
                found.add(where, Clip(id=_stem(place[1]), media=media, split="train", captions=captioned))
    return found.settled(val_fraction)


def table(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """A CSV, TSV, JSONL, JSON or Parquet file with a row for each clip, whose path is relative to ROOT; ROOT may be the
    file itself. Columns of fixed names, as one likes: id, split, label, start, end.

    A row with start or end is a part of its file, and has the id FILE#START-END where there is no column id.
    """
    folder, files = find_tables(clip_set)
    found = _Found(folder)
    for name, below, split in files:
        _add_rows(found, name, below, split, clip_set)
    return found.settled(val_fraction)


def flying_mnist(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """The clips of flying-mnist://PRESET, which are drawn when they are read, in its own splits. Label: the digit,
    where there is one."""
    root = clip_set.root
    if not root.startswith(FLYING_MNIST):
        raise ValueError(f"data.root={root}: layout flying_mnist needs {FLYING_MNIST}PRESET")
    preset = mnist.preset_named(root.removeprefix(FLYING_MNIST))
    clips = []
    split: Split
    for split in ("train", "val"):
        for index in range(preset.count(split)):
            digits = mnist.plan(preset, split, index)
            clip_id = f"{split}/{index:05d}"
            media = Media(f"{FLYING_MNIST}{preset.name}/{clip_id}")
            captions: dict[str, tuple[str, ...]] = {PLAIN: (mnist.caption_of(digits),)}
            clips.append(Clip(id=clip_id, media=media, split=split, captions=captions, label=mnist.label_of(digits)))
    return clips


def settle(
    root: str,
    clips: Mapping[str, tuple[SplitName | None, Clip]],
    val_fraction: float,
    films: Mapping[str, str] | None = None,
) -> list[Clip]:
    """Clips by id, with the split that each is said to be of, as `list_clips` gives them: sorted, each in its split.
    films: as in `split_by_hash`."""
    splits = {split for split, _ in clips.values()}
    held_out = "val" if "val" in splits else "test"
    rest = [i for i, (split, _) in clips.items() if split not in ("val", "test")]
    if not rest:
        raise ValueError(f"data.root={root}: no clip to train on: all are of split val or test")
    placed = split_by_hash(rest, 0.0 if held_out in splits else val_fraction, films)
    placed |= {i: "val" for i, (split, _) in clips.items() if split == held_out}
    return [clips[i][1] if placed[i] == "train" else replace(clips[i][1], split="val") for i in sorted(placed)]


def refuse(root: str, faults: Sequence[str]) -> None:
    """Raises ValueError with the first ten faults of what lies at a root, and how many there are, if there is any."""
    if faults:
        count = f"{len(faults)} faults:{listed(faults)}" if len(faults) > 1 else faults[0]
        raise ValueError(f"data.root={root}: {count}")


class _Found:
    """The clips that a layout finds below a root, and all that is wrong with them."""

    def __init__(self, root: str) -> None:
        self.root, self.folder = root, Folder(root)
        self.faults: list[str] = []
        self.clips: dict[str, tuple[SplitName | None, Clip]] = {}
        self.where: dict[str, str] = {}
        """Which line or file each is from."""

    def attempt(self, where: str, read: Callable[..., T], *values: object) -> T | None:
        """What `read` makes of the values; where it raises ValueError, None and a fault more."""
        try:
            return read(*values)
        except ValueError as error:
            self.faults.append(f"{where}: {error}" if where else str(error))
            return None

    def locate(self, cell: object, below: str = "") -> tuple[str, str]:
        """As `Folder.find`, of what a cell says."""
        name = tables.read_string(cell, "a video's path").strip()
        if not name:
            raise ValueError("no video")
        return self.folder.find(name, below)

    def add(self, where: str, clip: Clip, split: SplitName | None = None) -> None:
        if (other := self.where.get(clip.id)) is None:
            self.where[clip.id], self.clips[clip.id] = where, (split, clip)
        else:
            self.faults.append(f"{where}: the id {clip.id} is that of {other} too; rename a file, or give each row "
                               "of a table its own in a column id")  # fmt: skip

    def add_files(
        self,
        names: Iterable[str],
        texts: Set[str],
        split: SplitName | None = None,
        beside: Callable[[str], str] = lambda stem: stem,
    ) -> None:
        """The videos and images among the names, with what the .txt and .json say that are called like them, after
        `beside`."""
        for name in filter(_is_media, names):
            path, stem = self.folder.path(name), _stem(name)
            captions: dict[str, tuple[str, ...]] = {}
            label = None
            if (facts := f"{beside(stem)}.json") in texts:
                captions, label = self.attempt("", tables.read_facts_file, self.folder.path(facts)) or ({}, None)
            if (text := f"{beside(stem)}.txt") in texts:
                captions = captions | {PLAIN: self.attempt("", tables.read_caption_file, self.folder.path(text)) or ()}
            self.attempt(repr(path), tables.read_string, stem, "a file's name")
            self.add(path, Clip(id=stem, media=Media(path), split="train", captions=captions, label=label), split)

    def check_captions(self, beside: Callable[[str], str] = lambda stem: stem) -> None:
        """Captions are for all clips or for none."""
        silent = [clip for _, clip in self.clips.values() if not clip.captions]
        if len(silent) < len(self.clips):
            for clip in silent:
                text = self.folder.path(f"{beside(clip.id)}.txt")
                self.faults.append(f"{clip.path}: no caption; put it into {text}, or let no clip have one")

    def settled(self, val_fraction: float) -> list[Clip]:
        """As `settle`. Raises ValueError with all that is wrong."""
        made = ({} if is_url(self.folder.root) else self.attempt("", cut_from, self.folder.root)) or {}
        refuse(self.root, self.faults)
        parted = {clip.media for _, clip in self.clips.values() if clip.start or clip.end is not None}
        films = {}
        for clip_id, (_, clip) in self.clips.items() if made or parted else ():
            file = _stem(clip.media.path.removeprefix(f"{self.folder.root}/"))
            if file in made or clip.media in parted:
                films[clip_id] = made.get(file, file)
        return settle(self.root, self.clips, val_fraction, films)


def _add_rows(found: _Found, name: str, below: str, split: SplitName | None, clip_set: ClipSet) -> None:
    """The clips in a table, whose paths are relative to a folder below the root."""
    path = found.folder.path(name)
    rows = list(tables.rows(path, found.faults))
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not rows:
        if not found.faults:
            found.faults.append(f"{path}: no row with a clip")
        return
    try:
        video = tables.find_column(columns, clip_set.video_column, tables.VIDEOS, "video_column")
        kinds = tables.caption_columns(columns, clip_set.caption_columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if video is None:
        raise ValueError(f"{path}: no column for videos: looked for {', '.join(tables.VIDEOS)}, there is "
                         f"{tables.name_some(columns)}; name it by data.video_column")  # fmt: skip
    own_id, own_split, label, start, end = (
        tables.find_column(columns, None, (name,), "") or "" for name in ("id", "split", "label", "start", "end")
    )
    for number, row in rows:
        where = f"{path}, {number}"
        captions = found.attempt(where, tables.read_kinds, row, kinds) or {}
        part = found.attempt(where, tables.read_part, row.get(start), row.get(end)) if start or end else None
        clip_label = found.attempt(where, tables.read_label, row.get(label)) if label else None
        clip_split = found.attempt(where, tables.read_split, row.get(own_split)) if own_split else split
        place = found.attempt(where, found.locate, row.get(video), below)
        if place is None:
            continue
        part = part or (0.0, None)
        clip_id = _stem(place[1]) + _name_part(*part)
        if own_id:
            clip_id = found.attempt(where, tables.read_id, row.get(own_id)) or clip_id
        clip = Clip(id=clip_id, media=Media(place[0]), split="train", captions=captions, label=clip_label,
                    start=part[0], end=part[1])  # fmt: skip
        found.add(where, clip, clip_split)


def _name_part(start: float, end: float | None) -> str:
    """What the id of a part of a file ends in; nothing for all of it."""
    if not start and end is None:
        return ""
    return "#" + "-".join("" if time is None else f"{time:.3f}".rstrip("0").rstrip(".") for time in (start, end))


@contextmanager
def rare_collections() -> Iterator[None]:
    """With the garbage collector at work once in a million new objects. What is listed is no garbage, and to look at a
    growing list again and again takes as long as the listing."""
    usual = gc.get_threshold()
    gc.set_threshold(10**6, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _lines(path: str) -> list[str]:
    return tables.lines(tables.read_text(path))


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _is_media(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in MEDIA
