import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# What is remembered between runs is not remembered between test runs, nor left in the home of whoever runs them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mutoscope-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A deadline per example measures how busy the machine is.
settings.register_profile("mutoscope", deadline=None)
settings.load_profile("mutoscope")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The last bits of what an autoencoder makes hang on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """New stores have ten clips to a shard, so that the 64 clips of Flying MNIST's tiny preset are work for several."""
    from mutoscope.data.store import Manifest

    monkeypatch.setattr("mutoscope.encoder.Manifest", lambda **fields: Manifest(**fields, shard_items=10))
