"""Which files are shards."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from mutoscope.data.sources.shard_files import Shard, expand_braces, find_shards, saved_dataset


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(("pattern", "stands_for"), [
    ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
    ("{9..11}", ["9", "10", "11"]),
    ("{2..0}", ["2", "1", "0"]),
    ("{000..1}-{a,b}", ["000-a", "000-b", "001-a", "001-b"]),
    ("{,x}", ["", "x"]),
    ("{a}{}{1..b}", ["{a}{}{1..b}"]),
    ("plain", ["plain"]),
])  # fmt: skip
def test_braces_stand_for_what_they_do_in_a_shell(pattern: str, stands_for: list[str]) -> None:
    assert expand_braces(pattern) == stands_for


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..99999}{0..99999}", "{0..1000000}"])
def test_braces_for_too_many_shards(pattern: str) -> None:
    with pytest.raises(ValueError, match="1000000 are the most"):
        expand_braces(pattern)


def test_folders_globs_and_single_shards(tmp_path: Path) -> None:
    put(tmp_path, "b/1.tar", "a.TAR", "b/.hidden.tar", ".cache/x.tar", "notes.txt", "b/x[1].tar")
    at = lambda *names: [Shard(str(tmp_path / name), name[:-4]) for name in names]
    assert find_shards(str(tmp_path), ".tar") == at("a.TAR", "b/1.tar", "b/x[1].tar")
    assert find_shards(f"{tmp_path}/**/*.tar", ".tar") == at("b/1.tar", "b/x[1].tar")
    assert find_shards(f"{tmp_path}//b/../b/?.tar", ".tar") == [Shard(str(tmp_path / "b/1.tar"), "1")]
    assert find_shards(f"{tmp_path}/{{a,b}}/{{1..2}}.tar", ".tar") == at("a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar")
    assert find_shards(f"{tmp_path}/{{a,b}}/[1].tar", ".tar") == at("b/1.tar")
    assert find_shards(f"{tmp_path}/b/x[1].tar", ".tar") == [Shard(str(tmp_path / "b/x[1].tar"), "x[1]")]
    assert find_shards(f"{tmp_path}/a.TAR", ".tar") == [Shard(str(tmp_path / "a.TAR"), "a")]


def test_a_glob_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(put(tmp_path, "x.tar", "in/y.tar"))
    assert find_shards("*.tar", ".tar") == [Shard("x.tar", "x")]
    assert find_shards("./in/*", ".tar") == [Shard("in/y.tar", "y")]


@pytest.mark.parametrize("scheme", ["memory:/", "file://"])
def test_urls(scheme: str, tmp_path: Path) -> None:
    root = f"{scheme}{tmp_path}"
    for name in ("a.tar", "b/1.tar", "b/2.tar", "b/.hid.tar", "b/no.txt"):
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"x")
    names = lambda shards: [(shard.name, fsspec.open(shard.path, "rb").open().read()) for shard in shards]
    assert names(find_shards(root, ".tar")) == [("a", b"x"), ("b/1", b"x"), ("b/2", b"x")]
    assert names(find_shards(f"{root}/b/*.tar", ".tar")) == [("1", b"x"), ("2", b"x")]
    assert names(find_shards(f"{root}/**/*.tar", ".tar")) == [("a", b"x"), ("b/1", b"x"), ("b/2", b"x")]
    assert names(find_shards(f"{root}/b/{{1..2}}.tar", ".tar")) == [("1", b"x"), ("2", b"x")]
    assert names(find_shards(f"{root}/a.tar", ".tar")) == [("a", b"x")]


@pytest.mark.parametrize(("name", "split"), [
    ("train-00000-of-00012", "train"), ("data/validation-00000", "val"), ("Val/0001", "val"), ("valid.0", "val"),
    ("test_3", "test"), ("train/test-0", "test"), ("0001", None), ("trains/0", None), ("devil-1", None), ("val", "val"),
    ("sports/train", "train"),
])  # fmt: skip
def test_splits_by_name(name: str, split: str | None) -> None:
    assert Shard("", name).split == split


@pytest.mark.parametrize(("root", "reason"), [
    ("none", "no such folder"),
    ("none/*.tar", r"no \*.tar there$"),
    ("other", r"no \*.tar there, only notes.txt"),
    ("packed", r"1 compressed shards, .* unpack them \(gunzip.*\n  .*/b.tar.gz"),
    ("packed/b.tar.gz", "1 compressed shards"),
    ("packed/*", "1 compressed shards"),
    ("nobackend://x/*.tar", "can't be listed: ValueError: Protocol not known"),
])  # fmt: skip
def test_where_there_are_none(root: str, reason: str, tmp_path: Path) -> None:
    put(tmp_path, "other/notes.txt", "packed/a.tar", "packed/b.tar.gz")
    with pytest.raises(ValueError, match=reason):
        find_shards(root if "://" in root else str(tmp_path / root), ".tar")


def test_what_save_to_disk_lists(tmp_path: Path) -> None:
    put(tmp_path, "one/cache-123.arrow")
    files = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    state = json.dumps({"_data_files": files, "_fingerprint": "abc"})
    for part in ("one", "two/train", "two/test"):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / part / "state.json").write_text(state)
    (tmp_path / "two/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [shard.name for shard in saved_dataset(f"{tmp_path}/one")] == [
        "data-00000-of-00002",
        "data-00001-of-00002",
    ]
    two = saved_dataset(f"{tmp_path}/two")
    assert [(shard.split, Path(shard.path).relative_to(tmp_path).as_posix()) for shard in two] == [
        (part, f"two/{part}/data-0000{n}-of-00002.arrow") for part in ("train", "test") for n in range(2)
    ]


@pytest.mark.parametrize(("file", "text", "reason"), [
    ("state.json", '{"_data_files": [{"filename": "../../x.arrow"}]}', "state.json: not as Dataset.save_to_disk"),
    ("state.json", '{"_data_files": [{"name": "x.arrow"}]}', "no list of names under _data_files"),
    ("state.json", '{"_data_files": null}', "no list of names under _data_files"),
    ("state.json", "[]", "no list of names under _data_files"),
    ("state.json", "{", "no list of names under _data_files"),
    ("state.json", b"\xff", "not UTF-8"),
    ("dataset_dict.json", '{"splits": ["train"]}', "train/state.json: no such file; layout arrow wants"),
    ("other.json", "{}", "state.json: no such file; layout arrow wants a folder that Dataset.save_to_disk wrote"),
])  # fmt: skip
def test_what_save_to_disk_never_writes(file: str, text: str | bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=reason):
        saved_dataset(str(tmp_path))


def test_arrow_files_have_to_be_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="maps files into memory, which a URL can't be; fetch the folder, or write"):
        saved_dataset("memory://data")
    with pytest.raises(ValueError, match="no such folder"):
        saved_dataset(str(tmp_path / "none"))
