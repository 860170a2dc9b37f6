"""The GPT: what each position hangs on, that its cache changes nothing, and that it is GPT-2 where asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mutoscope.models.gpt import GPT, GPTModel
from mutoscope.models.kv_cache import KeyValues
from mutoscope.models.token_inputs import NEIGHBOURS, places_around
from mutoscope.types import NO_LABEL, Cond, ModelIO, TokenCache

GRID = (2, 3, 4)
TOTAL = 24
IO = ModelIO(channels=3, grid=GRID, vocab=11, text_dim=6, num_labels=3)
SMALL: dict[str, Any] = {"depth": 2, "width": 16, "heads": 2}


def shaken(model: nn.Module, seed: int = 0) -> Any:
    """The model with random numbers in all of its parameters: as if trained, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.eval()


def built(io: ModelIO = IO, **changes: Any) -> Any:
    """A GPTModel; Any, because mypy knows nothing of what is in a ModuleList."""
    return shaken(GPT(**SMALL | changes).build(io))


def inputs(batch: int = 2, seed: int = 1) -> tuple[Tensor, Cond]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (batch, *GRID), generator=generator)
    mask = torch.arange(4)[None] < torch.tensor([4, 2])[torch.arange(batch) % 2][:, None]
    text = torch.randn(batch, 4, 6, generator=generator) * mask[..., None]
    return tokens, Cond(label=torch.arange(batch) % 3, text=text, text_mask=mask)


def cached(model: GPTModel, tokens: Tensor, cond: Cond, lengths: list[int], window: int = 0) -> Tensor:
    """Logits of all positions, in calls of these lengths."""
    cache, parts = TokenCache(window=window), []
    with torch.no_grad():
        for length in lengths:
            parts.append(model(tokens, cond, torch.full((len(tokens),), cache.length), length, cache))
    assert cache.length == sum(lengths)
    return torch.cat(parts, dim=1)


# ---------------------------------------------------------------- what hangs on what


@pytest.mark.parametrize("neighbours", [True, False])
def test_logits_hang_on_all_tokens_before_and_on_none_other(neighbours: bool) -> None:
    model = built(neighbours=neighbours)
    tokens, cond = inputs(1)
    with torch.no_grad():
        before = model(tokens, cond)[0]
        for j in range(TOTAL):
            changed = tokens.clone()
            changed.view(-1)[j] = (changed.view(-1)[j] + 5) % 11
            moved = (model(changed, cond)[0] - before).abs().amax(-1) > 0
            assert moved.tolist() == [i > j for i in range(TOTAL)]


def test_a_window_attends_within_itself_alone() -> None:
    """Without neighbours, all that is known of a token before a window is the one just before its first."""
    model = built(neighbours=False)
    tokens, cond = inputs(2)
    start = torch.tensor([5, 9])
    with torch.no_grad():
        found = model(tokens, cond, start, 8)
        for row in (0, 1):
            for j in range(TOTAL):
                changed = tokens.clone()
                changed[row].view(-1)[j] = (changed[row].view(-1)[j] + 5) % 11
                moved = (model(changed, cond, start, 8)[row] - found[row]).abs().amax(-1) > 0
                first = int(start[row])
                assert moved.tolist() == [first - 1 <= j < i for i in range(first, first + 8)]


def test_a_window_over_all_is_the_whole_clip() -> None:
    model, (tokens, cond) = built(), inputs(2)
    torch.testing.assert_close(model(tokens, cond, torch.zeros(2, dtype=torch.long), TOTAL), model(tokens, cond))
    with pytest.raises(ValueError, match="both of start and length"):
        model(tokens, cond, torch.zeros(2, dtype=torch.long))


def test_conditions_matter_and_can_be_dropped() -> None:
    model, (tokens, cond) = built(), inputs(2)
    dropped = cond.dropped(torch.tensor([False, True]))
    nothing = Cond(label=torch.full((2,), NO_LABEL), text=cond.text, text_mask=torch.zeros(2, 4, dtype=torch.bool))
    with torch.no_grad():
        given, without, none = model(tokens, cond), model(tokens, dropped), model(tokens, nothing)
        assert (given - none).abs().amax((1, 2)).min() > 0.01
        torch.testing.assert_close(without[0], given[0])
        torch.testing.assert_close(without[1], none[1])
        assert cond.text is not None and cond.text_mask is not None
        words = Cond(label=cond.label, text=cond.text.flip(0), text_mask=cond.text_mask.flip(0))
        assert (model(tokens, words) - given).abs().max() > 0.01


