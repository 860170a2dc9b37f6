"""Networks whose tokens are shared by processes: what they predict, their gradients, and who computes how much."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from mutoscope.models.cogvideox import CogVideoX
from mutoscope.models.dit import DiT
from mutoscope.models.gpt import GPT
from mutoscope.models.stdit import STDiT
from mutoscope.models.ulysses import ContextGroup, share_sequence
from mutoscope.recipe import Parallel
from mutoscope.training.engine import Engine
from mutoscope.training.offload import recomputed
from mutoscope.types import Cond, ModelIO

IO = ModelIO(channels=3, grid=(4, 6, 6), text_dim=12, num_labels=5)  # 9 tokens a frame
COG = ModelIO(channels=4, grid=(3, 6, 6), text_dim=32)  # 27 tokens beside 32 of text
NETWORKS: dict[str, tuple[Callable[[], nn.Module], ModelIO]] = {
    "factorised": (lambda: DiT(depth=2, width=32, heads=4, patch=(2, 2, 2)).build(IO), IO),
    "joint": (lambda: DiT(depth=2, width=32, heads=4, patch=(2, 2, 2), attention="joint").build(IO), IO),
    "stdit1": (lambda: STDiT(version=1, depth=1, width=32, heads=4, patch=(1, 2, 2)).build(IO), IO),
    "stdit2": (lambda: STDiT(version=2, depth=1, width=32, heads=4, patch=(1, 2, 2)).build(IO), IO),
    "stdit3": (lambda: STDiT(version=3, depth=1, width=32, heads=4, patch=(1, 2, 2)).build(IO), IO),
    "2b": (lambda: CogVideoX(path="tiny://cogvideox-2b", weights="fp32").build(COG), COG),
    "t2v": (lambda: CogVideoX(path="tiny://cogvideox-t2v", weights="fp32").build(COG), COG),
    "1.5-i2v": (lambda: CogVideoX(path="tiny://cogvideox-1.5-i2v", task="i2v", weights="fp32").build(COG), COG),
}


def inputs(name: str) -> tuple[Tensor, Tensor, Cond]:
    """Of two videos."""
    io = NETWORKS[name][1]
    draw = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)
    x, time = normal(2, io.channels, 4 if name == "1.5-i2v" else io.grid[0], *io.grid[1:]), torch.tensor([10.0, 900.0])
    if io is COG:
        text, mask = normal(2, 32, 32), torch.ones(2, 32, dtype=torch.bool)
        return x, time, Cond(text=text, text_mask=mask, known=normal(*x.shape) if name == "1.5-i2v" else None)
    mask = torch.arange(5)[None] < torch.tensor([[3], [5]])
    return x, time, Cond(text=normal(2, 5, 12) * mask[..., None], text_mask=mask, label=torch.arange(2))


def shaken(name: str) -> nn.Module:
    """The network in fp64, without a zero that something could hide behind."""
    model, draw = NETWORKS[name][0](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return model.double()


def backward(model: nn.Module, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction, and the gradients of a loss of it."""
    out = model(*inputs(name))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def tokens_seen(model: nn.Module) -> list[int]:
    """Filled, as the model runs, with how many tokens of video each block computes on."""
    seen: list[int] = []

    def note(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append(x.shape[1:-1].numel())

    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def compare(rank: int, world: int, port: int, names: list[str]) -> None:
    """Be one of the processes. The whole network, which no process shares, is the reference."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    group = ContextGroup(dist.group.WORLD, rank, world)
    check_samples(group)
    for name in names:
        whole, shared = shaken(name), shaken(name)
        expected, gradients = backward(whole, name)
        share_sequence(shared, group)
        seen = tokens_seen(shared)
        for block in shared.blocks:  # type: ignore[union-attr]
            block.forward = recomputed(block.forward)
        found, own = backward(shared, name)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        # Some gradients are zero but for rounding: of what is added to all keys alike
        rounding = 1e-12 * max(float(gradient.abs().max()) for gradient in gradients.values())
        assert own.keys() == gradients.keys()
        for key, gradient in gradients.items():
            mean = own[key].clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(
                mean / world, gradient, rtol=1e-8, atol=rounding, msg=lambda m, at=f"{name}, {key}": f"{at}: {m}"
            )
        one = tokens_seen(whole)
        whole(*inputs(name))
        n = one[0] if NETWORKS[name][1] is COG else 9  # of which processes get stretches: of the video or of each frame
        assert set(seen) == {one[0] // n * len(range(rank, n, world))}, name
    dist.destroy_process_group()


def check_samples(group: ContextGroup) -> None:
    """Processes of a group must have the same samples, and others must not."""
    apart = Engine(group.rank, group.size, torch.device("cpu"))
    together = replace(apart, parallel=Parallel(context=group.size), context=group)
    together.check_apart([3, 4])
    together.check_shared(["a", "b"], [3, 4])
    with pytest.raises(RuntimeError, match="trained on by two processes"):
        apart.check_apart([3, 4])
    for ids, samples in ((["a", f"b{group.rank}"], [3, 4]), (["a", "b"], [3, group.rank])):
        with pytest.raises(RuntimeError, match=r"would train on a, b.*those that share its samples"):
            together.check_shared(ids, samples)
    assert float(together.sum(torch.tensor(5.0))) == float(together.mean(torch.tensor(5.0))) == 5
    assert (together.data_rank, together.data_world, together.leads) == (0, 1, group.rank == 0)


@pytest.mark.parametrize(
    ("world", "names"),
    [(2, list(NETWORKS)), pytest.param(4, ["factorised", "joint", "stdit3"], marks=pytest.mark.slow)],
)
def test_parts_add_up_to_the_whole(world: int, names: list[str]) -> None:
    """With lengths that processes do not divide, and recomputed blocks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(compare, (world, port, names), nprocs=world)  # type: ignore[no-untyped-call]


NOBODY = dist.ProcessGroup(0, 1)
"""For what needs no other process."""


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (NETWORKS["factorised"][0], "= 3 does not divide the 4 attention heads"),
        (NETWORKS["stdit3"][0], "= 3 does not divide the 4 attention heads"),
        (NETWORKS["t2v"][0], "= 3 does not divide the 2 attention heads"),
        (lambda: GPT(depth=1, width=32, heads=4).build(replace(IO, vocab=8)), r"GPTModel cannot share.*Set it to 1"),
    ],
)
def test_networks_that_cannot(network: Callable[[], nn.Module], told: str) -> None:
    with torch.device("meta"):
        shapes = network()
    with pytest.raises(ValueError, match=told):
        share_sequence(shapes, ContextGroup(NOBODY, 0, 3))


def test_lengths() -> None:
    parts = ContextGroup(NOBODY, 1, 4).parts(226)
    assert parts.lengths == (57, 57, 56, 56)
    assert parts.own(torch.arange(226), 0).tolist() == list(range(57, 114))
    assert parts.beside(parts.times(2)).lengths == (171, 171, 168, 168)
    with pytest.raises(ValueError, match="context = 4: 3 tokens cannot be shared"):
        ContextGroup(NOBODY, 1, 4).parts(3)
