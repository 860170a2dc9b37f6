"""Which layout a set of clips has, and which of its files are the metadata.

Looks at the names in a folder and the first row of a table, never at everything.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter

from mutoscope.data.flying_mnist import FLYING_MNIST
from mutoscope.data.media import IMAGES, VIDEOS, is_url
from mutoscope.data.sources import tables
from mutoscope.data.sources.folder import Folder
from mutoscope.data.sources.parquet import table_info
from mutoscope.data.sources.tables import SPLIT_NAMES, TABLES, SplitName
from mutoscope.recipe import ClipSet

CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
"""Files with a caption in each line; the first that there is."""
VIDEO_FILES = ("videos.txt", "video.txt", "images.txt", "image.txt")
"""Files with a video in each line; the first that there is."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of Hugging Face's videofolder and imagefolder."""
LOOKED_FOR = (
    f"{', '.join(METADATA)}, another table with a column {', '.join(tables.VIDEOS)}, prompts.txt with videos.txt, "
    "videos/ with metas/, train/, *.tar, *.parquet, dataset_info.json with *.arrow"
)
"""What tells of a layout, for messages."""

_READERS = {
    "dataset_file": ("table",),
    "caption_file": ("line_paired",),
    "video_file": ("line_paired",),
    "caption_columns": ("table", "webdataset", "parquet", "arrow"),
    "video_column": ("table", "webdataset", "parquet", "arrow"),
}
"""Options of some layouts only."""


def detect(clip_set: ClipSet) -> str:
    """The name of the layout; captioned_folder where nothing tells of another.

    Raises ValueError where there is nothing at the root, or nothing that can be read.
    """
    root = clip_set.root
    if root.startswith(FLYING_MNIST):
        return "flying_mnist"
    if is_url(root) and "mnist" in root.partition("://")[0]:
        raise ValueError(f"data.root={root}: for clips drawn in memory write {FLYING_MNIST}PRESET")
    if clip_set.dataset_file is not None:
        return "table"
    if clip_set.caption_file is not None or clip_set.video_file is not None:
        return "line_paired"
    if not is_url(root) and os.path.isdir(os.path.expanduser(root)):
        return _detect_folder(Folder(root), clip_set)
    suffix = posixpath.splitext(root)[1].lower()
    if suffix in (".tar", ".tgz") or ".tar." in posixpath.basename(root):
        return "webdataset"
    if suffix == ".parquet":
        return "parquet" if re.search(r"[*?\[{]", root) or _holds_videos(root, clip_set) else "table"
    return "table" if suffix in TABLES else _detect_folder(Folder(root), clip_set)


def check_options(clip_set: ClipSet, layout: str) -> None:
    """Raises ValueError for an option that the layout would ignore."""
    for option, layouts in _READERS.items():
        if not getattr(clip_set, option) or layout in layouts:
            continue
        if layout == "line_paired":
            raise ValueError(f"data.{option}: is for columns of a table, and {clip_set.root} has a file with a caption "
                             "in each line and one with a video in each: name those by data.caption_file and "
                             "data.video_file, or a table by data.dataset_file")  # fmt: skip
        if layout == "table":
            raise ValueError(f"data.{option}: is a file with a line for each clip, and {clip_set.root} is a table; "
                             "its columns are named by data.caption_columns and data.video_column")  # fmt: skip
        raise ValueError(f"data.{option}: layout {layout} of {clip_set.root} has no use for it, but "
                             f"{', '.join(layouts)}; leave it out, or set data.layout")  # fmt: skip


def find_line_files(clip_set: ClipSet, folder: Folder) -> tuple[str, str]:
    """The files with captions and with videos of layout line_paired. Raises ValueError where there are none."""
    found, names = [], folder.names()
    for option, named, usual in (
        ("caption_file", clip_set.caption_file, CAPTION_FILES),
        ("video_file", clip_set.video_file, VIDEO_FILES),
    ):
        name = named or next((name for name in usual if name in names), None)
        if name is None:
            raise ValueError(f"data.root={clip_set.root}: layout line_paired looked for {', '.join(usual)} there; name "
                             f"the file by data.{option}")  # fmt: skip
        found.append(name)
    return found[0], found[1]


