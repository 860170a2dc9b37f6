"""The sparse GPT: what each position hangs on, and that tiles, windows and caches are ways to the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutoscope.models.sparse_context import Context, Frames, Grid, Nearest, Strided, reads_of
from mutoscope.models.sparse_gpt import SparseGPT, SparseGPTModel, attend_kept, places
from mutoscope.models.token_inputs import NEIGHBOURS
from mutoscope.randomness import Draw
from mutoscope.recipe import TokenSampler
from mutoscope.samplers.tokens import sample_tokens
from mutoscope.training.offload import recomputed
from mutoscope.types import Cond, ModelIO, TokenCache

GRID: Grid = (3, 4, 5)
TOTAL = 60
IO = ModelIO(channels=3, grid=GRID, vocab=11, text_dim=6, num_labels=3)
SMALL: dict[str, Any] = {"depth": 2, "width": 16, "heads": 2}
CONTEXTS: list[Context] = [Nearest(tokens=6), Frames(), Strided(tokens=8, stride=3, recent=3)]


def shaken(model: nn.Module, seed: int = 0) -> Any:
    """The model with random numbers in all of its parameters: as if trained, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.eval()


def built(io: ModelIO = IO, seed: int = 0, **changes: Any) -> SparseGPTModel:
    model: SparseGPTModel = shaken(SparseGPT(**SMALL | changes).build(io), seed)
    return model


def inputs(batch: int = 2, seed: int = 1) -> tuple[Tensor, Cond]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (batch, *GRID), generator=generator)
    mask = torch.arange(4)[None] < torch.tensor([4, 2])[torch.arange(batch) % 2][:, None]
    text = torch.randn(batch, 4, 6, generator=generator) * mask[..., None]
    return tokens, Cond(label=torch.arange(batch) % 3, text=text, text_mask=mask)


def depends(model: SparseGPTModel) -> list[set[int]]:
    """For each position the tokens that its logits hang on, by changing them one by one."""
    tokens, cond = inputs(1)
    found: list[set[int]] = [set() for _ in range(TOTAL)]
    with torch.no_grad():
        before = model(tokens, cond)[0]
        for j in range(TOTAL):
            changed = tokens.clone()
            changed.view(-1)[j] = (changed.view(-1)[j] + 5) % 11
            for i in (model(changed, cond)[0] - before).abs().amax(-1).nonzero()[:, 0].tolist():
                found[i].add(j)
    return found


def around(m: int, neighbours: bool) -> set[int]:
    """The tokens that the input of position m holds."""
    _, h, w = GRID
    t, y, x = m // (h * w), m // w % h, m % w
    found = {m - 1} if m else set()
    for dt, dh, dw in NEIGHBOURS if neighbours else ():
        if t + dt >= 0 and 0 <= y + dh < h and 0 <= x + dw < w:
            found.add(((t + dt) * h + y + dh) * w + x + dw)
    return found


# ---------------------------------------------------------------- what hangs on what


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("depth", "neighbours"), [(1, False), (1, True), (2, False)])
def test_the_receptive_field_is_the_one_that_is_told(context: Context, depth: int, neighbours: bool) -> None:
    """Built by brute force: what inputs hold, and in each block the states behind the known tokens, and the own one."""
    reads = reads_of(context, 0, TOTAL, GRID, 0, torch.device("cpu"))
    holds = [around(m, neighbours) for m in range(TOTAL)]
    for _ in range(depth):
        seen = [reads.states[i][reads.mask[i, 0, 0]].tolist() for i in range(TOTAL)]
        holds = [set().union(*(holds[m] for m in seen[i])) for i in range(TOTAL)]
    assert depends(built(depth=depth, neighbours=neighbours, context=context)) == holds
    assert all(max(held, default=-1) < i for i, held in enumerate(holds))
    if depth == 1 and not neighbours:
        assert any(len(held) < i for i, held in enumerate(holds))  # it is sparse


def test_attention_is_relative_in_space_and_time() -> None:
    attention: Any = built().blocks[0].attention
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def dots(own: list[int], token: list[int]) -> Tensor:
        turns = lambda place: attention._turns(torch.tensor([[place]]).float(), torch.float32)
        turned = lambda y, place: attention._turned(y, attention.query_scale, turns(place))
        return (turned(q, own) * turned(k, token)).sum(-1)

    near = dots([2, 3, 4], [1, 5, 4])
    torch.testing.assert_close(dots([7, 23, 64], [6, 25, 64]), near, atol=1e-3, rtol=1e-3)
    for other in ([1, 5, 5], [1, 4, 4], [2, 5, 4]):
        assert (dots([2, 3, 4], other) - near).abs().max() > 0.02


def test_positions_can_be_one_dimensional() -> None:
    sizes = lambda model: [len(table.weight) for table in model.inputs.tables]
    tables = [sizes(built(positions=positions)) for positions in ("3d", "1d")]
    assert tables == [[3, 4, 5], [60]]
    assert depends(built(positions="1d", depth=1)) == depends(built(depth=1))


def test_at_first_all_codes_are_alike_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    model = SparseGPT(**SMALL).build(IO)
    tokens, cond = inputs(2)
    assert model(tokens, cond).abs().max() == 0
    shaken(model)(tokens, cond).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_conditions_matter_and_can_be_dropped() -> None:
    model, (tokens, cond) = built(), inputs(2)
    with torch.no_grad():
        given, without = model(tokens, cond), model(tokens, cond.dropped(torch.tensor([False, True])))
        torch.testing.assert_close(without[0], given[0])
        assert (without[1] - given[1]).abs().max() > 0.01
        words = Cond(label=cond.label, text=cond.text.flip(0), text_mask=cond.text_mask.flip(0))  # type: ignore[union-attr]
        assert (model(tokens, words) - given).abs().max() > 0.01


