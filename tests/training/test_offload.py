"""What is moved off the device comes back as it was, in time, and nothing else is left behind there."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.loading import load_recipe
from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Lora, Optim, Recipe
from mutoscope.training.copies import Copies, Copy
from mutoscope.training.loop import train
from mutoscope.training.lora import add_lora
from mutoscope.training.offload import BlockOffload, Parking, check_blocks, check_offload, place, recomputed
from mutoscope.training.quantize import quantize_frozen

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Secret(Copies):
    """Copies to a memory whose contents are of no use there: every byte is inverted on the way out and back.

    So whatever is computed with what lies there, and not with what came back, comes out wrong.
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.log: list[str] = []
        self.on_device: list[weakref.ref[torch.UntypedStorage]] = []

    def to_cpu(self, x: Tensor) -> Copy:
        self.log.append("out")
        return Copy(_inverted(x.detach()), None)

    def pinned(self, x: Tensor) -> Tensor:
        return _inverted(x)

    def to_device(self, x: Tensor) -> Copy:
        self.log.append("back")
        copy = _inverted(x)
        self.on_device.append(weakref.ref(copy.untyped_storage()))
        return Copy(copy, None)


def _inverted(x: Tensor) -> Tensor:
    return x.clone().view(torch.uint8).bitwise_not_().view(x.dtype)


class Block(nn.Module):
    """A block that is called by keywords, as CogVideoX's are, with everything that a block may have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)  # autograd keeps its weight itself, not a view of it
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.register_buffer("scale", torch.rand(64))
        self.dropout = nn.Dropout(0.1)
        self.adapter = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor, *, positions: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x + positions)
        y = self.down(F.gelu(self.up(y))) * self.scale + self.adapter(y)
        return x + self.dropout(y), text + y.mean(1)


class Net(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        positions, text = torch.linspace(-1, 1, 64).to(x), x.new_zeros(len(x), 64)
        x = self.head(x)
        for block in self.blocks:
            x, text = block(x, positions=positions, text=text)
        return x + text[:, None]


def net(depth: int = 5) -> Net:
    torch.manual_seed(0)
    model = Net(depth)
    for name, p in model.named_parameters():
        p.requires_grad_("adapter" in name or "head" in name)
    return model


def step(model: nn.Module, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of a step."""
    torch.manual_seed(seed)
    device = next(p.device for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    loss = model(torch.randn(3, 7, 64).to(device)).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    for seed in (1, 2):  # a second step finds what the first left behind
        (loss, gradients), (expected, right) = step(model, seed), step(plain, seed)
        assert torch.equal(loss, expected)
        assert gradients.keys() == right.keys()
        assert [name for name, g in gradients.items() if not torch.equal(g, right[name])] == []


def wrapped(model: Net, wrap: Any) -> Net:
    for i, block in enumerate(model.blocks):
        block.forward = wrap(i, block.forward)
    return model


# ---------------------------------------------------------------- recomputing


def test_recomputing_changes_nothing_dropout_included() -> None:
    assert_same(wrapped(net(), lambda i, forward: recomputed(forward)), net())


def test_hooks_see_what_is_passed_by_keyword() -> None:
    """torch's checkpointing looks at positional arguments alone: it would neither park these nor, on a GPU, restore the
    random state that dropout needs."""
    seen: list[int] = []
    forward = recomputed(lambda *, x: x.sin().cos())
    x = torch.randn(4, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        forward(x=x)
    assert seen == [x.data_ptr()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_recomputing_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of types are not for the compiler
    torch._dynamo.reset()
    model, plain = wrapped(net(2).eval(), lambda i, forward: recomputed(forward)), net(2).eval()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    (loss, gradients), (expected, right) = step(model), step(plain)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, right)
    torch._dynamo.reset()


# ---------------------------------------------------------------- activations


def parking(smallest: int) -> tuple[Net, Secret]:
    copies = Secret()
    lot = Parking(copies, smallest)
    return wrapped(net(), lambda i, forward: lot.parked(recomputed(forward))), copies


def test_parked_activations_change_nothing() -> None:
    model, copies = parking(smallest=1)
    assert_same(model, net())
    assert copies.log.count("out") == copies.log.count("back") > 0


def test_only_large_inputs_that_differ_between_blocks_are_parked() -> None:
    model, copies = parking(smallest=3 * 7 * 64 * 4)
    assert_same(model, net())
    assert copies.log.count("out") == 2 * 5  # x of each block and step; not the text, which is small, nor the positions


def test_parked_activations_are_back_before_they_are_used() -> None:
    """Those of the last block when they are asked for, and with them those of the block before; and so on."""
    model, copies = parking(smallest=3 * 7 * 64 * 4)
    backs: list[int] = []
    for i, block in enumerate(model.blocks):
        block.norm.register_forward_pre_hook(lambda *_, i=i: backs.append((i, copies.log.count("back"))))  # type: ignore[arg-type,misc]
    step(model)
    assert backs[5:] == [(4, 2), (3, 3), (2, 4), (1, 5), (0, 5)]


def test_parked_activations_are_let_go() -> None:
    model, copies = parking(smallest=1)
    torch.manual_seed(1)
    gc.disable()  # without its help
    try:
        loss = model(torch.randn(3, 7, 64)).mean()
        assert "back" not in copies.log
        loss.backward()
        assert [x for x in copies.on_device if x() is not None] == []
    finally:
        gc.enable()
    with torch.no_grad():
        out = copies.log.count("out")
        model(torch.randn(3, 7, 64))
        assert copies.log.count("out") == out  # nothing to keep


# ---------------------------------------------------------------- weights


def offloaded(count: int, depth: int = 5) -> tuple[Net, Secret]:
    model, copies = net(depth), Secret()
    weights = BlockOffload(model, list(model.blocks), count, copies)
    weights.move(model, CPU)
    return wrapped(model, lambda i, forward: recomputed(weights.fetched(i, forward))), copies


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_offloaded_weights_change_nothing(count: int) -> None:
    model, copies = offloaded(count)
    assert_same(model, net())
    assert copies.log.count("back") == 2 * 2 * count  # of each block, forwards and backwards, in two steps


def test_offloaded_weights_come_while_the_block_before_computes() -> None:
    model, copies = offloaded(3)
    seen: list[tuple[int, int]] = []
    for i, block in enumerate(model.blocks):
        block.norm.register_forward_pre_hook(lambda *_, i=i: seen.append((i, copies.log.count("back"))))  # type: ignore[arg-type,misc]
    step(model)
    assert seen[:5] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)]
    assert seen[5:] == [(4, 5), (3, 6), (2, 6), (1, 6), (0, 6)]


