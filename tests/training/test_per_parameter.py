"""bf16 weights that lose nothing, state on the CPU, and steps within the backward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mutoscope.recipe import Optim
from mutoscope.training.checkpoint import save_checkpoint
from mutoscope.training.copies import Copies, Copy
from mutoscope.training.engine import Engine
from mutoscope.training.optimizers import build_optimizers, cast_trained, clip_gradients, gradient_norms
from mutoscope.training.per_parameter import PerParameter, join, round_stochastically, split
from mutoscope.training.state import TrainState

ALONE = Engine(rank=0, world=1, device=torch.device("cpu"))


# ---------------------------------------------------------------- bf16


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=50))
def test_split_numbers_are_joined_bit_for_bit(numbers: list[float]) -> None:
    w = torch.tensor(numbers)
    high, low = split(w)
    assert torch.equal(join(high, low).view(torch.int32), w.view(torch.int32))
    ties = (w.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~ties], w.bfloat16()[~ties])  # the nearest


def test_ties_round_away_from_zero() -> None:
    tie = torch.tensor([1 + 2**-8, -1 - 2**-8])
    assert split(tie)[0].tolist() == [1 + 2**-7, -1 - 2**-7]


@given(st.floats(-1e3, 1e3, width=32), st.integers(0, 10**6))
def test_stochastic_rounding_is_right_on_average(x: float, seed: int) -> None:
    n, generator = 20_000, torch.Generator().manual_seed(seed)
    error = round_stochastically(torch.full((n,), x), generator).double() - x
    gap = 2**-7 * abs(x) + 1e-38  # between neighbours in bf16, at the most
    assert error.abs().max() < gap and len(error.unique()) <= 2
    assert error.mean().abs() <= 5 * gap / 2 / n**0.5  # five standard deviations, at the most


def test_stochastic_rounding_leaves_bf16_numbers_alone() -> None:
    w = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(w.float(), torch.Generator().manual_seed(0)), w)


# ---------------------------------------------------------------- a network to train


class Net(nn.Module):
    """A regression whose weights are large enough for low-bit state."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.scale.to(x.dtype) * F.gelu(block(x))
        return x


def net(weights: str = "fp32") -> Net:
    torch.manual_seed(0)
    model = Net()
    cast_trained(model, weights)
    return model


def backward(model: nn.Module, step: int, micro_steps: int = 1) -> Tensor:
    """The gradients of a step, which depend on the weights and on its number alone."""
    dtype, total = next(model.parameters()).dtype, torch.zeros(())
    for micro in range(micro_steps):
        generator = torch.Generator().manual_seed(10 * step + micro)
        x = torch.randn(32, 64, generator=generator).to(next(model.parameters()).device)
        loss = F.mse_loss(model(x.to(dtype)).float(), x.roll(1, 1)) / micro_steps
        loss.backward()
        total += loss.detach().cpu()
    return total


def of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> TrainState:
    return TrainState(model, optimizers, None, model, ALONE)


def train(model: nn.Module, optim: Optim, steps: range, limit: float = 0.0, micro_steps: int = 1) -> TrainState:
    state = of(model, build_optimizers(model, optim, seed=7))
    run(state, steps, limit, micro_steps)
    return state


def run(state: TrainState, steps: range, limit: float = 0.0, micro_steps: int = 1) -> None:
    for step in steps:
        backward(state.model, step, micro_steps)
        clip_gradients(state.optimizers, gradient_norms(state.optimizers), limit)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.step = step + 1


def assert_same(a: nn.Module, b: nn.Module) -> None:
    theirs = b.state_dict()
    assert [name for name, x in a.state_dict().items() if not torch.equal(x, theirs[name])] == []


