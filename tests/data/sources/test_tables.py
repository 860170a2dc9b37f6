from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mutoscope.data.sources import tables

CAPTIONS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip), max_size=8
)
in_a_folder = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path, content: str | bytes) -> tuple[list[tuple[str, dict[str, object]]], list[str]]:
    """The rows of a file with this content, and its faults without the path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    faults: list[str] = []
    rows = list(tables.rows(str(path), faults))
    return rows, [fault.removeprefix(f"{path}, ") for fault in faults]


def test_csv_of_spreadsheets(tmp_path: Path) -> None:
    """BOM, CRLF, blank and empty rows, a column without name, commas, quotes and line ends in cells, a header again."""
    content = (
        b'\xef\xbb\xbf,video , caption\r\n\r\n0,a.mp4,"a ""caf\xc3\xa9"", at night"\r\n'
        b'1,b.mp4, "two\r\nlines"\r\n,,\r\n,video,caption\r\n2,c.mp4,5" of snow\r\n'
    )
    rows, faults = read(tmp_path / "t.csv", content)
    assert rows == [
        ("line 3", {"video": "a.mp4", "caption": 'a "café", at night'}),
        ("line 4", {"video": "b.mp4", "caption": "two\r\nlines"}),
        ("line 8", {"video": "c.mp4", "caption": '5" of snow'}),
    ]
    assert not faults


@pytest.mark.parametrize(("name", "content"), [
    ("t.csv", "video;caption\na.mp4;cold, wet\n"),  # A comma is a decimal point where this was saved.
    ("t.csv", "video,caption\ra.mp4,\"cold, wet\"\r"),
    ("t.tsv", "video\tcaption\na.mp4\tcold, wet\n"),
    ("t.TSV", 'video\tcaption\na.mp4\t"cold, wet"'),
    ("t.jsonl", '\ufeff{"video": "a.mp4", "caption": "cold, wet"}\r\n\r\n'),
    ("t.json", '[{"video": "a.mp4", "caption": "cold, wet"}]'),
    ("t.jsonl", '[\n{"video": "a.mp4",\n "caption": "cold, wet"}\n]\n'),
    ("t.json", '{"data": [{"video": "a.mp4", "caption": "cold, wet"}]}'),
])  # fmt: skip
def test_dialects(name: str, content: str, tmp_path: Path) -> None:
    rows, faults = read(tmp_path / name, content)
    assert [row for _, row in rows] == [{"video": "a.mp4", "caption": "cold, wet"}]
    assert not faults


def test_lines_are_json_lines_whatever_they_are_called(tmp_path: Path) -> None:
    for name in ("t.json", "t.jsonl"):
        assert read(tmp_path / name, '{"a": 1}\n\n{"a": 2}\n') == ([("line 1", {"a": 1}), ("line 3", {"a": 2})], [])


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("t.csv", "v,c\na,b,d\nx,y\nz\n", ["line 2: 3 cells where the header has 2; a cell with a comma",
                                       "line 4: 1 cells where the header has 2"]),
    ("t.tsv", "v\tc\na\n", ["line 2: 1 cells where the header has 2; a cell with a tab"]),
    ("t.csv", 'v,c\na,"never closed\nb,c\nd,e\n', ["line 2: unexpected end of data; a cell that begins with a quote"]),
    ("t.csv", 'v,c\na,"closed" too early\nb,c\n', ["line 2: ',' expected after '\"'"]),
    ("t.jsonl", '{"v": 1}\n{"v": \n[3]\n"x"\n', ["line 2: not JSON: Expecting value", "line 3: must be an object",
                                                "line 4: must be an object"]),
    ("t.json", '[{"v": 1}, 3]', ["item 1: must be an object"]),
    ("t.json", "3", ["item 0: must be an object"]),
    ("t.jsonl", "[" * 100_000, "not JSON: brackets within brackets without end"),
    ("t.jsonl", '{"v": 1}\n' + '{"v":' * 100_000, ["line 2: not JSON: brackets within brackets"]),
    ("t.jsonl", '{"v": 1' + "0" * 5000 + "}", ["line 1: not JSON: Exceeds the limit"]),
    ("t.jsonl", '{"v": 1, "c": "x", "v": 2}\n{"v": 3}\n', ["line 1: not JSON: the key 'v' twice in an object"]),
    ("t.json", '[{"v": 1},', "t.json: not JSON: Expecting value"),
    ("t.json", '{"v": ', "t.json: not JSON: Expecting value"),
    ("t.csv", "v,c,v\n1,2,3\n", "line 1: two columns are called v; rename one"),
    ("t.csv", b"v,c\na,caf\xe9\n", r"t.csv, line 2: not UTF-8 \(byte 9 of the file\); save it as UTF-8"),
    ("t.csv", b"\xef\xbb\xbfv\nx\xff\n", r"line 2: not UTF-8 \(byte 6 of the file\)"),
    ("t.csv", "v,c\na,b\n".encode("utf-16"), r"line 1: UTF-16, not UTF-8 \(byte 0 of the file\)"),
    ("t.jsonl", b'{"v": 1}\n\0\0', r"line 2: a NUL: the file is damaged, or no UTF-8 text \(byte 9 of the file\)"),
    ("t.xlsx", "x", "no table that can be read; it must end in .csv, .tsv, .jsonl, .json, .parquet"),
])  # fmt: skip
def test_faults_name_the_line(name: str, content: str | bytes, expected: str | list[str], tmp_path: Path) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(tmp_path / name, content)
    else:
        faults = read(tmp_path / name, content)[1]
        assert len(faults) == len(expected)
        assert all(fault.startswith(start) for fault, start in zip(faults, expected, strict=True)), faults


def test_a_row_is_what_a_fault_in_another_leaves_it(tmp_path: Path) -> None:
    assert read(tmp_path / "t.csv", "v,c\na\nx,y\n")[0] == [("line 3", {"v": "x", "c": "y"})]
    assert read(tmp_path / "t.jsonl", '{"v": \n{"v": "x"}\n')[0] == [("line 2", {"v": "x"})]


def test_empty_tables_have_no_rows(tmp_path: Path) -> None:
    for name in ("t.csv", "t.tsv", "t.json", "t.jsonl"):
        for content in ("", "\n", "\ufeff"):
            assert read(tmp_path / name, content) == ([], [])


def test_very_long_cells(tmp_path: Path) -> None:
    long = "ü" * 300_000
    for name, content in (("t.csv", f"v,c\na,{long}\n"), ("t.jsonl", json.dumps({"v": "a", "c": long}))):
        [(_, row)], faults = read(tmp_path / name, content)
        assert row == {"v": "a", "c": long} and not faults


def test_no_such_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.csv: no such file"):
        tables.rows(str(tmp_path / "none.csv"), [])
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=r"folder.csv: can't be read: Is a directory"):
        tables.rows(str(tmp_path / "folder.csv"), [])


@in_a_folder
@given(captions=CAPTIONS, tab=st.booleans(), quote_all=st.booleans(), bom=st.booleans())
def test_any_caption_survives_csv_and_tsv(
    captions: list[str], tab: bool, quote_all: bool, bom: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("t.tsv" if tab else "t.csv")
    with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
        writer = csv.writer(file, dialect="excel-tab" if tab else "excel", quoting=quoting)
        writer.writerow(["video", "caption"])
        writer.writerows([f"{k}.mp4", caption] for k, caption in enumerate(captions))
    faults: list[str] = []
    rows = [row for _, row in tables.rows(str(path), faults)]
    assert [row["video"] for row in rows] == [f"{k}.mp4" for k in range(len(captions))]
    assert [tables.read_captions(row["caption"]) for row in rows] == [(caption.strip(),) for caption in captions]
    assert not faults


@in_a_folder
@given(captions=CAPTIONS, escaped=st.booleans(), as_list=st.booleans())
def test_any_caption_survives_json(captions: list[str], escaped: bool, as_list: bool, tmp_path: Path) -> None:
    rows = [{"video": f"{k}.mp4", "caption": caption} for k, caption in enumerate(captions)]
    lines = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)
    read_rows, faults = read(tmp_path / "t.jsonl", json.dumps(rows, ensure_ascii=escaped) if as_list else lines)
    assert [row for _, row in read_rows] == rows and not faults


@in_a_folder
@given(captions=CAPTIONS, end=st.sampled_from(["\n", "\r\n", "\r"]), blank=st.integers(0, 3))
def test_a_line_stays_the_line_it_is(captions: list[str], end: str, blank: int) -> None:
    """Also where it has a form feed in it or U+2028, which str.splitlines takes for an end."""
    captions = [caption.replace("\n", "").replace("\r", "") or "x" for caption in captions]
    captions = [caption for caption in captions if caption.strip()]
    assert tables.lines(end.join([*captions, *[" "] * blank])) == captions


def test_blank_lines_count_but_at_the_end() -> None:
    assert tables.lines("a\n\nb\n\n \n") == ["a", "", "b"]


def test_columns_are_found_in_any_case_in_a_fixed_order() -> None:
    assert tables.find_column(["path", "Video", "video"], None, tables.VIDEOS, "video_column") == "Video"
    assert tables.find_column(["file_name", "path"], None, tables.VIDEOS, "video_column") == "path"
    assert tables.find_column(["x"], None, tables.VIDEOS, "video_column") is None
    assert tables.find_column(["x", "video"], "x", tables.VIDEOS, "video_column") == "x"
    with pytest.raises(ValueError, match=r"no column 'vidoe' \(data.video_column\); did you mean video\?"):
        tables.find_column(["video", "x"], "vidoe", tables.VIDEOS, "video_column")
    with pytest.raises(ValueError, match=r"there is c0, c1, .*, c19 and 5 more$"):
        tables.find_column([f"c{k}" for k in range(25)], "video", (), "video_column")


def test_kinds_of_captions() -> None:
    assert tables.caption_columns(["text", "caption"], ()) == {"caption": "caption"}
    assert tables.caption_columns(["text", "caption"], ("text",)) == {"caption": "text"}
    assert tables.caption_columns(["short", "long"], ("short", "long")) == {"short": "short", "long": "long"}
    assert tables.caption_columns(["label"], ()) == {}
    row = {"short": "a cat", "long": None, "more": ["one ", "two"]}
    kinds = {kind: kind for kind in row}
    assert tables.read_kinds(row, kinds) == {"short": ("a cat",), "more": ("one", "two")}
    with pytest.raises(ValueError, match="no caption in long or other; write one or remove the row"):
        tables.read_kinds(row, {"long": "long", "other": "other"})


@pytest.mark.parametrize(("value", "text"), [
    (3, "a caption must be text; it is 3"),
    ({"en": "cat"}, "a caption must be text"),
    (["a cat", ""], "an empty caption in a list"),
    (["a cat", None], "a caption must be text; it is None"),
    ("half a pair: \ud83d", r"a caption is not Unicode \(character 13\)"),
    ("a \0", "a caption has a NUL in it"),
])  # fmt: skip
def test_what_is_no_caption(value: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tables.read_captions(value)


def test_labels() -> None:
    cells = {"3": 3, " 0 ": 0, 7: 7, 3.0: 3, "3.0": 3, "": None, None: None, float("nan"): None}
    assert {cell: tables.read_label(cell) for cell in cells} == cells
    for value in (-1, "cat", True, 3.5, "3.5", [3], float("inf"), "1_0", "٣"):
        with pytest.raises(ValueError, match="the label must be a whole number from 0 on; it is "):
            tables.read_label(value)


def test_times() -> None:
    cells = {"12.5": 12.5, 3: 3.0, 0.25: 0.25, "1:30": 90.0, "01:02:03.250": 3723.25, " 0 ": 0.0, "": None, None: None}
    assert {cell: tables.read_seconds(cell) for cell in cells} == cells
    for value in (-1, "-1", "1:2:3:4", "1:75:00x", "abc", True, float("inf"), 1e300, 10**400, "1e3", [1], "1:", "12,5"):
        with pytest.raises(ValueError, match=r"a time must be seconds, or hh:mm:ss.mmm; it is "):
            tables.read_seconds(value)


def test_parts() -> None:
    assert tables.read_part("", "0:02") == (0.0, 2.0)
    assert tables.read_part(1, None) == (1.0, None)
    for start, end in ((2, 1), ("1.0", 1), (None, 0)):
        with pytest.raises(ValueError, match=r"start \(.*\) must lie before end"):
            tables.read_part(start, end)


def test_ids_and_splits() -> None:
    assert [tables.read_id(value) for value in ("a b ", 3)] == ["a b", "3"]
    for value in ("", None, 1.5, True):
        with pytest.raises(ValueError, match="id"):
            tables.read_id(value)
    assert [tables.read_split(value) for value in ("Train", "validation ", "dev", "test")] == [
        "train",
        "val",
        "val",
        "test",
    ]
    for value in ("", None, "holdout", 1):
        with pytest.raises(ValueError, match="split must be train, val or test; it is "):
            tables.read_split(value)


@pytest.mark.parametrize(("content", "captions", "label"), [
    ({"label": 3, "digits": []}, {}, 3),
    ({"caption": "a cat"}, {"caption": ("a cat",)}, None),
    ({"prompt": ["a cat", "the cat"]}, {"caption": ("a cat", "the cat")}, None),
    ({"captions": {"short": "cat", "long": ["a cat", "the cat"], "none": ""}},
     {"short": ("cat",), "long": ("a cat", "the cat")}, None),
    ({"captions": {"caption": "cat"}}, {"caption": ("cat",)}, None),
    ({"caption": "this", "captions": {"caption": "not this", "b": "c"}}, {"caption": ("this",), "b": ("c",)}, None),
])  # fmt: skip
def test_facts_beside_a_clip(content: object, captions: object, label: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert tables.read_facts_file(str(tmp_path / "a.json")) == (captions, label)