def test_at_first_all_codes_are_alike_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    model = GPT(**SMALL).build(IO)
    tokens, cond = inputs(2)
    assert model(tokens, cond).abs().max() == 0
    shaken(model)(tokens, cond).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_dropout_is_for_training() -> None:
    model, (tokens, cond) = built(dropout=0.5), inputs(1)
    torch.testing.assert_close(model(tokens, cond), built()(tokens, cond))
    model.train()
    assert (model(tokens, cond) - model(tokens, cond)).abs().max() > 0.01


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="autoencoder with codes"):
        GPT(**SMALL).build(ModelIO(channels=3, grid=GRID))
    with pytest.raises(ValueError, match="multiple of heads=3"):
        GPT(width=16, heads=3)
    with pytest.raises(ValueError, match="dropout=1"):
        GPT(dropout=1)
    with pytest.raises(ValueError, match="3 × 3 × 4: this model knows positions up to"):
        built()(torch.zeros(1, 3, 3, 4, dtype=torch.long), inputs(1)[1])


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("lengths", [[1] * TOTAL, [TOTAL], [7, 1, 5, 1, 1, 9], [1, 23]])
def test_a_cache_changes_nothing(lengths: list[int]) -> None:
    model, (tokens, cond) = built(), inputs(3)
    torch.testing.assert_close(cached(model, tokens, cond, lengths), model(tokens, cond), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1] * TOTAL, [TOTAL], [4, 8, 1, 1, 1, 9], [3, 1, 1, 1, 1, 14, 3], [12, 12]])
def test_a_window_limits_how_far_a_cache_looks_back(lengths: list[int]) -> None:
    """Against the same attention with a mask of a band: each layer looks 5 positions back, itself included."""
    model, (tokens, cond) = built(), inputs(2)
    x = model.inputs(tokens, cond, torch.arange(TOTAL)[None])
    i = torch.arange(TOTAL)
    band = ((i <= i[:, None]) & (i > i[:, None] - 5))[None]
    for block in model.blocks:
        y = block.norm1(x)
        x = x + block.attention.attend(y, *block.attention.keys_values(y), band)
        x = x + block.cross(block.norm_cross(x), cond.text, cond.text_mask)
        x = x + block.mlp(block.norm2(x))
    expected = model.head(model.norm(x))
    torch.testing.assert_close(cached(model, tokens, cond, lengths, window=5), expected, atol=1e-5, rtol=1e-5)
    assert (expected[:, 5:] - model(tokens, cond)[:, 5:]).abs().max() > 0.01


def test_a_cache_is_allocated_once_and_captions_are_read_once() -> None:
    model, (tokens, cond) = built(), inputs(2)
    cache, calls = TokenCache(window=6), []
    model.blocks[0].cross.key_value.register_forward_hook(lambda *_: calls.append(1))
    memory = set()
    with torch.no_grad():
        for i in range(TOTAL):
            model(tokens, cond, torch.full((2,), i), 1, cache)
            memory.add(tuple(sorted(tensor.data_ptr() for tensor in cache.state.values())))
    assert len(memory) == 1 and len(calls) == 1
    assert cache.state["block0.keys"].shape == (2, 2, 6, 8)  # batch, heads, window, width of a head


def test_a_ring_keeps_the_last_positions_whatever_calls_brought_them() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 20, 2, generator=generator)
    for lengths in ([1] * 20, [20], [3, 9, 8], [9, 1, 1, 9]):
        cache = TokenCache(window=7)
        for n in lengths:
            part = k[:, :, cache.length : cache.length + n]
            KeyValues(cache, "a", 64).extended(part, -part)
            cache.length += n
        expected = torch.stack([k[0, 0, i] for i in (14, 15, 16, 17, 18, 19, 13)])  # slot i % 7
        assert torch.equal(cache.state["a.keys"][0, 0], expected)
        assert torch.equal(cache.state["a.values"][0, 0], -expected)


