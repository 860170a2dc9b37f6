"""Shards of clips encoded by actors of a Ray cluster, through Ray Data. The only file that knows Ray.

Ray Data hands out shards, starts actors and starts them anew where they die, and streams back what they tell, clip by
clip. What becomes of the shard of an actor that has died is decided in `encode_shards.py`, as for processes, and not by
Ray's own retries: it reports a task whose actor died as failed while it already runs it again.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mutoscope.encode_shards import Job, Shard, ShardEncoder, Tell, Told

LOCAL = "local"
"""The address of a cluster that is started on this machine, for this job alone."""


@contextmanager
def cluster(address: str, cpus: int) -> Iterator[None]:
    """Connected to the Ray cluster at an address: local, auto, HOST:PORT or ray://HOST:PORT. A connection that is there
    already is used and kept.

    cpus: of a local cluster; 0 takes this machine's. Raises ValueError where Ray is not installed or not there.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ValueError(f'--ray: {error}; pip install "mutoscope[ray]"') from None
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # It would be sent to Ray's makers.
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        os.environ.setdefault("RAY_worker_niceness", "0")  # as this process is; Ray's way is 15
        options |= {"include_dashboard": False, "num_cpus": cpus or None}
    with _quiet():
        try:
            if port := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)(/.*)?", address):  # Ray would try it for minutes
                socket.create_connection((port[1], int(port[2])), timeout=20).close()
            ray.init(address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"--ray {address}: no Ray cluster there: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def on_ray(job: Job, workers: int, shards: list[Shard], tell: Tell) -> dict[int, str]:
    """An Engine, given the job and the number of actors (0: as many as there are GPUs, or CPUs), within `cluster`.

    An actor has a GPU, where the cluster has any, and one thread.
    """
    import ray
    import ray.data

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    size = min(workers or gpus or int(resources.get("CPU", 1)), len(shards))
    rows = [{"shard": number, "work": pickle.dumps(work)} for number, work in shards]
    told: dict[int, int] = {}
    with _quiet():
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1
        context.target_max_block_size = 1  # a block for each row that comes back, so that it comes at once
        with ray.data.DataContext.current(context):
            # A block, and so a task, for each shard.
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
                _Actor,
                fn_constructor_kwargs={"job": job, "device": "cuda" if gpus else "cpu", "folder": os.getcwd()},
                compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
                num_cpus=0 if gpus else 1,
                num_gpus=1 if gpus else 0,
                max_restarts=-1,
                max_task_retries=0,
            )
            for row in results.iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])
                told[row["shard"]] = told.get(row["shard"], 0) + 1
                tell(Told(row["key"], row["reason"]))
    how = "its actor died; Ray's lines above and its log say how"
    return {number: how for number, work in shards if told.get(number, 0) < len(work)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's warnings of its future (max_task_retries has no other place yet), and its log of the work and of
    errors, which are told here."""
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(before)


class _Actor:
    """What Ray Data calls for each shard, in an actor."""

    def __init__(self, job: Job, device: str, folder: str) -> None:
        if os.path.isdir(folder):  # that relative paths are below
            os.chdir(folder)
        self.encoder, self.device = ShardEncoder(job, threads=1), device

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        answer = {"shard": row["shard"], "key": "", "reason": "", "error": b""}
        here = socket.gethostname()
        try:
            for told in self.encoder.encode((row["shard"], pickle.loads(row["work"])), self.device):
                reason = f"{told.reason} (on {here})" if told.reason else ""
                yield answer | {"key": told.key, "reason": reason}
        except Exception as error:
            error.add_note(f"on {here}:\n{traceback.format_exc()}")
            yield answer | {"error": pickle.dumps(error)}
