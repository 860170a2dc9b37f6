"""Shards: what goes in comes out, a kill leaves a prefix, and no flipped bit is read as data."""

import os
import random
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mutoscope.data import shards
from mutoscope.data.shards import Shards, ShardWriter, StoreError

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.uint16, torch.uint32, torch.int64,
    torch.bool,
]  # fmt: skip


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that stands in for a kill needs no disk to be waited for; files look the same without."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    raw = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def sample_records(count: int = 6) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"clip {i}", torch.randn(2, i, generator=generator)) for i in range(count)]


def write(folder: Path, records: list[tuple[str, Tensor]], shard: int = 0) -> None:
    with ShardWriter(folder, shard) as writer:
        for key, tensor in records[len(writer.keys) :]:
            writer.append(key, tensor)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    values = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        values = bytes(v & 1 for v in values)
    raw = torch.tensor(list(values), dtype=torch.uint8)
    return torch.empty(shape, dtype=dtype) if count == 0 else raw.view(dtype).view(shape)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(st.characters(), max_size=8), tensors(), max_size=12),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory,
    no_sync: None,
    records: dict[str, Tensor],
    per_shard: int,
    per_session: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    items = list(records.items())
    for start in range(0, len(items), per_shard):
        mine = items[start : start + per_shard]
        for stop in range(per_session, len(mine) + per_session, per_session):  # the writer comes and goes
            write(folder, mine[:stop], start // per_shard)
    read = Shards(folder)
    assert list(read) == list(records)
    assert all(same_bytes(read.read(key), tensor) for key, tensor in items)


def test_a_kill_at_any_byte_is_resumed_to_the_same_bytes(tmp_path: Path, no_sync: None) -> None:
    records = sample_records()
    write(tmp_path / "whole", records)
    whole = contents(tmp_path / "whole")
    data, index = whole["00000.bin"], whole["00000.jsonl"]
    for cut in range(0, len(index) + 1, 3):
        torn = tmp_path / f"torn{cut}"
        torn.mkdir()
        (torn / "00000.jsonl").write_bytes(index[:cut])
        named = sum(t.nbytes for _, t in records[: index[:cut].count(b"\n")])
        (torn / "00000.bin").write_bytes(data[: named + cut % 11] if cut % 3 else data[:named] + b"\0" * (cut % 7))
        kept = Shards(torn)
        assert all(same_bytes(kept.read(key), tensor) for key, tensor in records[: len(kept)])
        write(torn, records)
        assert contents(torn) == whole


def test_records_whose_data_never_reached_the_disk_are_written_anew(tmp_path: Path, no_sync: None) -> None:
    records = sample_records()
    write(tmp_path / "whole", records)
    write(tmp_path / "torn", records)
    for size in reversed(range((tmp_path / "whole" / "00000.bin").stat().st_size)):
        os.truncate(tmp_path / "torn" / "00000.bin", size)
        write(tmp_path / "torn", records)
        assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_data_is_synced_before_the_line_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[str, int] = {}
    sync = os.fsync

    def watch(descriptor: int) -> None:
        sync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size
        for path in tmp_path.glob("*.jsonl"):
            lines, _ = shards._parse_index(path.read_bytes(), path, 0)
            ends = [record.offset + record.nbytes for _, record in lines]
            assert all(end <= synced[str(path.with_suffix(".bin"))] for end in ends)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(shards, "COMMIT_SECONDS", 0.0)
    write(tmp_path, sample_records())
    assert synced[str(tmp_path / "00000.bin")] == (tmp_path / "00000.bin").stat().st_size > 0
    assert synced[str(tmp_path / "00000.jsonl")] == (tmp_path / "00000.jsonl").stat().st_size > 0


def test_every_flipped_bit_is_found_and_its_shard_named(tmp_path: Path, no_sync: None) -> None:
    records = sample_records(4)
    write(tmp_path, records)
    rng = random.Random(0)
    for name, whole in contents(tmp_path).items():
        for _ in range(150):
            bit = rng.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(StoreError) as caught:
                read = Shards(tmp_path)
                for key, _ in records:
                    read.read(key)
            assert str(tmp_path) in str(caught.value)
            assert "00000" in str(caught.value) or "no record 'clip 3'" in str(caught.value)  # the last line's end
        (tmp_path / name).write_bytes(whole)
    damaged = bytearray((tmp_path / "00000.bin").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "00000.bin").write_bytes(damaged)
    with pytest.raises(StoreError, match=r"00000\.bin: record 'clip 3' .*remove 00000\.bin and 00000\.jsonl"):
        Shards(tmp_path).read("clip 3")
    assert same_bytes(Shards(tmp_path).read("clip 2"), records[2][1])


def test_a_shard_cut_short_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    write(tmp_path, sample_records())
    os.truncate(tmp_path / "00000.bin", 10)
    with pytest.raises(StoreError, match=r"00000\.bin: cut short: 10 bytes, record 'clip 3' ends at 48"):
        Shards(tmp_path).read("clip 3")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    write(tmp_path, sample_records())
    with pytest.raises(StoreError, match=r"no record 'clip 99' \(there are 6\)"):
        Shards(tmp_path).read("clip 99")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0), pytest.raises(StoreError, match="another process is writing"):
        ShardWriter(tmp_path, 0)
    with ShardWriter(tmp_path, 0) as writer:
        assert writer.keys == []


def test_a_reader_sees_what_was_appended_to_a_mapped_shard(tmp_path: Path) -> None:
    records = sample_records()
    write(tmp_path, records[:3])
    read = Shards(tmp_path)
    read.read("clip 2")
    write(tmp_path, records)
    read.records = Shards(tmp_path).records
    assert same_bytes(read.read("clip 5"), records[5][1])


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    records = [(str(i), torch.full((1000,), float(i))) for i in range(4)]
    write(tmp_path, records[:1])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError), ShardWriter(tmp_path, 0) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
            for key, tensor in records[1:]:
                writer.append(key, tensor)
            writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(Shards(tmp_path)) == ["0"]
    write(tmp_path, records)
    assert all(same_bytes(Shards(tmp_path).read(key), tensor) for key, tensor in records)
