"""Clips in shards: WebDataset tar files, Parquet files with the bytes of videos, and what datasets.save_to_disk writes.

Any clip can be read at any time, by its range of a shard: the order of training is a function of seed and epoch alone,
as it is with files. Nothing is unpacked, and nothing of a shard at a URL is fetched but its index and the clips.
"""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from mutoscope.data.media import VIDEOS, Media
from mutoscope.data.sources import parquet, tables
from mutoscope.data.sources.layouts import Clip, rare_collections, refuse, settle
from mutoscope.data.sources.shard_files import Shard, find_shards, saved_dataset
from mutoscope.data.sources.tables import SplitName
from mutoscope.data.sources.tar import Member
from mutoscope.data.sources.webdataset import Sample, read_samples
from mutoscope.progress import Bars
from mutoscope.recipe import ClipSet

THREADS = 16
"""Shards that are looked into at once; most of the time they wait for a disk or a network."""
OWN_COLUMNS = ("id", "split", "label", "start", "end")
"""Columns of fixed names, as in layout table."""

R = TypeVar("R")


class _Row(NamedTuple):
    """A clip in a shard, before what is said of it is read."""

    shard: Shard
    name: str
    """Its key or number there."""
    media: Media
    cells: dict[str, Any]
    """What is said of it, by column."""
    kinds: dict[str, str]
    """The columns with captions, by kind."""
    own: dict[str, str]
    """Those of OWN_COLUMNS that there are, by name."""


