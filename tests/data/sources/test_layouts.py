from __future__ import annotations

import gc
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.data.flying_mnist import PRESETS, render
from mutoscope.data.media import Media
from mutoscope.data.sources.layouts import Clip, list_clips, list_data
from mutoscope.data.sources.splits import split_by_hash
from mutoscope.recipe import ClipSet, Data


def put(path: Path, caption: str | bytes | None = None, facts: object = None) -> Path:
    """A clip that is listed but never read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    if facts is not None:
        path.with_suffix(".json").write_text(json.dumps(facts))
    return path


def put_files(root: Path, **files: str) -> None:
    """Text files, "_" for the dot; and the videos a, b and c."""
    for name in "abc":
        put(root / f"clips/{name}.mp4")
    for name, content in files.items():
        (root / name.replace("_", ".")).write_bytes(content.encode())


def listed(root: Path | str, val_fraction: float = 0.0, **options: object) -> list[Clip]:
    return list_clips(ClipSet(root=str(root), **options), val_fraction)  # type: ignore[arg-type]


def faults(root: Path | str, **options: object) -> str:
    """What is wrong, without the folder's own path."""
    with pytest.raises(ValueError) as error:
        listed(root, **options)
    return str(error.value).replace(f"data.root={root}: ", "").replace(f"{root}/", "")


def captions(clips: list[Clip]) -> dict[str, object]:
    """The plain captions, or all kinds of those."""
    return {c.id: c.captions["caption"][0] if set(c.captions) == {"caption"} else c.captions for c in clips}


def splits(clips: list[Clip]) -> dict[str, str]:
    return {c.id: c.split for c in clips}


# ---- folders


def test_split_folders(tmp_path: Path) -> None:
    put(tmp_path / "train/b.mp4", "two")
    put(tmp_path / "train/cats/a.MOV", facts={"label": 3, "digits": []})
    put(tmp_path / "val/b.mp4", facts={"label": None})
    put(tmp_path / "train/still.png")
    put(tmp_path / "train/._b.mp4")
    put(tmp_path / "train/notes.txt")
    put(tmp_path / "elsewhere/c.mp4")
    clips = listed(tmp_path)
    assert clips == [
        Clip(id="train/b", media=Media(f"{tmp_path}/train/b.mp4"), split="train", captions={"caption": ("two",)}),
        Clip(id="train/cats/a", media=Media(f"{tmp_path}/train/cats/a.MOV"), split="train", label=3),
        Clip(id="train/still", media=Media(f"{tmp_path}/train/still.png"), split="train"),
        Clip(id="val/b", media=Media(f"{tmp_path}/val/b.mp4"), split="val"),
    ]
    assert clips[0].path == f"{tmp_path}/train/b.mp4"


def test_split_folders_without_val_hold_out_a_share(tmp_path: Path) -> None:
    for k in range(40):
        put(tmp_path / f"train/{k}.mp4")
    clips = listed(tmp_path, 0.25)
    assert splits(clips) == split_by_hash([f"train/{k}" for k in range(40)], 0.25)
    assert {c.split for c in clips} == {"train", "val"}
    assert [c.id for c in clips] == sorted(c.id for c in clips)


def test_test_is_val_where_there_is_no_other(tmp_path: Path) -> None:
    put(tmp_path / "train/a.mp4"), put(tmp_path / "test/b.mp4")
    assert splits(listed(tmp_path, 0.5)) == {"train/a": "train", "test/b": "val"}
    put(tmp_path / "validation/c.mp4")
    assert splits(listed(tmp_path, 0.5)) == {"train/a": "train", "validation/c": "val"}