# ---------------------------------------------------------------- ways to the same


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda c: type(c).__name__)
def test_tiles_are_attention_one_by_one_and_so_are_their_gradients(context: Context) -> None:
    """In fp64, with a grid that boxes do not divide."""
    model = built(context=context, depth=1).double()
    tokens, cond = inputs(3)
    x = model.inputs(tokens, cond, torch.arange(TOTAL)[None])
    reads = reads_of(context, 0, TOTAL, GRID, 0, x.device)
    attention: Any = model.blocks[0].attention
    positions = torch.arange(TOTAL)[None]
    own, token = places(positions, GRID), places(positions - 1, GRID)
    both = places(torch.arange(-1, TOTAL)[None], GRID)
    split = lambda y: y.unflatten(-1, (2, -1))

    def one_by_one(x: Tensor) -> Tensor:
        q = attention._turned(attention.query(x), attention.query_scale, attention._turns(own, x.dtype))
        k = attention._turned(attention.key(x), attention.key_scale, attention._turns(token, x.dtype))
        return attention.out(attend_kept(q, k, split(attention.value(x)), reads).flatten(2))

    results = []
    for run in (one_by_one, lambda x: attention(x, both, model._sight(positions, GRID, None))):
        y = run(x)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *attention.parameters()], retain_graph=True)])
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


def cached(model: SparseGPTModel, tokens: Tensor, cond: Cond, lengths: list[int], window: int = 0) -> Tensor:
    cache, parts = TokenCache(window=window), []
    with torch.no_grad():
        for length in lengths:
            parts.append(model(tokens, cond, torch.full((len(tokens),), cache.length), length, cache))
    assert cache.length == sum(lengths)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("lengths", [[1] * TOTAL, [TOTAL], [7, 1, 25, 1, 26]])
def test_a_cache_changes_nothing(context: Context, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutoscope.models.sparse_gpt.GATHERED", 2000)  # in several parts
    model, (tokens, cond) = built(context=context), inputs(3)
    torch.testing.assert_close(cached(model, tokens, cond, lengths), model(tokens, cond), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_with_a_cache_the_likeliest_token_is_the_same(seed: int) -> None:
    model, (tokens, cond) = built(seed=seed), inputs(3, seed)
    with torch.no_grad():
        likeliest = model(tokens, cond).argmax(-1)
    assert torch.equal(cached(model, tokens, cond, [1] * TOTAL).argmax(-1), likeliest)
    assert len(likeliest.unique()) > 3


def test_sampling_takes_the_likeliest_token_as_without_a_cache() -> None:
    model, cond = built(seed=2, context=Nearest(tokens=6)), inputs(2, 2)[1]
    drawn = sample_tokens(model, TokenSampler(temperature=0), cond, GRID, Draw(0, "sample", [0, 1]))
    with torch.no_grad():  # the only clip whose every token is the likeliest behind those before it
        assert torch.equal(model(drawn, cond).argmax(-1), drawn.flatten(1))


def test_windows_attend_within_themselves_alone() -> None:
    model, (tokens, cond) = built(neighbours=False), inputs(2)
    start = torch.tensor([5, 9])
    with torch.no_grad():
        found = model(tokens, cond, start, 8)
        for row in (0, 1):
            first = int(start[row])
            for j in range(TOTAL):
                changed = tokens.clone()
                changed[row].view(-1)[j] = (changed[row].view(-1)[j] + 5) % 11
                moved = (model(changed, cond, start, 8)[row] - found[row]).abs().amax(-1) > 0
                assert moved.tolist() == [first - 1 <= j < i for i in range(first, first + 8)]
        whole = model(tokens, cond)
        torch.testing.assert_close(model(tokens, cond, torch.zeros(2, dtype=torch.long), TOTAL), whole)
        prefix = model(tokens, cond, torch.zeros(2, dtype=torch.long), 30)
        torch.testing.assert_close(prefix, whole[:, :30], atol=2e-5, rtol=1e-4)


def test_a_cache_looks_back_no_further_than_its_window() -> None:
    model, (tokens, cond) = built(depth=1, neighbours=False, context=Nearest(tokens=50)), inputs(2)
    found = cached(model, tokens, cond, [1] * TOTAL, window=5)
    changed = tokens.clone()
    changed.view(2, -1)[:, 20] = (changed.view(2, -1)[:, 20] + 5) % 11
    moved = (cached(model, changed, cond, [20, 1, 39], window=5) - found).abs().amax((0, 2)) > 1e-3
    assert moved.nonzero()[:, 0].tolist() == [21, 22, 23, 24, 25]


def test_recomputed_blocks_and_smaller_grids() -> None:
    model, (tokens, cond) = built(), inputs(2)
    again = copy.deepcopy(model)
    for block in again.blocks:
        block.forward = recomputed(block.forward)
    for part in (tokens, tokens[:, :2, :3]):
        model(part, cond).square().mean().backward()
        again(part, cond).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_bf16_is_near_fp32() -> None:
    model, (tokens, cond) = built(), inputs(2)
    with torch.no_grad():
        expected = model(tokens, cond)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens, cond).float()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="autoencoder with codes"):
        SparseGPT(**SMALL).build(ModelIO(channels=3, grid=GRID))
    with pytest.raises(ValueError, match="a multiple of twice heads=4"):
        SparseGPT(width=20, heads=4)
    with pytest.raises(ValueError, match="dropout=1"):
        SparseGPT(dropout=1)
