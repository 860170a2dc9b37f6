"""Members of tar files, by their headers; and what is said of tars that are damaged."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutoscope.data.sources.tar import Member, TarError, read_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(files: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, **pax: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), pax
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def members_of(tar: bytes) -> list[Member]:
    return list(read_members(io.BytesIO(tar), len(tar)))


def contents(tar: bytes) -> list[tuple[str, bytes]]:
    return [(m.name, tar[m.offset : m.offset + m.size]) for m in members_of(tar)]


names = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/.", exclude_categories=["C"]), min_size=1,
                         max_size=60), min_size=1, max_size=4).map("/".join)  # fmt: skip


@given(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6), st.sampled_from(["gnu", "pax"]))
def test_what_tarfile_writes_is_found(files: list[tuple[str, bytes]], form: str) -> None:
    assert contents(tar_of(files, FORMATS[form])) == files


@pytest.mark.parametrize("form", FORMATS)
def test_names_of_up_to_255_bytes_in_any_format(form: str) -> None:
    files = [("f" * 100, b"one"), ("d" * 150 + "/" + "n" * 90 + ".mp4", b"two" * 400), ("short", b"")]
    assert contents(tar_of(files, FORMATS[form])) == files


def test_very_long_names_and_comments() -> None:
    name = "/".join(["x" * 200] * 30)
    for form in ("gnu", "pax"):
        assert contents(tar_of([(name, b"v"), ("after", b"w")], FORMATS[form])) == [(name, b"v"), ("after", b"w")]
    assert contents(tar_of([("a", b"v")], comment="a pax header that says nothing of use")) == [("a", b"v")]


def test_sizes_beyond_8_gib_are_understood() -> None:
    header = tarfile.TarInfo("big")
    header.size = 9 * 2**30
    for form, blocks in (("gnu", 1), ("pax", 3)):
        head = header.tobuf(FORMATS[form])
        assert len(head) == blocks * 512
        found = read_members(io.BytesIO(head), 10 * 2**30)  # Sparse in thought: nothing behind the header is read.
        assert next(found) == Member("big", len(head), 9 * 2**30)


def test_folders_are_passed_over_and_dots_cut(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/a.mp4").write_bytes(b"video")
    subprocess.run(["tar", "-C", tmp_path / "in", "-cf", tmp_path / "x.tar", "."], check=True)
    assert contents((tmp_path / "x.tar").read_bytes()) == [("deep/a.mp4", b"video")]


def typed(kind: bytes, name: str = "a.mp4") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "b.mp4"
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def resized(size: bytes) -> bytes:
    """A header that says another size, with the right checksum."""
    head = bytearray(tar_of([("a.mp4", b"v")], tarfile.USTAR_FORMAT)[:512])
    head[124 : 124 + len(size)] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(2048)


GOOD = tar_of([("a.mp4", b"v" * 700), ("b.mp4", b"w" * 700)], tarfile.USTAR_FORMAT)
"""Headers at 0 and 1536, the end at 3072."""


@pytest.mark.parametrize(("tar", "reason"), [
    (b"", "the file is empty"),
    (b"short", "cut short: it ends at byte 5, within a header"),
    (b"no tar, but text." * 100, "not a tar, or damaged: header at byte 0"),
    (b"\x1f\x8b" + bytes(1000), "compressed, .* use gunzip"),
    (b"\x28\xb5\x2f\xfd" + bytes(1000), "use unzstd"),
    (GOOD[:1000], "cut short: a.mp4 in it ends at byte 1212, the tar at 1000; fetch or write it again"),
    (GOOD[:1800], "cut short: it ends at byte 1800, within a header"),
    (GOOD[:3072], "cut short: it ends at byte 3072 without the zeros that end a tar"),
    (GOOD[:1536] + b"garbage!" * 64 + GOOD[2048:], "damaged: header at byte 1536"),  # tarfile takes this for the end.
    (GOOD[:1024] + GOOD, "damaged: header at byte 1536"),
    (GOOD + GOOD, "more behind its end at byte 3072, as `cat` leaves it"),
    (typed(tarfile.SYMTYPE), "a.mp4 in it is a symbolic link"),
    (typed(tarfile.LNKTYPE), "a.mp4 in it is a hard link"),
    (typed(tarfile.GNUTYPE_SPARSE), "a.mp4 in it is a sparse file"),
    (typed(tarfile.FIFOTYPE), "a.mp4 in it is a pipe"),
    (typed(b"Z"), "a.mp4 in it is of the unknown type b'Z'"),
    (typed(b"0", "../../etc/passwd"), "leads out of the archive"),
    (typed(b"0", "/etc/passwd"), "leads out of the archive"),
    (typed(b"0", "a\nb"), "control characters"),
    (typed(b"0", "caf\udce9.mp4"), "is not UTF-8"),
    (resized(b"77777777777"), "cut short: a.mp4 in it ends at byte 8589935103"),
    (resized(b"\xff" * 12), "a size of -1 bytes"),
    (resized(b"\x80" + b"\x7f" * 11), "cut short"),
    (resized(b"eight"), "not a tar, or damaged: header at byte 0"),
    (tar_of([("a", b"v")], **{"GNU.sparse.major": "1"}), "a in it is a sparse file"),
    (tar_of([("a", b"v")], size="many"), "a size of many bytes in a pax header"),
    (tar_of([("a", b"v")], comment="x").replace(b"13 comment=x", b"99 comment=x"), "damaged: a pax header"),
    (tar_of([("n" * 300, b"v")])[:1024] + bytes(1024), "a name is announced before byte 1024"),
])  # fmt: skip
def test_what_can_not_be_read_says_why(tar: bytes, reason: str) -> None:
    with pytest.raises(TarError, match=reason):
        members_of(tar)


def test_a_chain_of_headers_does_not_recurse() -> None:
    """tarfile recurses for each, and would follow the absurd length."""
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, 5
    chain = (head.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * 3000
    assert contents(chain + tar_of([("a", b"v")], tarfile.USTAR_FORMAT)) == [("name", b"v")]
    head.size = 2**33
    with pytest.raises(TarError, match="damaged: a name or a pax header of 8589934592 bytes"):
        members_of(head.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_mutated_tars_give_what_is_there_or_an_error() -> None:
    files = [(f"{n:03d}.{ext}", bytes([n]) * (300 * n)) for n in range(4) for ext in ("mp4", "txt")]
    files.append(("long" * 20 + ".mp4", b"x" * 600))
    tars = [tar_of(files, form) for form in FORMATS.values()]
    random_of = random.Random(0)
    errors, begun = 0, time.monotonic()
    for n in range(300):
        tar = bytearray(tars[n % 3])
        for _ in range(random_of.choice((1, 1, 3, 30))):
            place = random_of.randrange(len(tar))
            match random_of.randrange(4):
                case 0:
                    tar[place] = random_of.randrange(256)
                case 1:
                    del tar[place : place + random_of.choice((1, 512, 4000))]
                case 2:
                    tar[place:place] = random_of.randbytes(random_of.choice((1, 512)))
                case 3:  # In a header, most likely.
                    tar[min(place // 512 * 512 + random_of.randrange(100, 160), len(tar) - 1)] = random_of.randrange(
                        256
                    )
            if not tar:
                break
        try:
            for member in members_of(bytes(tar)):
                assert 0 <= member.offset <= member.offset + member.size <= len(tar)
        except TarError:
            errors += 1
    assert 100 < errors < 300
    assert time.monotonic() - begun < 60  # A hang, not a slow machine.