def test_captioned_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", b"\xef\xbb\xbfa caf\xc3\xa9 \xf0\x9f\x8e\xac\r\n\r\n", {"label": 0})  # BOM, CRLF, emoji.
    put(tmp_path / "deep/er/b.v2.webm", "line one\r\nline two\n")
    put(tmp_path / "c.jpg", facts={"caption": "a still", "captions": {"short": ["c", "see"]}})
    a, c, b = listed(tmp_path)
    assert (a.id, a.captions, a.label) == ("a", {"caption": ("a café 🎬",)}, 0)
    assert (b.id, b.captions, b.label) == ("deep/er/b.v2", {"caption": ("line one\r\nline two",)}, None)
    assert (c.id, c.captions) == ("c", {"caption": ("a still",), "short": ("c", "see")})


def test_the_txt_goes_before_the_json(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", "edited", {"caption": "old", "captions": {"short": "s"}})
    assert listed(tmp_path)[0].captions == {"caption": ("edited",), "short": ("s",)}


@pytest.mark.parametrize(
    "suffix", ["mp4", "mov", "mkv", "webm", "avi", "m4v", "gif", "png", "jpg", "jpeg", "webp", "bmp"]
)
def test_suffixes(suffix: str, tmp_path: Path) -> None:
    put(tmp_path / f"a.{suffix}"), put(tmp_path / f"b.{suffix.upper()}"), put(tmp_path / "c.zip")
    assert [c.id for c in listed(tmp_path)] == ["a", "b"]


def test_a_folder_of_classes_needs_no_caption(tmp_path: Path) -> None:
    put(tmp_path / "Archery/v_Archery_g01_c01.avi"), put(tmp_path / "YoYo/v_YoYo_g01_c01.avi")
    assert [(c.id, c.captions) for c in listed(tmp_path)] == [
        ("Archery/v_Archery_g01_c01", {}),
        ("YoYo/v_YoYo_g01_c01", {}),
    ]


@pytest.mark.parametrize(("caption", "facts_", "text"), [
    (" \r\n", None, "a.txt: the caption is empty; write one, or remove the file"),
    (b"x\ncaf\xe9", None, "a.txt, line 2: not UTF-8 (byte 5 of the file); save it as UTF-8"),
    ("fine", {"label": -1}, "a.json: the label must be a whole number from 0 on; it is -1"),
    ("fine", {"label": "cat"}, "a.json: the label must be a whole number from 0 on; it is 'cat'"),
    ("fine", {"label": True}, "a.json: the label must be a whole number from 0 on; it is True"),
    ("fine", [3], 'a.json: must be an object, as in {"label": 3}'),
    (None, {"caption": 3}, "a.json: a caption must be text; it is 3"),
    (None, {"captions": ["a"]},
     'a.json: "captions" must be an object, as in {"short": "a cat", "long": "a cat on a mat"}'),
    (None, {"captions": {"short": [""]}}, "a.json: an empty caption in a list of captions; write it or remove it"),
])  # fmt: skip
def test_bad_captions_and_labels_name_the_file(
    caption: str | bytes | None, facts_: object, text: str, tmp_path: Path
) -> None:
    put(tmp_path / "a.mp4", caption, facts_)
    assert faults(tmp_path) == text


def test_a_json_that_is_none_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4").with_suffix(".json").write_text('{"label": 3')
    assert faults(tmp_path).startswith("a.json: not JSON: Expecting ")


def test_some_captions_missing_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4", "one"), put(tmp_path / "b.mp4"), put(tmp_path / "c.d/e.mp4")
    assert faults(tmp_path) == (
        "2 faults:"
        "\n  b.mp4: no caption; put it into b.txt, or let no clip have one"
        "\n  c.d/e.mp4: no caption; put it into c.d/e.txt, or let no clip have one"
    )


def test_the_first_ten_faults_and_the_total(tmp_path: Path) -> None:
    for k in range(25):
        put(tmp_path / f"{k:02d}.mp4", b"\xff" if k % 2 else "", {"label": "x"} if k == 4 else None)
    text = faults(tmp_path)
    assert text.startswith("26 faults:\n  00.txt: the caption is empty") and text.endswith("\n  ... and 16 more")
    assert len(text.splitlines()) == 12 and "04.json: the label" in text


def test_links_to_nowhere_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "gone.mp4")
    assert faults(tmp_path) == "b.mp4: a link to a file that is not there; mend it or remove it"


