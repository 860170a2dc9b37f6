from __future__ import annotations

import json
from pathlib import Path

import pytest

from mutoscope.data.sources.detect import check_options, detect, find_line_files, find_tables
from mutoscope.data.sources.folder import Folder
from mutoscope.recipe import ClipSet

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TABLE = "video,caption\na.mp4,a cat\n"
LINES = '{"video": "a.mp4", "caption": "a cat"}\n'


def put(root: Path, *names: str, **contents: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            videos = [b"x"] if "bytes" in name else ["a.mp4"]
            parquet.write_table(pa.table({"video": videos, "caption": ["a cat"]}), path)
        else:
            path.write_text(contents.get(path.name.replace(".", "_"), ""))


@pytest.mark.parametrize(("names", "layout"), [
    (["a.mp4", "a.txt"], "captioned_folder"),
    (["deep/er/a.avi"], "captioned_folder"),
    ([], "captioned_folder"),
    (["train/a.mp4"], "split_folders"),
    (["prompts.txt", "videos.txt", "videos/a.mp4"], "line_paired"),
    (["captions.txt", "images.txt", "a.png"], "line_paired"),
    (["prompts.txt", "a.mp4"], "captioned_folder"),
    (["metadata.csv", "a.mp4"], "table"),
    (["metadata.jsonl", "train/a.mp4"], "table"),
    (["metadata.parquet", "a.mp4"], "table"),
    (["train/metadata.csv", "train/a.mp4"], "table"),
    (["videos/a.mp4", "metas/a.txt"], "cosmos"),
    (["videos/a.mp4", "metas/a.txt", "t5_xxl/a.pickle", "train.tar"], "cosmos"),
    (["00000.tar", "00001.tar"], "webdataset"),
    (["train/00000.tar"], "webdataset"),
    (["download.tar", "a.mp4"], "captioned_folder"),  # Where the clips came from.
    (["download.tar", "train/a.mp4"], "split_folders"),
    (["bytes.parquet"], "parquet"),
    (["data/train-bytes-00000-of-00001.parquet", "README.md"], "parquet"),
    (["paths.parquet", "a.mp4"], "table"),
    (["state.json", "dataset_info.json", "data-00000-of-00001.arrow"], "arrow"),
    (["dataset_dict.json", "train/state.json", "train/data-00000-of-00001.arrow"], "arrow"),
    (["list.csv", "clips/a.mp4"], "table"),
    (["list.tsv", "clips/a.mp4"], "captioned_folder"),  # No column is called video.
    (["scores.csv", "a.mp4"], "captioned_folder"),
    (["list.jsonl", "scores.csv", "clips/a.mp4"], "table"),
    (["metadata.json", "clips/a.mp4"], "table"),
    (["list.json", "list.mp4"], "captioned_folder"),  # It says something about that clip.
    (["config.json", "a.mp4"], "captioned_folder"),
    ([".list.csv", "a.mp4"], "captioned_folder"),
])  # fmt: skip
def test_what_a_folder_is_taken_for(names: list[str], layout: str, tmp_path: Path) -> None:
    put(tmp_path, *names, list_csv=TABLE, list_tsv=TABLE, metadata_json=f"[{LINES}]", list_jsonl=LINES, list_json=LINES,
        scores_csv="id,score\n1,2\n", config_json=json.dumps({"fps": 8}))  # fmt: skip
    assert detect(ClipSet(root=str(tmp_path))) == layout


@pytest.mark.parametrize(("root", "layout"), [
    ("flying-mnist://tiny", "flying_mnist"),
    ("list.csv", "table"),
    ("paths.parquet", "table"),
    ("bytes.parquet", "parquet"),
    ("*.parquet", "parquet"),
    ("a.tar", "webdataset"),
    ("{000..003}.tar", "webdataset"),
    ("s3://bucket/a-*.tar", "webdataset"),
    ("a.tar.gz", "webdataset"),  # Which says why it can't be one.
])  # fmt: skip
def test_what_a_file_is_taken_for(root: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "list.csv", "paths.parquet", "bytes.parquet", "a.tar", "a.tar.gz", list_csv=TABLE)
    monkeypatch.chdir(tmp_path)
    assert detect(ClipSet(root=root)) == layout


def test_options_tell_as_well(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4", "a.txt")
    assert detect(ClipSet(root=str(tmp_path), dataset_file="x.csv")) == "table"
    assert detect(ClipSet(root=str(tmp_path), caption_file="x.txt")) == "line_paired"
    assert detect(ClipSet(root=str(tmp_path), video_file="x.txt")) == "line_paired"


def test_the_video_column_tells_which_table(tmp_path: Path) -> None:
    put(tmp_path, "list.csv", "other.csv", "clips/a.mp4", list_csv=TABLE, other_csv="film,text\na.mp4,a cat\n")
    assert find_tables(ClipSet(root=str(tmp_path)))[1] == [("list.csv", "", None)]
    assert find_tables(ClipSet(root=str(tmp_path), video_column="film"))[1] == [("other.csv", "", None)]


def test_tables_of_each_split(tmp_path: Path) -> None:
    put(tmp_path, "train/metadata.csv", "validation/metadata.jsonl")
    assert find_tables(ClipSet(root=str(tmp_path)))[1] == [
        ("train/metadata.csv", "train", "train"),
        ("validation/metadata.jsonl", "validation", "val"),
    ]


def test_no_telling_which_table(tmp_path: Path) -> None:
    put(tmp_path, "list.csv", "list.jsonl", list_csv=TABLE, list_jsonl=LINES)
    with pytest.raises(ValueError, match=r"several tables: list.csv, list.jsonl; name one by data.dataset_file"):
        find_tables(ClipSet(root=str(tmp_path)))
    put(tmp_path, "metadata.csv", "metadata.jsonl")
    with pytest.raises(ValueError, match=r"several tables: metadata.csv, metadata.jsonl"):
        find_tables(ClipSet(root=str(tmp_path)))


def test_what_was_looked_for(tmp_path: Path) -> None:
    clip_set = ClipSet(root=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"layout table looked there for metadata.csv, .* a column video, path, file_name"
    ):
        find_tables(clip_set)
    with pytest.raises(ValueError, match=r"looked for prompts.txt, .* there; name the file by data.caption_file"):
        find_line_files(clip_set, Folder(str(tmp_path)))
    put(tmp_path, "prompt.txt")
    with pytest.raises(ValueError, match=r"looked for videos.txt, .* there; name the file by data.video_file"):
        find_line_files(clip_set, Folder(str(tmp_path)))
    put(tmp_path, "videos.txt")
    assert find_line_files(clip_set, Folder(str(tmp_path))) == ("prompt.txt", "videos.txt")


def test_an_option_that_would_be_ignored_is_refused() -> None:
    for clip_set, layout in (
        (ClipSet(root="x", dataset_file="x.csv"), "captioned_folder"),
        (ClipSet(root="x", video_file="x.txt"), "cosmos"),
        (ClipSet(root="x", caption_columns=("x",)), "split_folders"),
        (ClipSet(root="x", video_column="x"), "flying_mnist"),
    ):
        with pytest.raises(ValueError, match=rf"layout {layout} of x has no use for it, but .*; leave it out"):
            check_options(clip_set, layout)
    check_options(ClipSet(root="x", video_column="x", caption_columns=("a", "b")), "table")


def test_what_is_nothing(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    for root, text in (
        (tmp_path / "nowhere", "nowhere: no such folder$"),
        (tmp_path / "a.mp4", "not a folder"),
        ("flying_mnist://tiny", "for clips drawn in memory write flying-mnist://PRESET"),
    ):
        with pytest.raises(ValueError, match=text):
            detect(ClipSet(root=str(root)))


def test_columns_and_files_of_lines_are_told_apart(tmp_path: Path) -> None:
    """cogvideox-factory has one flag for both."""
    put(tmp_path, "prompts.txt", "videos.txt", "videos/a.mp4")
    with pytest.raises(ValueError, match=r"data.video_column: is for columns of a table.*by data.caption_file and"):
        check_options(ClipSet(root=str(tmp_path), video_column="videos.txt"), "line_paired")
    with pytest.raises(ValueError, match=r"data.caption_file: is a file with a line for each.*by data.caption_columns"):
        check_options(ClipSet(root=str(tmp_path), caption_file="text"), "table")


def test_a_table_that_is_not_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "clips/a.mp4", "clips/list.csv", list_csv=TABLE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no such file below data.root=clips; it lies at .*/clips/list.csv: give"):
        find_tables(ClipSet(root="clips", dataset_file="clips/list.csv"))
    with pytest.raises(ValueError, match=r"data.dataset_file=l.csv: no such file below data.root=clips$"):
        find_tables(ClipSet(root="clips", dataset_file="l.csv"))
    for file in ("list.csv", str(tmp_path / "clips/list.csv")):
        assert find_tables(ClipSet(root="clips", dataset_file=file)) == ("clips", [(file, "", None)])
