"""What a process really holds and sends in an optimizer step, once all state is there.

The peak is that of torch's own allocator, by its profiler; what lived before is counted tensor by tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mutoscope.sharded import local
from mutoscope.training import loop
from mutoscope.training.state import TrainState

STEP = 2
"""That is measured, counted from 0: in the second DDP makes its buckets anew."""
WHOLE = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}
"""The collectives that training may use, and which of their arguments is whole."""


class Collectives(TorchDispatchMode):
    """Counts bytes by collective: those of the tensor that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d":
            self.sent[name] += sum(x.nbytes for x in tree_leaves(args[WHOLE[name]]) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of this process's parts."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(local, tensors)}
    return sum(storages.values())


@contextmanager
def measured(folder: Path, rank: int) -> Iterator[None]:
    """Training inside the block writes FOLDER/measured-RANK.json."""
    forward_backward, take_step = loop._forward_backward, TrainState.take_step
    profiler, collectives = profile(activities=[ProfilerActivity.CPU], profile_memory=True), Collectives()
    found: dict[str, Any] = {}

    def begin(recipe: Any, engine: Any, state: TrainState, *rest: Any) -> Any:
        if state.step != STEP:
            return forward_backward(recipe, engine, state, *rest)
        found["held"] = held(state)
        with profiler, collectives:
            return forward_backward(recipe, engine, state, *rest)

    def end(state: TrainState, *args: Any) -> Any:
        if state.step == STEP:
            events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
            used = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"]).cumsum(0)
            found["peak"] = sum(found["held"].values()) + int(used.max())
            found["held"]["gradients"] = nbytes(p.grad for p in state.model.parameters() if p.grad is not None)
            found["sent"] = collectives.sent
        return take_step(state, *args)

    with patch.object(loop, "_forward_backward", begin), patch.object(TrainState, "take_step", end):
        yield
    (folder / f"measured-{rank}.json").write_text(json.dumps(found))


def held(state: Any) -> dict[str, int]:
    """Bytes by part between two steps."""
    moments = [x for o in state.optimizers for kept in o.state.values() for x in kept.values()]
    return {
        "weights": nbytes([*state.model.parameters(), *state.model.buffers()]),
        "optimizer": nbytes(moments),
        "ema": nbytes(state.ema.averages.values()) if state.ema else 0,
        "buckets": sum(map(int, buckets.split(","))) if (buckets := _buckets(state.trainee)) else 0,
    }


def _buckets(trainee: Any) -> str:
    """The sizes of DDP's buckets, as it logs them."""
    if not isinstance(trainee, DistributedDataParallel):
        return ""
    return str(trainee._get_ddp_logging_data()["bucket_sizes"])