def test_names_that_are_not_unicode_are_named(tmp_path: Path) -> None:
    put(tmp_path / "b.mp4")
    try:
        (tmp_path / "caf\udce9.mp4").touch()
    except OSError:
        pytest.skip("the file system takes no such name")
    assert "a file's name is not Unicode" in faults(tmp_path)


def test_bad_roots(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    file = put(tmp_path / "file.mp4")
    (tmp_path / "empty").mkdir()
    for root, layout, text in (
        (tmp_path / "nowhere", "auto", "no such folder$"),
        (file, "auto", "not a folder"),
        (tmp_path, "auto", "layout split_folders wants videos or images in .*train; there is none .*mp4"),
        (
            tmp_path / "empty",
            "auto",
            "no video or image in this folder or below it .*, and nothing that tells of",
        ),
        (tmp_path, "cosmos", "layout cosmos wants videos in .*videos; there is none"),
        (tmp_path, "flying_mnist", "needs flying-mnist://PRESET"),
        ("flying_mnist://tiny", "auto", "for clips drawn in memory write flying-mnist://PRESET"),
        ("flying-mnist://tinny", "auto", "no Flying MNIST preset 'tinny'; .*tiny"),
    ):
        with pytest.raises(ValueError, match=text):
            listed(root, layout=layout)
    for fraction in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"val_fraction={fraction} must lie in \[0, 1\)"):
            listed(tmp_path, fraction)


def test_ids_are_unique(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4"), put(tmp_path / "a.jpg")
    assert faults(tmp_path) == (
        "a.mp4: the id a is that of a.jpg too; rename a file, or give each row of a table its own in a column id"
    )


def test_an_option_of_another_layout_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"data.video_column: layout captioned_folder of .* has no use for it"):
        listed(tmp_path, video_column="film")


# ---- Cosmos


def test_cosmos(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"videos/{name}.mp4")
    put(tmp_path / "videos/deep/c.mp4")
    put(tmp_path / "metas/a.txt").write_text("one\n")
    put(tmp_path / "metas/b.json").write_text(json.dumps({"prompt": "two", "span": ["0", "1"]}))
    put(tmp_path / "metas/deep/c.txt").write_text("three")
    put(tmp_path / "t5_xxl/a.pickle"), put(tmp_path / "t5_xxl/other.pickle")
    clips = listed(tmp_path)
    assert captions(clips) == {"videos/a": "one", "videos/b": "two", "videos/deep/c": "three"}
    assert [c.embeddings for c in clips] == [f"{tmp_path}/t5_xxl/a.pickle", None, None]


def test_faults_of_cosmos(tmp_path: Path) -> None:
    put(tmp_path / "videos/a.mp4"), put(tmp_path / "videos/b.mp4")
    put(tmp_path / "metas/a.txt").write_text("one")
    put(tmp_path / "metas/c.txt").write_text("three")
    assert faults(tmp_path).splitlines() == [
        "2 faults:",
        "  videos/b.mp4: no caption; put it into metas/b.txt, or let no clip have one",
        "  metas/c.txt: no video of this name in videos/; add it, or remove this file",
    ]


# ---- prompts.txt and videos.txt


def test_line_paired(tmp_path: Path) -> None:
    put_files(tmp_path, prompts_txt="\ufeffa cat\r\na \u2028 dog, \"big\"\r\n\r\n \r\n",
              videos_txt="clips/b.mp4\n./clips\\a.mp4\n")  # fmt: skip
    clips = listed(tmp_path)
    assert captions(clips) == {"clips/a": 'a \u2028 dog, "big"', "clips/b": "a cat"}
    assert clips[0].path == f"{tmp_path}/clips/a.mp4"