def test_no_more_than_two_blocks_lie_on_the_device() -> None:
    model, copies = offloaded(5)
    most: list[int] = []
    for block in model.blocks:
        block.down.register_forward_hook(lambda *_: most.append(sum(x() is not None for x in copies.on_device)))  # type: ignore[arg-type,func-returns-value]
    step(model)
    assert max(most) == 2
    assert [x for x in copies.on_device if x() is not None] == []


def test_offloaded_weights_serve_sampling_too() -> None:
    model, plain, x = offloaded(3)[0].eval(), net().eval(), torch.randn(1, 7, 64)
    with torch.no_grad():
        assert all(torch.equal(model(x), plain(x)) for _ in range(2))


def test_offloaded_weights_keep_their_names_and_values() -> None:
    """In plain memory: what is inverted in the others is for tests only."""
    model, plain = net(), net()
    BlockOffload(model, list(model.blocks), 2, Copies(CPU)).move(model, CPU)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    theirs = plain.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items())
    model.load_state_dict({name: x + 1 for name, x in theirs.items()})  # as a checkpoint does
    assert torch.equal(model.state_dict()["blocks.4.down.weight"], theirs["blocks.4.down.weight"] + 1)


def test_trained_weights_stay() -> None:
    model = net()
    trained = [p for p in model.parameters() if p.requires_grad]
    BlockOffload(model, list(model.blocks), 5, Secret()).move(model, CPU)
    assert all(p is q for p, q in zip(trained, (p for p in model.parameters() if p.requires_grad), strict=True))
    ignored = set(model._ddp_params_and_buffers_to_ignore)  # type: ignore[arg-type]
    assert ignored == {n for n in model.state_dict() if n.startswith("blocks.") and "adapter" not in n}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_under_adapters_can_be_offloaded(kind: Any) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Net()
        add_lora(model, Lora(rank=2, targets="up|down"), seed=0)
        quantize_frozen(model, kind, CPU)
        models.append(model)
    weights = BlockOffload(models[0], list(models[0].blocks), 3, copies := Secret())
    weights.move(models[0], CPU)
    assert_same(wrapped(models[0], lambda i, forward: recomputed(weights.fetched(i, forward))), models[1])
    assert copies.log


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does
def test_all_of_it_together_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled once: swapped weights are no reason to do so again."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    compiled: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model, copies = net().eval(), Secret()  # without dropout, which is drawn otherwise
    weights, lot = BlockOffload(model, list(model.blocks), 3, copies), Parking(copies, smallest=1)
    weights.move(model, CPU)

    def wrap(i: int, forward: Any) -> Any:
        return lot.parked(recomputed(weights.fetched(i, torch.compile(forward, backend=backend, fullgraph=True))))

    wrapped(model, wrap)
    plain = net().eval()
    (loss, gradients), (expected, right) = step(model), step(plain)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, right)
    first = len(compiled)
    assert first <= 2  # the first block's input comes from a trained layer, or, under LoRA, needs no gradient
    step(model, seed=2)
    assert len(compiled) == first
    torch._dynamo.reset()