# ---------------------------------------------------------------- inputs


def test_places_around_each_position_come_before_it() -> None:
    t, h, w = GRID
    places = places_around(torch.arange(TOTAL)[None], GRID, torch.tensor(NEIGHBOURS))[0]
    assert places.shape == (TOTAL, 1 + len(NEIGHBOURS))
    for i in range(TOTAL):
        it, ih, iw = i // (h * w), i // w % h, i % w
        expected = [i - 1 if i else TOTAL + 1]
        for dt, dh, dw in NEIGHBOURS:
            inside = 0 <= it + dt < t and 0 <= ih + dh < h and 0 <= iw + dw < w
            expected.append(((it + dt) * h + ih + dh) * w + iw + dw if inside else TOTAL)
        assert places[i].tolist() == expected
        assert all(place < i or place >= TOTAL for place in expected)


def test_smaller_clips_take_their_places_from_the_same_tables() -> None:
    io = ModelIO(channels=3, grid=(1, 3, 2), more_grids=((2, 2, 2), (1, 1, 4)), vocab=11)
    model = shaken(GPT(**SMALL, neighbours=False).build(io))
    assert model.grid == (2, 3, 4)
    tables = [table.weight for table in model.inputs.tables]
    tokens = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    x = model.inputs(tokens, Cond(), torch.tensor([[5]]))
    torch.testing.assert_close(x[0, 0], model.inputs.codes.weight[0] + tables[0][1] + tables[1][0] + tables[2][1])


# ---------------------------------------------------------------- GPT-2


def test_it_is_gpt2() -> None:
    """transformers' GPT2 with the same weights: positions in one table, no neighbours, no QK-norm."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=TOTAL, n_embd=16, n_layer=2, n_head=2, activation_function="gelu",
        tie_word_embeddings=False, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    theirs = shaken(transformers.GPT2LMHeadModel(config))
    io = ModelIO(channels=3, grid=GRID, vocab=11)
    ours = built(io, positions="1d", neighbours=False, qk_norm=False)
    with torch.no_grad():
        copy_from_gpt2(ours, theirs)
        tokens = inputs(3)[0]
        bos = torch.full((3, 1), 11)
        expected = theirs(torch.cat([bos, tokens.flatten(1)[:, :-1]], dim=1)).logits[..., :11]
        torch.testing.assert_close(ours(tokens, Cond()), expected, atol=1e-5, rtol=1e-5)


def copy_from_gpt2(ours: Any, theirs: Any) -> None:
    body = theirs.transformer
    ours.inputs.codes.weight[:11] = body.wte.weight[:11]
    ours.inputs.codes.weight[12] = body.wte.weight[11]  # our BOS is the last row, behind "outside of the clip"
    ours.inputs.tables[0].weight.copy_(body.wpe.weight)
    for block, source in zip(ours.blocks, body.h, strict=True):
        query, key_value = source.attn.c_attn.weight.T.split([16, 32])
        query_bias, key_value_bias = source.attn.c_attn.bias.split([16, 32])
        for name, weight, bias in (
            ("attention.query", query, query_bias),
            ("attention.key_value", key_value, key_value_bias),
            ("attention.out", source.attn.c_proj.weight.T, source.attn.c_proj.bias),
            ("mlp.up", source.mlp.c_fc.weight.T, source.mlp.c_fc.bias),
            ("mlp.down", source.mlp.c_proj.weight.T, source.mlp.c_proj.bias),
            ("norm1", source.ln_1.weight, source.ln_1.bias),
            ("norm2", source.ln_2.weight, source.ln_2.bias),
        ):
            block.get_submodule(name).weight.copy_(weight)
            block.get_submodule(name).bias.copy_(bias)
    ours.norm.weight.copy_(body.ln_f.weight)
    ours.norm.bias.copy_(body.ln_f.bias)
    ours.head.weight.copy_(theirs.lm_head.weight[:11])