def test_line_paired_with_files_of_any_name(tmp_path: Path) -> None:
    put_files(tmp_path, p_txt="a cat", v_txt="../set/clips/a.mp4", prompts_txt="x\ny")
    (tmp_path / "set").mkdir()
    (tmp_path / "clips").rename(tmp_path / "set/clips")
    clips = listed(tmp_path / "set", caption_file="../p.txt", video_file=f"{tmp_path}/v.txt")
    assert [c.captions for c in clips] == [{"caption": ("a cat",)}]


def test_blank_lines_never_shift_captions(tmp_path: Path) -> None:
    """Peers drop them in each file by itself: then every later caption is another clip's."""
    put_files(tmp_path, prompts_txt="one\n\nthree\nfour\n", videos_txt="clips/a.mp4\nclips/b.mp4\n\nclips/c.mp4\n")
    assert faults(tmp_path).splitlines() == [
        "2 faults:",
        "  prompts.txt, line 2: blank; write it, or remove the line in both files",
        "  videos.txt, line 3: blank; write it, or remove the line in both files",
    ]


def test_counts_of_lines_must_match(tmp_path: Path) -> None:
    put_files(tmp_path, prompts_txt="one\ntwo\n\n", videos_txt="clips/none.mp4\nclips/b.mp4\nclips/c.mp4\n")
    assert faults(tmp_path).splitlines() == [
        "2 faults:",
        "  prompts.txt has 2 lines, videos.txt 3: line n of the one must be the caption of the video in line n of the "
        "other",
        "  videos.txt, line 1: no such file: clips/none.mp4",
    ]


def test_faults_of_lists(tmp_path: Path) -> None:
    put_files(tmp_path, prompts_txt="one\ntwo\nthree", videos_txt="clips/a.mp4\nclips/a.mp4\nnone/b.mp4")
    assert faults(tmp_path).splitlines() == [
        "2 faults:",
        "  videos.txt, line 2: the id clips/a is that of videos.txt, line 1 too; rename a file, or give each row of a "
        "table its own in a column id",
        "  videos.txt, line 3: no such file: none/b.mp4",
    ]
    put_files(tmp_path, prompts_txt="", videos_txt="\n\n")
    assert faults(tmp_path) == "videos.txt: no line with a clip"
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    (tmp_path / "videos.txt").write_bytes(b"\0")
    assert faults(tmp_path).splitlines() == [
        "2 faults:",
        "  prompts.txt, line 1: not UTF-8 (byte 3 of the file); save it as UTF-8",
        "  videos.txt, line 1: a NUL: the file is damaged, or no UTF-8 text (byte 0 of the file); save it as UTF-8",
    ]


# ---- tables


def test_a_table_and_all_of_its_columns(tmp_path: Path) -> None:
    put_files(tmp_path, list_csv="id,video,caption,label,split,start,end\n"
              "one,clips/a.mp4,a cat,3,train,,\n"
              "two,clips/a.mp4,\"a dog, asleep\",,val,1.5,00:00:03.250\n"
              "three,clips/b.mp4,a cow,0,test,2,\n")  # fmt: skip
    a, b = (Media(f"{tmp_path}/clips/{name}.mp4") for name in "ab")
    one = Clip(id="one", media=a, split="train", captions={"caption": ("a cat",)}, label=3)
    two = Clip(id="two", media=a, split="val", captions={"caption": ("a dog, asleep",)}, start=1.5, end=3.25)
    assert listed(tmp_path) == [one, two]  # There is a val part, so that test is left alone.
    content = (tmp_path / "list.csv").read_text()
    (tmp_path / "list.csv").write_text("\n".join(line for line in content.splitlines() if "two" not in line))
    three = Clip(id="three", media=b, split="val", captions={"caption": ("a cow",)}, label=0, start=2.0)
    assert listed(tmp_path) == [one, three]