def test_what_cannot_be_offloaded_is_refused() -> None:
    with pytest.raises(ValueError, match="offload_blocks = 6: Net has 5 blocks"):
        BlockOffload(net(), list(net().blocks), 6, Copies(CPU))
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="nothing in these blocks is frozen"):
        BlockOffload(model, list(model.blocks), 1, Copies(CPU))


# ---------------------------------------------------------------- as a recipe asks

RECIPE = Recipe(
    data=Data(root="flying-mnist://tiny", frames=4, height=16, width=16),
    model=DiT(depth=2, width=16, heads=2, patch=(2, 8, 8)),
    objective=Diffusion(),
    steps=1,
    batch_size=1,
    activation_checkpointing=True,
)


def test_a_cpu_refuses_to_offload_to_itself() -> None:
    """It would cost time and save nothing, and nobody would be told."""
    for changes in ({"offload_activations": True}, {"offload_blocks": 1}, {"optim": Optim(offload=True)}):
        recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
        check_offload(recipe, GPU)
        with pytest.raises(
            ValueError, match=r"offload.*: moves memory from a GPU to the CPU, and this process computes"
        ):
            place(net(), recipe, CPU)


def test_what_is_refused_leaves_no_run_directory(tmp_path: Path) -> None:
    recipe = replace(load_recipe("minisora.dit_tiny"), autoencoder=None, activation_checkpointing=True)
    with pytest.raises(ValueError, match="moves memory from a GPU"):
        train(replace(recipe, offload_activations=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="offload_blocks = 9: Net has 5 blocks"):
        check_blocks(net(), replace(RECIPE, offload_blocks=9))


def test_place_recomputes_as_asked() -> None:
    model = net()
    place(model, RECIPE, CPU)
    runs: list[int] = []
    model.blocks[0].norm.register_forward_hook(lambda *_: runs.append(0))  # type: ignore[union-attr,operator]
    assert_same(model, net())
    assert len(runs) == 4  # forwards and again, in two steps
    place(plain := net(), replace(RECIPE, activation_checkpointing=False), CPU)
    assert "forward" not in vars(plain.blocks[0])


def test_a_network_without_blocks_is_placed_as_it_is_or_refused() -> None:
    model = nn.Linear(2, 2)
    place(model, replace(RECIPE, activation_checkpointing=False), CPU)
    for changes in ({}, {"activation_checkpointing": False, "compile": True}):
        with pytest.raises(ValueError, match="Linear has no blocks to recompute, compile or offload"):
            place(model, replace(RECIPE, **changes), CPU)  # type: ignore[arg-type]


@needs_gpu
@pytest.mark.parametrize("blocks", [0, 3, 5])
@pytest.mark.parametrize("activations", [False, True])
def test_on_a_gpu_as_without(blocks: int, activations: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutoscope.training.offload.SMALLEST", 1)
    model, plain = net(), net()
    place(model, replace(RECIPE, offload_blocks=blocks, offload_activations=activations), GPU)
    place(plain, RECIPE, GPU)
    for seed in range(20):
        (loss, gradients), (expected, right) = step(model, seed), step(plain, seed)
        assert torch.equal(loss, expected)
        assert [name for name, g in gradients.items() if not torch.equal(g, right[name])] == []


class Wide(nn.Module):
    """A block with a frozen weight of 4 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1024, 1024, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).sin()


@needs_gpu
def test_on_a_gpu_memory_goes_down() -> None:
    peaks: list[int] = []
    x = torch.randn(8192, 1024, device=GPU, requires_grad=True)  # 32 MiB
    for changes in ({}, {"offload_activations": True}, {"offload_blocks": 20}):
        model = nn.Module()
        model.blocks = nn.ModuleList(Wide() for _ in range(20))
        place(model, replace(RECIPE, **changes), GPU)  # type: ignore[arg-type]
        torch.cuda.reset_peak_memory_stats()
        y = x * 1
        for block in model.blocks:
            y = block(y)
        y.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0] - 12 * x.nbytes
    assert peaks[2] < peaks[0] - 15 * 4 * 1024**2
