from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from mutoscope.data.sources.folder import Folder, read_bytes


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


@pytest.fixture
def bucket() -> Iterator[str]:
    """A place behind a URL."""
    system = fsspec.filesystem("memory")
    system.pipe(
        {f"/bucket/set/{name}": name.encode() for name in ("a.mp4", "deep/er/b.mp4", ".hidden/c.mp4", "._a.mp4")}
    )
    yield "memory://bucket/set"
    system.rm("/bucket", recursive=True)


def test_files_are_listed_sorted_and_without_hidden_ones(tmp_path: Path) -> None:
    put(tmp_path, "b.mp4", "a/c.mp4", ".cache/d.mp4", "a/._c.mp4", "é/日本.mp4")
    faults: list[str] = []
    assert Folder(str(tmp_path)).files(faults) == ["a/c.mp4", "b.mp4", "é/日本.mp4"]
    assert Folder(str(tmp_path)).files(faults, "a") == ["a/c.mp4"]
    assert Folder(str(tmp_path)).files(faults, "none") == []
    assert not faults
    names = Folder(f"{tmp_path}/./").names()
    assert {name: names[name] for name in ("a", "b.mp4")} == {"a": True, "b.mp4": False}
    assert Folder(str(tmp_path)).names("b.mp4") == {}


def test_links_are_followed_and_never_in_a_circle(tmp_path: Path) -> None:
    put(tmp_path, "root/a.mp4", "elsewhere/b.mp4")
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "above").symlink_to(tmp_path)
    (tmp_path / "elsewhere/back").symlink_to(root)
    (root / "nowhere.mp4").symlink_to(tmp_path / "none.mp4")
    faults: list[str] = []
    files = Folder(str(root)).files(faults)
    assert files == ["a.mp4", "above/elsewhere/b.mp4", "linked/b.mp4"]
    assert faults == [f"{root}/nowhere.mp4: a link to a file that is not there; mend it or remove it"]


def test_a_file_is_found_however_it_is_written(tmp_path: Path) -> None:
    put(tmp_path, "set/clips/a.mp4", "other/b.mp4", "set/clips/odd\\name.mp4", "set/train/c.mp4")
    folder = Folder(str(tmp_path / "set"))
    inside, outside = f"{tmp_path}/set/clips/a.mp4", f"{tmp_path}/other/b.mp4"
    for name in ("clips/a.mp4", "./clips/a.mp4", "clips//a.mp4", "clips/../clips/a.mp4", "clips\\a.mp4",
                 ".\\clips\\a.mp4", inside):  # fmt: skip
        assert folder.find(name) == (inside, "clips/a.mp4"), name
    assert folder.find("clips/odd\\name.mp4")[1] == "clips/odd\\name.mp4"
    assert folder.find("c.mp4", "train")[1] == "train/c.mp4"
    assert folder.find(outside) == (outside, outside)
    path, name = folder.find("../other/b.mp4")
    assert Path(path).samefile(outside) and name == "../other/b.mp4"
    assert folder.find("https://host/x.mp4?a=b") == ("https://host/x.mp4?a=b",) * 2
    for name in ("none.mp4", "none/a.mp4", "clips", "A.MP4", "\\a.mp4"):
        with pytest.raises(ValueError, match=r"no such file: \S+"):
            folder.find(name)
    with pytest.raises(ValueError, match="can't be read: Not a directory: "):
        folder.find("clips/a.mp4/b.mp4")
    with pytest.raises(ValueError, match="can't be read: File name too long"):
        folder.find("x" * 300 + "/a.mp4")


def test_a_folder_behind_a_url(bucket: str) -> None:
    folder = Folder(f"{bucket}/")
    assert folder.files([]) == ["a.mp4", "deep/er/b.mp4"]
    assert folder.files([], "deep") == ["deep/er/b.mp4"]
    assert folder.files([], "none") == []
    assert {name: kind for name, kind in folder.names().items() if name[0] != "."} == {"a.mp4": False, "deep": True}
    assert folder.find("./deep/er/b.mp4") == (f"{bucket}/deep/er/b.mp4", "deep/er/b.mp4")
    assert folder.find(f"{bucket}/a.mp4") == (f"{bucket}/a.mp4", "a.mp4")
    assert folder.find("../more/x.mp4") == ("memory://bucket/more/x.mp4", "../more/x.mp4")  # Not asked for.
    assert read_bytes(f"{bucket}/a.mp4") == b"a.mp4"
    with pytest.raises(ValueError, match=f"no such file: {bucket}/none.mp4"):
        folder.find("none.mp4")
    with pytest.raises(ValueError, match=r"none.csv: no such file"):
        read_bytes(f"{bucket}/none.csv")


def test_no_such_folder(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    for root, text in (
        (f"{tmp_path}/none", "data.root=.*none: no such folder$"),
        (f"{tmp_path}/a.mp4", "a.mp4: not a folder"),
        ("memory://none", "memory://none: no such folder, or it is empty"),
        ("nonsense://x", "nonsense://x: can't be listed: ValueError: Protocol not known: nonsense"),
    ):
        with pytest.raises(ValueError, match=text):
            Folder(root)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "clips/a.mp4")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/clips").find("a.mp4")[0] == f"{tmp_path}/clips/a.mp4"