def test_parts_of_a_file_get_ids_of_their_own(tmp_path: Path) -> None:
    put_files(tmp_path, list_jsonl="".join(json.dumps(row) + "\n" for row in (
        {"video": "clips/a.mp4", "caption": "all of it"},
        {"video": "clips/a.mp4", "caption": "first", "end": "0:01.5"},
        {"video": "clips/a.mp4", "caption": "second", "start": 1.5, "end": 10.0},
        {"video": "clips/a.mp4", "caption": "last", "start": 10, "end": None},
    )))  # fmt: skip
    assert captions(listed(tmp_path)) == {
        "clips/a": "all of it",
        "clips/a#0-1.5": "first",
        "clips/a#1.5-10": "second",
        "clips/a#10-": "last",
    }


def test_where_the_table_may_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the root; where the root is the table, to its folder."""
    root = tmp_path / "set"
    put_files(root, list_csv="video,text\nclips/a.mp4,a cat\n")
    (root / "meta").mkdir()
    (root / "meta/list.csv").write_bytes((root / "list.csv").read_bytes())
    monkeypatch.chdir(root)
    for clip_set in (
        ClipSet(root=str(root)),
        ClipSet(root=str(root / "list.csv")),
        ClipSet(root="list.csv"),
        ClipSet(root="."),
        ClipSet(root=str(root), dataset_file="meta/list.csv"),
        ClipSet(root=str(root), dataset_file=str(root / "meta/list.csv")),
        ClipSet(root="../set", layout="table"),
    ):
        [clip] = list_clips(clip_set)
        assert (clip.id, clip.captions) == ("clips/a", {"caption": ("a cat",)})
        assert Path(clip.path).samefile(root / "clips/a.mp4")


def test_kinds_by_columns_and_lists_of_alternatives(tmp_path: Path) -> None:
    put_files(tmp_path, list_jsonl="".join(json.dumps(row) + "\n" for row in (
        {"file": "clips/a.mp4", "short": ["cat", "a cat"], "long": "a cat on a mat"},
        {"file": "clips/b.mp4", "short": "dog"},
    )))  # fmt: skip
    clips = listed(tmp_path, video_column="file", caption_columns=("short", "long"))
    assert [c.captions for c in clips] == [
        {"short": ("cat", "a cat"), "long": ("a cat on a mat",)},
        {"short": ("dog",)},
    ]
    clips = listed(tmp_path, video_column="file", caption_columns=("short",))
    assert [c.captions for c in clips] == [{"caption": ("cat", "a cat")}, {"caption": ("dog",)}]
    clips = listed(tmp_path, video_column="file")
    assert [c.captions for c in clips] == [{}, {}]


def test_hugging_face_folders(tmp_path: Path) -> None:
    """videofolder and imagefolder: metadata beside the files, or in each split's folder."""
    put(tmp_path / "one/a.png"), put(tmp_path / "two/train/b.mp4"), put(tmp_path / "two/validation/b.mp4")
    (tmp_path / "one/metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat", "label": 1}\n')
    for split in ("train", "validation"):
        (tmp_path / f"two/{split}/metadata.csv").write_text(f"file_name,text\nb.mp4,from {split}\n")
    [still] = listed(tmp_path / "one")
    assert (still.id, still.captions, still.label) == ("a", {"caption": ("a cat",)}, 1)
    clips = listed(tmp_path / "two", 0.5)
    assert captions(clips) == {"train/b": "from train", "validation/b": "from validation"}
    assert splits(clips) == {"train/b": "train", "validation/b": "val"}


