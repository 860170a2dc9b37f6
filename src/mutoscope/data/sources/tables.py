"""Metadata files as rows, and what their cells say: CSV, TSV, JSON Lines, JSON, Parquet, and files of plain lines.

Whatever would put a caption beside the wrong clip is an error here that names the line: a row with more or fewer
cells than the header, a quote that is never closed, bytes that are not UTF-8. Nothing is left out but blank lines and a
header that is repeated.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from mutoscope.data.sources.folder import read_bytes
from mutoscope.data.sources.parquet import read_table
from mutoscope.errors import did_you_mean

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Suffixes of files that `rows` reads."""
CAPTIONS = ("caption", "text", "prompt")
"""Columns, and keys in JSON, that are taken for captions where none is named; the first that there is."""
VIDEOS = ("video", "path", "file_name")
"""Columns that are taken for videos where none is named; the first that there is."""
PLAIN = "caption"
"""The kind of a caption that nobody named."""
LONGEST_CELL = 2**31 - 1
"""Characters; Python's csv module refuses cells above 131,072 else."""
LONGEST_TIME = 1e9
"""Seconds, to tell a time from a time stamp."""
_TIME = r"(?:(?:([0-9]{1,6}):)?([0-9]{1,2}):)?([0-9]{1,9}(?:\.[0-9]{0,30})?)"

Row = tuple[str, dict[str, Any]]
"""Where a row is ("line 3"; rows of Parquet files and items of JSON lists count from 0), and its cells by column."""
SplitName = Literal["train", "val", "test"]
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
}
"""What the parts of a data set are called, in columns and as folders."""


def rows(path: str, faults: list[str]) -> Iterator[Row]:
    """The rows of a table, here or at a URL, by its suffix. What makes no sense is left out and added to `faults`,
    with path and line.

    Raises ValueError where the whole file makes none.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        return ((f"row {k}", row) for k, row in enumerate(read_table(path)))
    if suffix not in TABLES:
        raise ValueError(f"{path}: no table that can be read; it must end in {', '.join(TABLES)}")
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        return _separated(text, path, suffix == ".tsv", faults)
    return _json(text, path, faults)


def read_text(path: str) -> str:
    """What a text file says, here or at a URL. Raises ValueError, with line and byte, where it is not UTF-8."""
    return decode(read_bytes(path), path)


def decode(data: bytes, path: str) -> str:
    """UTF-8, with or without a byte order mark. Raises ValueError, with line and byte, where it is something else."""
    body = data.removeprefix(codecs.BOM_UTF8)
    fault, at, text = "", -1, ""
    try:
        text = body.decode()
        if "\0" in text:
            fault, at = "a NUL: the file is damaged, or no UTF-8 text", body.find(b"\0")
    except UnicodeDecodeError as error:
        utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        fault, at = "UTF-16, not UTF-8" if utf_16 else "not UTF-8", error.start
    if fault:
        line, at = 1 + body.count(b"\n", 0, at), at + len(data) - len(body)
        raise ValueError(f"{path}, line {line}: {fault} (byte {at} of the file); save it as UTF-8")
    return text


def lines(text: str) -> list[str]:
    """Lines that end in LF, CRLF or CR, and in nothing else that Unicode calls a line's end; without blank ones at the
    end. Line n of the file is item n - 1."""
    found = re.split(r"\r\n|\r|\n", text)
    while found and not found[-1].strip():
        found.pop()
    return found


def find_column(columns: Iterable[str], wanted: str | None, usual: Sequence[str], option: str) -> str | None:
    """The column that is wanted; or, where none is, the first usual one that there is, in any case, or None.

    Raises ValueError where a wanted one is not there.
    """
    known = list(columns)
    if wanted is not None:
        if wanted not in known:
            hint = did_you_mean(wanted, known, f"; there is {name_some(known)}")
            raise ValueError(f"no column {wanted!r} (data.{option}){hint}")
        return wanted
    by_name = {name.lower(): name for name in reversed(known)}
    return next((by_name[name] for name in usual if name in by_name), None)


def name_some(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def caption_columns(columns: Iterable[str], wanted: Sequence[str]) -> dict[str, str]:
    """The columns with captions, by the kind of those. Raises ValueError where a wanted one is not there."""
    known = list(columns)
    if len(wanted) > 1:
        return {str(find_column(known, name, (), "caption_columns")): name for name in wanted}
    column = find_column(known, wanted[0] if wanted else None, CAPTIONS, "caption_columns")
    return {} if column is None else {PLAIN: column}


def is_empty(value: object) -> bool:
    """Whether a cell says nothing: None, blanks, or the NaN that pandas has for it."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def read_captions(value: object) -> tuple[str, ...]:
    """The captions in a cell: one, or a list of alternatives. Nothing where the cell is empty.

    Raises ValueError for what is no caption, and for an empty one in a list.
    """
    if is_empty(value):
        return ()
    several = value if isinstance(value, list) else (value,)
    found = tuple([read_string(each, "a caption").strip() for each in several])
    if not all(found):
        raise ValueError("an empty caption in a list of captions; write it or remove it")
    return found