def webdataset(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """The samples of the *.tar below a folder, of a glob, of braces ({000..127}.tar) or of one shard, here or at a URL.

    Captions: KEY.txt, KEY.KIND.txt and, in KEY.json, caption, text or prompt, and "captions" of several kinds; or those
    kinds and keys that `caption_columns` names. Labels: KEY.cls, or label in the JSON. The video is the member with a
    video's extension, else with an image's; of several, the one whose extension is `video_column`. Ids are SHARD/KEY.
    Splits: where shards or their folders are called train, val, validation or test (train-000.tar, val/000.tar), by
    that; else by a hash of the ids.

    Raises ValueError with all that is wrong: shards that are damaged or compressed, samples without a video, bad texts.
    """
    shards = find_shards(clip_set.root, ".tar")
    with rare_collections():
        faults: list[str] = []
        rows = _sample_rows(clip_set, shards, _each(clip_set.root, shards, read_samples), faults)
        return _settled(clip_set.root, rows, faults, val_fraction)


def parquet_videos(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """The rows of the *.parquet below a folder, of a glob, of braces or of one file, here or at a URL, with a video or
    an image in a column: of bytes, or of ``struct<bytes, path>`` as Hugging Face's Video and Image.

    The column is `video_column`, or video, or the only one of bytes. The others are as in layout table: captions, id,
    split, label, start, end. Without a column id, ids are SHARD/ROW. Splits are as in `webdataset`, but that a column
    split comes first.

    Raises ValueError with all that is wrong: damaged files, missing columns, rows without a video, bad cells.
    """
    return _table_clips(clip_set, find_shards(clip_set.root, ".parquet"), val_fraction)


def arrow_dataset(clip_set: ClipSet, val_fraction: float) -> list[Clip]:
    """The rows of a folder here that `save_to_disk` of a datasets.Dataset or DatasetDict wrote; as `parquet_videos`.

    Raises ValueError as `parquet_videos` does.
    """
    return _table_clips(clip_set, saved_dataset(clip_set.root), val_fraction)


# ---- samples of tar files


def _sample_rows(
    clip_set: ClipSet, shards: list[Shard], found: list[list[Sample]], faults: list[str]
) -> Iterator[_Row]:  # fmt: skip
    kinds = {kind for samples in found for sample in samples for kind in sample.captions}
    names = {name for samples in found for sample in samples for name in sample.facts}
    columns = tables.caption_columns(sorted(kinds | names), clip_set.caption_columns)
    if not clip_set.caption_columns:
        columns |= {kind: kind for kind in sorted(kinds)}
    wanted = None if clip_set.video_column is None else clip_set.video_column.lower().lstrip(".")
    for shard, samples in zip(shards, found, strict=True):
        for sample in samples:
            try:
                member = _pick_video(sample.media, wanted)
            except ValueError as error:
                faults.append(f"{shard.path}:{sample.key}: {error}")
                continue
            media = Media(shard.path, member.name, member.offset, member.size)
            yield _Row(shard, sample.key, media, sample.facts | sample.captions, columns, {"label": "label"})


def _pick_video(members: dict[str, Member], wanted: str | None) -> Member:
    if wanted is not None:
        if wanted not in members:
            raise ValueError(f"no member .{wanted} (data.video_column); there is .{', .'.join(sorted(members))}")
        return members[wanted]
    among = members
    if len(among) > 1:
        videos = [extension for extension in members if posixpath.splitext(f"x.{extension}")[1] in VIDEOS]
        among = {extension: members[extension] for extension in videos} or members
    if len(among) > 1:
        raise ValueError(f"several videos: .{', .'.join(sorted(among))}; name one by data.video_column")
    return next(iter(among.values()))


# ---- rows of tables


class _Table(NamedTuple):
    """The rows of a file, but for the videos in them."""

    video: str
    """The column with the videos."""
    kinds: dict[str, str]
    own: dict[str, str]
    """As in `_Row`."""
    rows: list[dict[str, Any]]


def _table_clips(clip_set: ClipSet, shards: list[Shard], val_fraction: float) -> list[Clip]:
    with rare_collections():
        found = _each(clip_set.root, shards, lambda path, faults: _read_table(path, clip_set, faults))
        rows = (
            _Row(shard, f"{n:06d}", Media(shard.path, f"row {n}", row=n, column=video), cells, kinds, own)
            for shard, (video, kinds, own, table) in zip(shards, found, strict=True)
            for n, cells in enumerate(table)
        )
        return _settled(clip_set.root, rows, [], val_fraction)


def _read_table(path: str, clip_set: ClipSet, faults: list[str]) -> _Table:
    try:
        info = parquet.table_info(path)
        try:
            video = _video_column(info, clip_set.video_column)
            kinds = tables.caption_columns(info.columns, clip_set.caption_columns)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found = {name: tables.find_column(info.columns, None, (name,), "") for name in OWN_COLUMNS}
        own = {name: column for name, column in found.items() if column is not None}
        rows = parquet.read_table(path, list(dict.fromkeys([*kinds.values(), *own.values()])))
        if nulls := parquet.null_rows(path, video):
            faults.append(f"{path}: column {video} has no bytes in {len(nulls)} of {info.rows} rows, such as row "
                          f"{nulls[0]}; paths alone are for layout table")  # fmt: skip
        return _Table(video, kinds, own, rows)
    except ValueError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{path}: {error.strerror or error}")
    return _Table("", {}, {}, [])


def _video_column(info: parquet.TableInfo, wanted: str | None) -> str:
    column = tables.find_column(info.columns, wanted, (), "video_column")
    if column is None:
        usual = tables.find_column(info.media, None, tables.VIDEOS, "")
        column = usual or (info.media[0] if len(info.media) == 1 else None)
    if column is None or column not in info.media:
        raise ValueError(f"no column, or no single one, of bytes ({', '.join(info.media) or 'none'}) among "
                         f"{tables.name_some(info.columns)}; name that of the videos by data.video_column")  # fmt: skip
    return column


# ---- all


def _each(root: str, shards: list[Shard], read: Callable[[str, list[str]], R]) -> list[R]:
    """What `read` finds in each shard. Raises ValueError with the faults that it adds to its list."""
    faults: list[list[str]] = [[] for _ in shards]
    found = []
    bars = Bars(sys.stderr.isatty() and len(shards) > THREADS and os.environ.get("LOCAL_RANK", "0") == "0")
    pool = ThreadPoolExecutor(THREADS)
    try:
        with bars:
            tell = bars.start("shards", len(shards))
            for one in pool.map(read, [shard.path for shard in shards], faults):
                found.append(one)
                tell()
    finally:  # At Ctrl-C, the shards that are not begun.
        pool.shutdown(wait=False, cancel_futures=True)
    refuse(root, [fault for some in faults for fault in some])
    return found


def _settled(root: str, rows: Iterable[_Row], faults: list[str], val_fraction: float) -> list[Clip]:
    """The clips, sorted by id, each in its split."""
    clips: dict[str, tuple[SplitName | None, Clip]] = {}
    for row in rows:
        try:
            split, clip = _read_row(row)
        except ValueError as error:
            faults.append(f"{row.media}: {error}")
            continue
        if clip.id in clips:
            faults.append(f"{row.media}: the id {clip.id} is that of {clips[clip.id][1].media} too; give each its own")
        clips[clip.id] = split, clip
    if not clips and not faults:
        faults.append("no clips in these shards")
    refuse(root, faults)
    return settle(root, clips, val_fraction)


def _read_row(row: _Row) -> tuple[SplitName | None, Clip]:
    own = {name: row.cells.get(column) for name, column in row.own.items()}
    start, end = tables.read_part(own.get("start"), own.get("end"))
    split = tables.read_split(own["split"]) if "split" in own else row.shard.split
    return split, Clip(
        id=tables.read_id(own["id"]) if "id" in own else f"{row.shard.name}/{row.name}",
        media=row.media,
        split="train",
        captions=tables.read_kinds(row.cells, row.kinds),
        label=tables.read_label(own.get("label")),
        start=start,
        end=end,
    )