def test_a_parquet_table_of_paths(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    put_files(tmp_path)
    columns = {"video": ["clips/b.mp4", "clips/a.mp4"], "caption": [["a cat", "the cat"], ["a dog"]],
               "label": [None, 2], "start": [0.5, None]}  # fmt: skip
    parquet.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    a, b = listed(tmp_path)
    assert (a.id, a.captions, a.label, a.start) == ("clips/a", {"caption": ("a dog",)}, 2, 0.0)
    assert (b.id, b.captions, b.label, b.start) == ("clips/b#0.5-", {"caption": ("a cat", "the cat")}, None, 0.5)


def test_every_fault_of_a_table_is_told_with_its_line(tmp_path: Path) -> None:
    put_files(tmp_path, list_csv="video,caption,label,start,end,split\n"
              "clips/a.mp4,,cat,2,1,holdout\n"
              "clips/a.mp4,too,few\n"
              "clips/none.mp4,a cat,1,x,,train\n"
              ",a cat,1,,,train\n"
              "clips/b.mp4,a cat,1,,,train\n"
              "./clips//b.mp4,again,1,,,train\n")  # fmt: skip
    assert faults(tmp_path).splitlines() == [
        "9 faults:",
        "  list.csv, line 3: 3 cells where the header has 6; a cell with a comma or a line's end in it must be in "
        "quotes",
        "  list.csv, line 2: no caption in caption; write one or remove the row",
        "  list.csv, line 2: start (2) must lie before end (1)",
        "  list.csv, line 2: the label must be a whole number from 0 on; it is 'cat'",
        "  list.csv, line 2: split must be train, val or test; it is 'holdout'",
        "  list.csv, line 4: a time must be seconds, or hh:mm:ss.mmm; it is 'x'",
        "  list.csv, line 4: no such file: clips/none.mp4",
        "  list.csv, line 5: no video",
        "  list.csv, line 7: the id clips/b is that of list.csv, line 6 too; rename a file, or give each row of a "
        "table its own in a column id",
    ]


@pytest.mark.parametrize(("content", "options", "text"), [
    ("clip,caption\na,b\n", {}, "list.csv: no column for videos: looked for video, path, file_name, there is clip, "
                                "caption; name it by data.video_column"),
    ("video,caption\na,b\n", {"video_column": "vid"},
     "list.csv: no column 'vid' (data.video_column); did you mean video?"),
    ("video,captions\na,b\n", {"caption_columns": ("x", "captions")},
     "list.csv: no column 'x' (data.caption_columns); there is video, captions"),
    ("video,caption\n", {}, "list.csv: no row with a clip"),
    ("video,caption\na\n", {}, "list.csv, line 2: 1 cells where"),
    ("video,caption,video\n", {}, "list.csv, line 1: two columns are called video; rename one"),
    ("id,video,caption\n,clips/a.mp4,x\n", {},
     "list.csv, line 2: no id; write one in each row, or leave the column out"),
    ("id,video,caption\n1,clips/a.mp4,x\n1,clips/b.mp4,x\n", {},
     "list.csv, line 3: the id 1 is that of list.csv, line 2"),
    ("video,caption,split\nclips/a.mp4,x,test\n", {}, "no clip to train on: all are of split val or test"),
])  # fmt: skip
def test_faults_of_whole_tables(content: str, options: dict[str, object], text: str, tmp_path: Path) -> None:
    put_files(tmp_path, list_csv=content)
    assert faults(tmp_path, dataset_file="list.csv", **options).startswith(text)


def test_no_such_table(tmp_path: Path) -> None:
    put_files(tmp_path)
    assert "dataset_file=none.csv: no such file below" in faults(tmp_path, dataset_file="none.csv")
    assert "layout table looked there for metadata.csv" in faults(tmp_path, layout="table")
    assert "must end in .csv, .tsv" in faults(tmp_path, dataset_file="list.xlsx")


def test_a_data_set_behind_a_url(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    files = {"list.csv": "video,caption\nclips/a.mp4,a cat\nhttps://host/b.mp4,a dog\n", "clips/a.mp4": "",
             "pairs/c.mp4": "", "pairs/c.txt": "a cow"}  # fmt: skip
    system.pipe({f"/away/{name}": content.encode() for name, content in files.items()})
    try:
        clips = listed("memory://away")
        assert captions(clips) == {"clips/a": "a cat", "https://host/b": "a dog"}
        assert clips[0].path == "memory://away/clips/a.mp4"
        assert captions(listed("memory://away/list.csv")) == captions(clips)
        assert captions(listed("memory://away/pairs")) == {"c": "a cow"}
        system.pipe("/away/list.csv", b"video,caption\nclips/b.mp4,a cat\n")
        assert faults("memory://away") == "list.csv, line 2: no such file: clips/b.mp4"
    finally:
        system.rm("/away", recursive=True)


# ---- several sets


def test_sets_are_put_together(tmp_path: Path) -> None:
    put(tmp_path / "one/a.mp4", "one"), put(tmp_path / "two/a.mp4", "two")
    data = Data(root=str(tmp_path / "one"), mix=(ClipSet(root=str(tmp_path / "two"), id_token="TOK"),),
                frames=1, height=8, width=8, val_fraction=0.0)  # fmt: skip
    clips = list_data(data)
    assert [(c.id, c.set, c.captions["caption"]) for c in clips] == [("a", 0, ("one",)), ("1:a", 1, ("two",))]
    put(tmp_path / "one/1:a.mp4", "one")
    with pytest.raises(ValueError, match=r"ids there look like those of data.mix.*rename 1:\n  1:a"):
        list_data(data)


# ---- Flying MNIST


def test_flying_mnist_lists_what_is_drawn() -> None:
    preset = PRESETS["tiny"]
    clips = listed("flying-mnist://tiny")
    assert len({c.id for c in clips}) == len(clips) == preset.train + preset.val
    assert [c.id for c in clips] == sorted(c.id for c in clips)
    clip = clips[12]
    assert (clip.id, clip.path, clip.split) == ("train/00012", "flying-mnist://tiny/train/00012", "train")
    drawn = render(preset, "train", 12)
    assert clip.captions == {"caption": (drawn.caption,)} and clip.label == drawn.digits[0].digit


# ---- splits


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


def test_parts_of_one_film_are_in_one_split(tmp_path: Path) -> None:
    """Else a model is validated on the faces and places that it was trained on."""
    rows = ["video,caption,start,end"]
    for film in range(12):
        put(tmp_path / f"films/{film}.mp4")
        rows += [f"films/{film}.mp4,a shot,{n},{n + 1}" for n in range(5)]
    for k in range(40):
        put(tmp_path / f"clips/{k}.mp4")
        rows.append(f"clips/{k}.mp4,a clip,,")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    placed = splits(listed(tmp_path, 0.3))
    shots = {f: {s for i, s in placed.items() if i.startswith(f"films/{f}#")} for f in range(12)}
    assert all(len(found) == 1 for found in shots.values()) and set.union(*shots.values()) == {"train", "val"}
    # A file that is one clip is where it was before there were parts.
    alone = {i: s for i, s in placed.items() if i.startswith("clips/")}
    assert alone == split_by_hash([f"clips/{k}" for k in range(40)], 0.3)


def test_clips_that_were_cut_from_one_film_are_in_one_split(tmp_path: Path) -> None:
    made = [{"id": f"film{f}_{n:04d}", "file": f"film{f}.mp4"} for f in range(12) for n in range(5)]
    (tmp_path / ".clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made) + '{"id": "torn')
    for line in made:
        put(tmp_path / f"{line['id']}.mp4", "a shot")
    placed = splits(listed(tmp_path, 0.3))
    shots = [{s for i, s in placed.items() if i.startswith(f"film{f}_")} for f in range(12)]
    assert all(len(found) == 1 for found in shots) and set.union(*shots) == {"train", "val"}
    (tmp_path / ".clips.jsonl").write_text('{"id": 3}\n')
    assert faults(tmp_path).startswith(".clips.jsonl, line 1: damaged; it says of which film each clip is")


def test_shots_of_the_only_film_are_split_one_by_one() -> None:
    ids = [f"a#{n}" for n in range(40)]
    assert split_by_hash(ids, 0.3, dict.fromkeys(ids, "a")) == split_by_hash(ids, 0.3)
    # So are those of films that would all be validated on, and none be trained on.
    two = {i: "film2.mp4" if n % 2 else "film.mp4" for n, i in enumerate(ids)}
    assert set(split_by_hash(two.values(), 0.2).values()) == {"val"}
    assert split_by_hash(ids, 0.2, two) == split_by_hash(ids, 0.2)


# ---- damage


def test_the_collector_is_on_again(tmp_path: Path) -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError):
        listed(tmp_path)
    assert gc.isenabled()


WORDS = ["".join(random.Random(k).choices(string.ascii_lowercase, k=12)) for k in range(12)]
"""Captions so unlike each other that damage does not make one of another."""
ROWS = [{"video": f"clips/{k:02d}.mp4", "caption": f'{word}, "{word}" {word}'} for k, word in enumerate(WORDS)]


def separated(delimiter: str) -> bytes:
    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' if " " in cell else cell for cell in line] for line in lines]
    return "".join(delimiter.join(line) + "\r\n" for line in quoted).encode()


def parquet_table() -> bytes:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink, write_page_checksum=True)  # Else damage may go unseen.
    return bytes(sink.getvalue())


FORMATS: dict[str, Callable[[], bytes]] = {
    "metadata.csv": lambda: separated(","),
    "list.tsv": lambda: separated("\t"),
    "metadata.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "list.json": lambda: json.dumps({"data": ROWS}, indent=1).encode(),
    "metadata.parquet": parquet_table,
    "prompts.txt": lambda: "".join(f"{row['caption']}\n" for row in ROWS).encode(),
    "videos.txt": lambda: "".join(f"{row['video']}\n" for row in ROWS).encode(),
    "clips/00.txt": lambda: ROWS[0]["caption"].encode(),
    "clips/00.json": lambda: json.dumps({"label": 3, "captions": {"caption": [ROWS[0]["caption"]]}}).encode(),
}


def damaged(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    end = min(at + chance.randrange(1, 5), len(content))
    kind = chance.choice(["flip", "truncate", "insert", "delete", "repeat"])
    if kind == "flip":
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    if kind == "truncate":
        return content[:at]
    if kind == "insert":
        return (
            content[:at] + chance.choice([b'"', b"\n", b"\r", b",", b"\0", b"\xff", b"{", b"[", b"\\"]) + content[at:]
        )
    return content[:at] + content[end:] if kind == "delete" else content[:end] + content[at:]


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_metadata_is_refused_or_right(name: str, tmp_path: Path) -> None:
    """100 damaged files of each format: a ValueError, or clips none of which has another's caption."""
    for row in ROWS:
        put(tmp_path / row["video"])
    content = FORMATS[name]()
    if name.endswith("s.txt"):
        for other in ("prompts.txt", "videos.txt"):
            (tmp_path / other).write_bytes(FORMATS[other]())
    options = {"dataset_file": name} if name.startswith(("list", "metadata")) else {}
    path = tmp_path / name
    path.write_bytes(content)
    if name.startswith("clips"):
        [put(tmp_path / row["video"], row["caption"]) for row in ROWS[1:]]
    right = captions(listed(tmp_path, **options))
    assert right == {f"clips/{k:02d}": row["caption"] for k, row in enumerate(ROWS)}
    chance = random.Random(name)
    refused = 0
    for _ in range(100):
        path.write_bytes(damaged(content, chance))
        try:
            clips = listed(tmp_path, **options)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(("data.root=", str(path))) and len(str(error)) < 8000
            continue
        for clip_id, caption in captions(clips).items():
            assert caption == right[clip_id] or caption not in right.values(), (clip_id, caption)
    assert 20 < refused <= 100 or name.startswith("clips")


def test_every_layout_is_in_the_documents() -> None:
    page = (Path(__file__).parents[3] / "docs/data-layouts.md").read_text()
    layouts = get_args(get_type_hints(ClipSet)["layout"])
    assert {"auto", *(line[3:] for line in page.splitlines() if line.startswith("## "))} >= set(layouts)
    assert all(f"[`{layout}`](#{layout})" in page for layout in layouts if layout != "auto")