def read_string(value: object, what: str) -> str:
    """Text that can be stored. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text; it is {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not Unicode (character {error.start}): {value!r:.40}") from None
    if "\0" in value:
        raise ValueError(f"{what} has a NUL in it: {value!r:.40}")
    return value


def read_label(value: object) -> int | None:
    """A class index from 0 on; None where the cell is empty. Raises ValueError for what is none."""
    if is_empty(value):
        return None
    # Columns with gaps come out of pandas as 3.0.
    number = None if isinstance(value, bool) else re.fullmatch(r"([0-9]{1,18})(\.0*)?", str(value).strip())
    if number is None:
        raise ValueError(f"the label must be a whole number from 0 on; it is {value!r:.40}")
    return int(number[1])


def read_seconds(value: object) -> float | None:
    """A time in seconds, from 12.5, "12.5" or "hh:mm:ss.mmm"; None where the cell is empty. Raises ValueError for what
    is none."""
    if is_empty(value):
        return None
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value) if abs(value) < LONGEST_TIME else seconds
    elif isinstance(value, str) and (time := re.fullmatch(_TIME, value.strip())):
        hours, minutes, rest = time.groups(default="0")
        seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest)
    if not 0 <= seconds < LONGEST_TIME:
        raise ValueError(f"a time must be seconds, or hh:mm:ss.mmm; it is {value!r:.40}")
    return seconds


def read_id(value: object) -> str:
    """A clip's own id: text or a whole number. Raises ValueError for anything else, and where the cell is empty."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if is_empty(value):
        raise ValueError("no id; write one in each row, or leave the column out")
    return read_string(value, "an id").strip()


def read_split(value: object) -> SplitName:
    """train, val (also validation, valid or dev) or test. Raises ValueError for anything else."""
    name = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if name is None:
        raise ValueError(f"split must be train, val or test; it is {value!r:.40}")
    return name


def read_part(start: object, end: object) -> tuple[float, float | None]:
    """The part of a file that is the clip, in seconds. Raises ValueError for times that are none, or none behind the
    other."""
    first, last = read_seconds(start) or 0.0, read_seconds(end)
    if last is not None and first >= last:
        raise ValueError(f"start ({start}) must lie before end ({end})")
    return first, last