LEVERS = {
    "adamw": (Optim(lr=3e-3), "fp32"),
    "adamw over bf16": (Optim(lr=3e-3), "bf16"),
    "adamw, stochastic": (Optim(lr=3e-3, stochastic_rounding=True), "bf16"),
    "adamw8bit": (Optim(name="adamw8bit", lr=3e-3), "fp32"),
    "adamw8bit over bf16": (Optim(name="adamw8bit", lr=3e-3), "bf16"),
    "adamw8bit, stochastic": (Optim(name="adamw8bit", lr=3e-3, stochastic_rounding=True), "bf16"),
    "adamw4bit": (Optim(name="adamw4bit", lr=3e-3), "fp32"),
    "came": (Optim(name="came", lr=1e-3), "fp32"),
    "came, stochastic": (Optim(name="came", lr=1e-3, stochastic_rounding=True), "bf16"),
    "prodigy": (Optim(name="prodigy", lr=1.0), "fp32"),
    "prodigy over bf16": (Optim(name="prodigy", lr=1.0), "bf16"),
}


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("lever", LEVERS)
def test_a_resumed_run_goes_on_bit_for_bit(lever: str, tmp_path: Path) -> None:
    """Through a checkpoint on disk, as the loop writes and reads it."""
    optim, weights = LEVERS[lever]
    whole = train(net(weights), optim, range(4))
    save_checkpoint(tmp_path, 4, whole.tensors(), {}, ALONE)
    run(whole, range(4, 8))

    model = net(weights)
    resumed = of(model, build_optimizers(model, optim, seed=7))
    resumed.load(tmp_path / "00000004")
    run(resumed, range(4, 8))
    assert_same(whole.model, resumed.model)
    for a, b in zip(leaves(whole.tensors()), leaves(resumed.tensors()), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def leaves(tree: dict[str, Tensor] | Tensor) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for branch in tree.values() for leaf in leaves(branch)]


def test_offloaded_state_goes_on_without_offload(tmp_path: Path) -> None:
    """Where the state lies is not part of it."""
    optim, _ = LEVERS["adamw8bit over bf16"]
    whole = train(net("bf16"), optim, range(3))
    save_checkpoint(tmp_path, 3, whole.tensors(), {}, ALONE)
    run(whole, range(3, 6))
    model = net("bf16")
    resumed = of(model, build_optimizers(model, replace(optim, offload=True), seed=7))
    resumed.load(tmp_path / "00000003")
    run(resumed, range(3, 6))
    assert_same(whole.model, resumed.model)


def test_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    (low,) = build_optimizers(net(), LEVERS["adamw8bit"][0])
    (full,) = build_optimizers(net("bf16"), LEVERS["adamw over bf16"][0])
    with pytest.raises(ValueError, match=r"parameter 0: the state to load has .*exp_avg_scale.*low"):
        full.load_state_dict(low.state_dict())
    with pytest.raises(ValueError, match="of 5 parameters, the optimizer has 2"):
        build_optimizers(nn.Linear(64, 64), LEVERS["adamw8bit"][0])[0].load_state_dict(low.state_dict())


# ---------------------------------------------------------------- bf16 weights in training


def test_bf16_weights_with_the_rest_of_fp32_are_fp32_weights() -> None:
    """Given the same gradients: an fp32 run's weights at every step, rounded."""
    (full,), (half,) = ([nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to(d))]
                        for d in (torch.float32, torch.bfloat16))  # fmt: skip
    optimizers = [build_optimizers(holder(p), Optim(lr=1e-5, weight_decay=0.1))[0] for p in (full, half)]
    for step in range(20):
        g = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        for p, optimizer in zip((full, half), optimizers, strict=True):
            p.grad = g.to(p.dtype)
            optimizer.step()
        assert torch.equal(join(half.detach(), optimizers[1].state[half]["low"]), full.detach())
        assert torch.equal(half.detach(), split(full.detach())[0])


def holder(p: nn.Parameter) -> nn.Module:
    model = nn.Module()
    model.weight = p
    return model


@pytest.mark.parametrize("stochastic", [False, True])
def test_steps_too_small_for_bf16_add_up(stochastic: bool) -> None:
    """A hundred steps of 1e-4 from 1, each a fortieth of what bf16 can tell there: rounded to nearest they are none."""
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    (optimizer,) = build_optimizers(holder(p), Optim(lr=1e-4, stochastic_rounding=stochastic))
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(0.99, abs=2**-9)


def test_rounding_is_the_same_on_all_replicas_and_another_at_each_step() -> None:
    """torchao draws from the global generator, whose state differs between processes: replicas drift apart."""
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        (optimizer,) = build_optimizers(holder(p), Optim(lr=1e-3, stochastic_rounding=True))
        marks = []
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
            marks.append(p.detach() < 1)
            p.data.fill_(1)
        assert marks[0].any() and not torch.equal(*marks)
        ends.append(marks[1])
    assert torch.equal(*ends)


# ---------------------------------------------------------------- offload