def find_tables(clip_set: ClipSet) -> tuple[str, list[tuple[str, str, SplitName | None]]]:
    """The folder of layout table, and its tables: for each, its name, the folder that its paths are relative to, and
    the split that all of it is of. Raises ValueError where there is none, or no telling which."""
    root = clip_set.root
    if clip_set.dataset_file is not None:
        if posixpath.splitext(clip_set.dataset_file)[1].lower() in TABLES:
            _check_below(root, clip_set.dataset_file)
        return root, [(clip_set.dataset_file, "", None)]
    if posixpath.splitext(root)[1].lower() in TABLES and (is_url(root) or not os.path.isdir(os.path.expanduser(root))):
        above, _, name = root.rpartition("/")
        return above or ("/" if root.startswith("/") else "."), [(name, "", None)]
    folder = Folder(root)
    names = folder.names()
    found = [name for name in METADATA if name in names] or _tables_with_videos(folder, names, clip_set)
    if len(found) > 1:
        raise ValueError(f"data.root={root}: several tables: {tables.name_some(found)}; name one by data.dataset_file")
    if found:
        return root, [(found[0], "", None)]
    parts = [(name, meta) for name in names if name in SPLIT_NAMES for meta in METADATA if meta in folder.names(name)]
    if not parts:
        columns = clip_set.video_column or ", ".join(tables.VIDEOS)
        raise ValueError(f"data.root={root}: layout table looked there for {', '.join(METADATA)} or another table ("
                         f"{' '.join(TABLES)}) with a column {columns}; name the file by data.dataset_file, the column "
                         "by data.video_column")  # fmt: skip
    return root, [(f"{name}/{meta}", name, SPLIT_NAMES[name]) for name, meta in sorted(parts)]


def _check_below(root: str, file: str) -> None:
    """Raise ValueError where a local table is not below the root, and say where it is."""
    if is_url(root) or is_url(file) or os.path.exists(os.path.join(os.path.expanduser(root), file)):
        return
    here = f"; it lies at {os.path.abspath(file)}: give that path" if os.path.exists(file) else ""
    raise ValueError(f"data.dataset_file={file}: no such file below data.root={root}{here}")


def _detect_folder(folder: Folder, clip_set: ClipSet) -> str:
    """From what tells most to what tells least: beside clips, people keep the archives that they came in."""
    names = folder.names()
    folders = {name for name, is_folder in names.items() if is_folder}
    if any(name in names for name in METADATA):
        return "table"
    if "dataset_dict.json" in names or any(name.endswith(".arrow") for name in names):
        return "arrow"
    if {"videos", "metas"} <= folders:
        return "cosmos"
    if any(name in names for name in CAPTION_FILES) and any(name in names for name in VIDEO_FILES):
        return "line_paired"
    if "train" in folders:
        inside = folder.names("train")
        if any(name in inside for name in METADATA):
            return "table"
        return _shards(folder, "train", inside, clip_set) or "split_folders"
    found = _shards(folder, "data", folder.names("data"), clip_set) if "data" in folders else None
    found = found or _shards(folder, "", names, clip_set)
    return found or ("table" if _tables_with_videos(folder, names, clip_set) else "captioned_folder")


def _shards(folder: Folder, below: str, names: dict[str, bool], clip_set: ClipSet) -> str | None:
    """The layout of the shards in a folder, if there are some, and no videos beside them."""
    suffixes = {posixpath.splitext(name)[1].lower() for name in names}
    if suffixes & (VIDEOS | IMAGES):
        return None
    if ".tar" in suffixes:
        return "webdataset"
    paths = (folder.path(posixpath.join(below, name)) for name in sorted(names) if name.endswith(".parquet"))
    return "parquet" if any(_holds_videos(path, clip_set) for path in paths) else None


def _tables_with_videos(folder: Folder, names: dict[str, bool], clip_set: ClipSet) -> list[str]:
    """The tables right in a folder that have a column for videos. A .json beside a file of the same name is about that
    one, and none is a table that holds a single object."""
    stems = Counter(posixpath.splitext(name)[0] for name in names)
    found = []
    for name in sorted(names):
        stem, suffix = posixpath.splitext(name)
        beside_a_clip = suffix == ".json" and stems[stem] > 1
        if names[name] or name.startswith(".") or suffix.lower() not in TABLES or beside_a_clip:
            continue
        path = folder.path(name)
        if suffix.lower() == ".parquet":
            columns = table_info(path).columns
        else:
            columns = list(next(tables.rows(path, []), ("", {}))[1])
        wanted = clip_set.video_column
        if wanted in columns or (wanted is None and tables.find_column(columns, None, tables.VIDEOS, "")):
            found.append(name)
    return found


def _holds_videos(path: str, clip_set: ClipSet) -> bool:
    """Whether the column for videos of a Parquet file has the videos themselves, not their paths."""
    info = table_info(path)
    column = tables.find_column(info.columns, clip_set.video_column, tables.VIDEOS, "video_column")
    return bool(info.media) if column is None else column in info.media
