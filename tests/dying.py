"""A worker of `mutoscope encode` that dies over a clip, as often as a file beside the store says."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from mutoscope.data import shards
from mutoscope.encode_shards import Shard, ShardEncoder, Told


class Dying(ShardEncoder):
    """Notes every clip that it encodes in STORE.encoded. Killed behind the fifth clip of shard 1 as many times as the
    file STORE.deaths has bytes."""

    def encode(self, shard: Shard, device: str) -> Iterator[Told]:
        shards.COMMIT_SECONDS = 0.0
        store = self.job.out.path
        deaths = store.with_suffix(".deaths")
        fatal = shard[0] * self.job.manifest.shard_items + 4
        places = {stored.key: stored.place for stored, _ in shard[1]}
        for told in super().encode(shard, device):
            with open(store.with_suffix(".encoded"), "a") as file:
                file.write(f"{told.key}\n")
            if shard[0] == 1 and places[told.key] >= fatal and (left := deaths.stat().st_size):
                os.truncate(deaths, left - 1)
                os.kill(os.getpid(), signal.SIGKILL)
            yield told


class Doomed(ShardEncoder):
    """Dies before it has encoded anything."""

    def encode(self, shard: Shard, device: str) -> Iterator[Told]:
        os._exit(7)


def set_deaths(store: Path, count: int) -> None:
    store.with_suffix(".deaths").write_bytes(b"x" * count)


def encoded(store: Path) -> list[str]:
    """The keys of the clips that were encoded, in the order in which they were."""
    return store.with_suffix(".encoded").read_text().split()