class OtherMemory(Copies):
    """Copies as to another device: never the original."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def to_cpu(self, x: Tensor) -> Copy:
        return Copy(x.detach().clone(), None)


def offloaded(model: nn.Module, optim: Optim) -> TrainState:
    state = of(model, build_optimizers(model, replace(optim, offload=True), seed=7))
    for optimizer in state.optimizers:
        assert isinstance(optimizer, PerParameter)
        optimizer._copies = OtherMemory()
    return state


@pytest.mark.parametrize("lever", [name for name, (optim, _) in LEVERS.items() if not optim.stochastic_rounding])
def test_offload_changes_nothing_but_where_it_happens(lever: str) -> None:
    optim, weights = LEVERS[lever]
    state = offloaded(net(weights), optim)
    run(state, range(5), limit=0.05)
    assert_same(state.model, train(net(weights), optim, range(5), limit=0.05).model)


def test_offloaded_gradients_leave_with_the_backward_pass_and_are_clipped_all_the_same() -> None:
    """The norm is of what has left: in cogvideox-factory clipping came too late for them."""
    model, plain = net(), net()
    state = offloaded(model, Optim())
    backward(model, 0)
    backward(plain, 0)
    assert all(p.grad is None for p in model.parameters())
    norms = gradient_norms(state.optimizers)
    assert norms.keys() == set(model.parameters())
    norm = clip_gradients(state.optimizers, norms, 0.01)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.01))
    (optimizer,) = state.optimizers
    assert isinstance(optimizer, PerParameter)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(optimizer.gradient(p), q.grad)  # type: ignore[arg-type]
    optimizer.zero_grad()
    assert gradient_norms(state.optimizers) == {}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_offloaded_gradients_add_up_over_micro_steps(weights: str) -> None:
    """torchao's CPUOffloadOptimizer can't. In fp32, so that bf16 loses less than it would on the device."""
    optim = Optim(lr=3e-3)
    state = offloaded(net(weights), optim)
    run(state, range(5), micro_steps=3)
    plain = train(net(weights), optim, range(5), micro_steps=3).model.state_dict()
    for name, x in state.model.state_dict().items():
        torch.testing.assert_close(x, plain[name], atol=1e-6 if weights == "fp32" else 2e-2, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lever", [name for name, (optim, _) in LEVERS.items() if not optim.stochastic_rounding])
def test_offload_from_a_gpu(lever: str) -> None:
    """Copies that are still under way when they are used would show."""
    optim, weights = LEVERS[lever]
    model, plain = net(weights).cuda(), net(weights).cuda()
    optimizers = build_optimizers(model, replace(optim, offload=True))
    state, on_device = of(model, optimizers), of(plain, build_optimizers(plain, optim))
    for one in (state, on_device):
        run(one, range(20), limit=0.05, micro_steps=2)
    assert {x.device.type for kept in optimizers[0].state.values() for x in kept.values()} == {"cpu"}
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4 if weights == "fp32" else 1e-2, rtol=1e-2)


# ---------------------------------------------------------------- release


@pytest.mark.parametrize("lever", [name for name, (optim, _) in LEVERS.items() if optim.name != "prodigy"])
def test_released_gradients_take_the_ordinary_steps(lever: str) -> None:
    optim, weights = LEVERS[lever]
    released = train(net(weights), replace(optim, release_gradients=True), range(5))
    assert_same(released.model, train(net(weights), optim, range(5)).model)


def test_released_gradients_are_gone_but_their_norms_known() -> None:
    model, plain = net(), net()
    optimizers = build_optimizers(model, Optim(release_gradients=True))
    alive: list[int] = []
    for p in model.parameters():
        p.register_hook(lambda g: alive.append(sum(q.grad is not None for q in model.parameters())))
    backward(model, 0)
    backward(plain, 0)
    assert all(p.grad is None for p in model.parameters())
    assert max(alive) <= 1, "gradients lay about while others were made"
    norms = gradient_norms(optimizers)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert norms[p].item() == pytest.approx(q.grad.norm().item())  # type: ignore[union-attr]
    total = clip_gradients(optimizers, norms, 0.0)
    torch.testing.assert_close(total, nn.utils.get_total_norm([q.grad for q in plain.parameters()]))  # type: ignore[misc]


def test_a_released_gradient_that_is_not_finite_harms_nothing() -> None:
    model = net()
    optimizers = build_optimizers(model, Optim(release_gradients=True, weight_decay=0.1))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    (model(torch.randn(2, 64)).sum() * torch.tensor(torch.inf)).backward()
    assert not clip_gradients(optimizers, gradient_norms(optimizers), 0.0).isfinite()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(state["step"] == 0 for state in optimizers[0].state.values())