def read_kinds(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The captions in a row, by kind, from the column of each. Kinds whose cell is empty are left out.

    Raises ValueError for what is no caption, and where all cells are empty.
    """
    captions = {}
    for kind, column in columns.items():
        if found := read_captions(row.get(column)):
            captions[kind] = found
    if columns and not captions:
        raise ValueError(f"no caption in {' or '.join(columns.values())}; write one or remove the row")
    return captions


def read_caption_file(path: str) -> tuple[str, ...]:
    """The caption that a .txt file beside a clip is. Raises ValueError where it is empty or not UTF-8."""
    caption = read_text(path).strip()
    if not caption:
        raise ValueError(f"{path}: the caption is empty; write one, or remove the file")
    return (caption,)


def read_facts_file(path: str) -> tuple[dict[str, tuple[str, ...]], int | None]:
    """Captions by kind, and the label, that a .json file beside a clip has: {"label": 3, "caption": one or a list,
    "captions": {"short": one or a list, ...}}. The plain caption may also be called text or prompt.

    Raises ValueError where it says something else under these names, or is no JSON object.
    """
    text = read_text(path)
    try:
        facts = _parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f'{path}: must be an object, as in {{"label": 3}}')
    kinds = facts.get("captions", {})
    if not isinstance(kinds, dict):
        raise ValueError(f'{path}: "captions" must be an object, as in {{"short": "a cat", "long": "a cat on a mat"}}')
    plain = next((facts[name] for name in CAPTIONS if name in facts), None)
    try:
        found = {kind: read_captions(value) for kind, value in {**kinds, PLAIN: plain or kinds.get(PLAIN)}.items()}
        return {kind: captions for kind, captions in found.items() if captions}, read_label(facts.get("label"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _separated(text: str, path: str, tab: bool, faults: list[str]) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    head = text.lstrip().partition("\n")[0]
    # Where the comma is the decimal point, spreadsheets write semicolons.
    delimiter = "\t" if tab else ";" if ";" in head and "," not in head else ","
    # Strict, for else a quote that is never closed swallows the rows after it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            faults.append(f"{path}, line {line}: {error}; a cell that begins with a quote ends with one, and quotes "
                          "inside of it are doubled")  # fmt: skip
            return
        if cells is None:
            return
        if not "".join(cells).strip():
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if twice := sorted({name for name in header if name and header.count(name) > 1}):
                raise ValueError(f"{path}, line {line}: two columns are called {', '.join(twice)}; rename one")
        elif len(cells) != len(header):
            faults.append(f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}; a cell with a "
                          f"{'tab' if tab else 'comma'} or a line's end in it must be in quotes")  # fmt: skip
        elif cells[0].strip() != header[0] or [cell.strip() for cell in cells] != header:  # Joined files repeat it.
            row = dict(zip(header, cells, strict=True))
            row.pop("", None)  # pandas writes its index in a column without a name.
            yield f"line {line}", row


def _json(text: str, path: str, faults: list[str]) -> Iterator[Row]:
    """A list of objects, {"data": a list of objects}, or an object in each line, whatever the suffix."""
    if not text.strip():
        return
    whole: Any = None
    try:
        whole = _parse(text)
    except ValueError as error:
        # Extra data: there is more behind the first object, as in JSON Lines.
        if text.lstrip()[0] == "[" or (path.lower().endswith(".json") and "Extra data" not in str(error)):
            raise ValueError(f"{path}: not JSON: {error}") from error
    if isinstance(whole, dict):
        whole = whole["data"] if isinstance(whole.get("data"), list) else [whole]
    if whole is not None:
        items = whole if isinstance(whole, list) else [whole]
        yield from ((f"item {k}", row) for k, row in enumerate(items) if _is_row(row, f"{path}, item {k}", faults))
        return
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            try:
                row = _parse(line)
            except ValueError as error:
                faults.append(f"{path}, line {number}: not JSON: {error}")
                continue
            if _is_row(row, f"{path}, line {number}", faults):
                yield f"line {number}", row


def _parse(text: str) -> Any:
    """JSON. Raises ValueError for anything else, and for objects with a key twice: one of the two would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("brackets within brackets without end") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.40} twice in an object")
    return found


def _is_row(row: object, where: str, faults: list[str]) -> bool:
    if not isinstance(row, dict):
        faults.append(f'{where}: must be an object, as in {{"video": "a.mp4", "caption": "a cat"}}')
    return isinstance(row, dict)
