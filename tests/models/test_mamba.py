"""Mamba over tokens: what hangs on what, that states are all that is carried, and the published blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.estimate.tracker import Tracker
from mutoscope.models.mamba import Mamba, MambaBlock, MambaModel
from mutoscope.objectives.tokens import NextToken
from mutoscope.randomness import Draw
from mutoscope.recipe import TokenSampler
from mutoscope.samplers.tokens import sample_tokens
from mutoscope.training.offload import recomputed
from mutoscope.types import Batch, Cond, ModelIO, TokenCache

VOCAB = 11
IO = ModelIO(channels=3, grid=(3, 4, 5), vocab=VOCAB, text_dim=6, num_labels=4)
TOTAL = 60
SMALL: dict[int, Mamba] = {
    1: Mamba(version=1, depth=2, width=16, state=4, chunk=0),
    2: Mamba(version=2, depth=2, width=16, state=8, head_dim=8, chunk=0),
}
VERSIONS = pytest.mark.parametrize("version", [1, 2])


def built(version: int, io: ModelIO = IO, **changes: Any) -> MambaModel:
    """A model with random numbers where it starts with zeros or ones, and logits that are not nearly alike."""
    torch.manual_seed(0)
    model = replace(SMALL[version], **changes).build(io)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5))
    return model


def inputs(batch: int = 2, io: ModelIO = IO) -> tuple[Tensor, Cond]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (batch, *io.grid), generator=generator)
    mask = torch.arange(5) < torch.tensor([3, 5])[torch.arange(batch) % 2][:, None]
    text = torch.randn(batch, 5, 6, generator=generator) * mask[..., None]
    return tokens, Cond(text=text, text_mask=mask, label=torch.arange(batch) % 4)


def recurrent(model: MambaModel, tokens: Tensor, cond: Cond, lengths: list[int]) -> tuple[Tensor, TokenCache]:
    """The logits of one call after the other with a cache."""
    cache, found = TokenCache(), []
    for length in lengths:
        at = torch.full((len(tokens),), cache.length)
        found.append(model(tokens, cond, at, length, cache))
    return torch.cat(found, dim=1), cache


# ---------------------------------------------------------------- what hangs on what


@VERSIONS
@pytest.mark.parametrize("neighbours", [True, False])
def test_logits_hang_on_earlier_tokens_alone_and_on_all_of_them(version: int, neighbours: bool) -> None:
    model = built(version, neighbours=neighbours)
    tokens, cond = inputs(1)
    before = model(tokens, cond)[0]
    for j in range(0, TOTAL - 1, 7):
        changed = tokens.clone()
        changed.view(-1)[j] = (changed.view(-1)[j] + 1) % VOCAB
        moved = (model(changed, cond)[0] - before).abs().amax(-1)
        assert torch.equal(moved[: j + 1], torch.zeros(j + 1))
        assert (moved[j + 1 :] > 0).all()


@VERSIONS
def test_conditions_and_places_change_the_logits(version: int) -> None:
    model, (tokens, cond) = built(version), inputs()
    whole = model(tokens, cond)
    for other in (replace(cond, label=cond.label + 1), cond.dropped(torch.ones(2, dtype=torch.bool)), Cond()):
        assert (model(tokens, other) - whole).abs().amax((1, 2)).min() > 1e-3
    same = torch.zeros(1, *IO.grid, dtype=torch.long)
    by_place = built(version, neighbours=False)(same, Cond())[0]
    assert torch.pdist(by_place[10:]).min() > 1e-6


@VERSIONS
def test_masked_words_and_company_have_no_influence(version: int) -> None:
    model, (tokens, cond) = built(version), inputs()
    assert cond.text is not None and cond.text_mask is not None
    noisy = replace(cond, text=torch.where(cond.text_mask[..., None], cond.text, 100.0))
    assert torch.equal(model(tokens, cond), model(tokens, noisy))
    for i in range(2):
        alone = model(tokens[i : i + 1], cond.rows(slice(i, i + 1)))
        torch.testing.assert_close(alone[0], model(tokens, cond)[i], atol=1e-5, rtol=1e-5)


@VERSIONS
def test_a_window_without_a_cache_begins_at_a_state_of_zero(version: int) -> None:
    """It is what the positions from `start` on would be in a sequence that begins there, at the same places."""
    model, (tokens, cond) = built(version, neighbours=False), inputs()
    start, length = torch.tensor([7, 20]), 15
    window = model(tokens, cond, start, length)
    for i in range(2):
        alone = model(tokens[i : i + 1], cond.rows(slice(i, i + 1)), start[i : i + 1], length)
        torch.testing.assert_close(alone[0], window[i], atol=1e-5, rtol=1e-5)
        other = tokens.clone()
        other.view(2, -1)[i, : start[i] - 1] = 0  # the token right before it is part of its input
        assert torch.equal(model(other, cond, start, length)[i], window[i])
    assert (window[0] - model(tokens, cond)[0, 7:22]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="both of start and length"):
        model(tokens, cond, start)


# ---------------------------------------------------------------- states


@VERSIONS
def test_recurrent_equals_parallel(version: int) -> None:
    model, (tokens, cond) = built(version), inputs()
    with torch.no_grad():
        whole = model(tokens, cond)
        one_by_one, cache = recurrent(model, tokens, cond, [1] * TOTAL)
        prefix, _ = recurrent(model, tokens, cond, [23, *[1] * (TOTAL - 23)])
    for found in (one_by_one, prefix):
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.argmax(-1), whole.argmax(-1))
    assert cache.length == TOTAL


@VERSIONS
def test_the_cache_does_not_grow(version: int) -> None:
    model, (tokens, cond) = built(version), inputs()
    sizes = []
    with torch.no_grad():
        for n in (1, 10, TOTAL):
            _, cache = recurrent(model, tokens, cond, [1] * n)
            sizes.append({name: x.untyped_storage().nbytes() for name, x in cache.state.items()})
    assert sizes[0] == sizes[1] == sizes[2] and len(sizes[0]) == 4
    assert all(x.shape[0] == 2 for x in cache.state.values())


@VERSIONS
@pytest.mark.parametrize("chunk", [7, 59])
def test_chunks_change_no_number_and_no_gradient(version: int, chunk: int) -> None:
    tokens, cond = inputs()
    found = {}
    for size in (0, chunk):
        model = built(version, chunk=size).double()
        double = replace(cond, text=cond.text.double())
        logits = model(tokens, double)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        found[size] = [logits, *(p.grad for p in model.parameters())]
    for pieces, whole in zip(found[chunk], found[0], strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-9, rtol=1e-9)


@VERSIONS
def test_a_cached_prefix_goes_in_chunks_too(version: int) -> None:
    tokens, cond = inputs()
    with torch.no_grad():
        whole, _ = recurrent(built(version), tokens, cond, [50, 10])
        pieces, _ = recurrent(built(version, chunk=16), tokens, cond, [50, 10])
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


@VERSIONS
def test_sampling_with_states_is_sampling_without_and_goes_on_from_known_frames(version: int) -> None:
    io = replace(IO, grid=(3, 2, 3))
    model, (tokens, cond) = built(version, io), inputs(io=io)

    class Forgetful(torch.nn.Module):
        """Begins anew for each token."""

        def forward(self, tokens: Tensor, cond: Cond, start: Tensor, length: int, cache: TokenCache) -> Tensor:
            return model(tokens, cond, torch.zeros_like(start), int(start[0]) + length)[:, -length:]

    for sampler in (TokenSampler(temperature=0), TokenSampler(top_k=5, guidance_scale=2.0)):
        draw = lambda: Draw(0, "sample", [0, 1])
        drawn = sample_tokens(model, sampler, cond, io.grid, draw(), known=tokens[:, :1])
        assert torch.equal(drawn, sample_tokens(Forgetful(), sampler, cond, io.grid, draw(), known=tokens[:, :1]))
        assert torch.equal(drawn[:, :1], tokens[:, :1])


# ---------------------------------------------------------------- training


@VERSIONS
def test_every_parameter_gets_a_gradient_and_recomputed_blocks_the_same(version: int) -> None:
    tokens, cond = inputs()
    batch = Batch(ids=["a", "b"], samples=[0, 1], cond=cond, tokens=tokens)
    gradients = []
    for again, chunk in ((False, 0), (True, 0), (True, 16)):
        model = built(version, chunk=chunk)
        for block in model.blocks if again else ():
            block.forward = recomputed(block.forward)  # type: ignore[method-assign]
        NextToken(cond_dropout=0).loss(model, batch, Draw(0, "noise", [0, 1])).total.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-6, rtol=1e-4)


def peak(version: int, frames: int, chunk: int) -> int:
    """Bytes of activations at the most, in a forward and backward pass over so many frames of 16 tokens."""
    io = ModelIO(channels=3, grid=(frames, 4, 4), vocab=4)
    model = replace(SMALL[version], width=32, chunk=chunk).build(io)
    tracker = Tracker("cpu")
    tracker.tell("weights", model.parameters())
    tokens = torch.zeros(1, *io.grid, dtype=torch.long)
    with tracker:
        model(tokens, Cond()).sum().backward()
    return tracker.account.peak()["activations"]


@VERSIONS
def test_activations_of_one_chunk_live_at_a_time(version: int) -> None:
    short, long, whole = peak(version, 4, 16), peak(version, 16, 16), peak(version, 16, 0)
    config = SMALL[version]
    inner = 2 * 32
    # What grows: the states that chunks begin at, and logits, their gradients and tokens
    states = config.depth * (inner * config.state + 3 * (inner + (2 * config.state if version == 2 else 0))) * 4
    tokens = 16 * (3 * 4 * 4 + 4 * 8)
    assert long - short < 12 * (states + tokens)
    assert long < whole / 3


def test_windows_are_trained_as_any_token_models() -> None:
    tokens, cond = inputs()
    batch = Batch(ids=["a", "b"], samples=[0, 1], cond=cond, tokens=tokens)
    loss = NextToken(window=20).loss(built(1), batch, Draw(0, "noise", [0, 1]))
    assert loss.total.isfinite()


@VERSIONS
def test_autocast_stays_near_full_precision(version: int) -> None:
    torch.manual_seed(0)
    model = replace(SMALL[version], width=64, chunk=16).build(IO)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    tokens, cond = inputs()
    full = model(tokens, cond)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens, cond)
    half.float().square().mean().backward()
    assert (half - full).square().mean().sqrt() / full.square().mean().sqrt() < 0.03
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_states_are_fp32_whatever_the_weights_are() -> None:
    for version in (1, 2):
        model, (tokens, cond) = built(version).bfloat16(), inputs()
        logits, cache = recurrent(model, tokens, replace(cond, text=cond.text.bfloat16()), [10])
        assert logits.dtype == torch.bfloat16
        assert {x.dtype for name, x in cache.state.items() if name.startswith("state")} == {torch.float32}


# ---------------------------------------------------------------- the published blocks


def published(version: int) -> torch.nn.Module:
    """transformers' model of three layers, its weights as they are initialised."""
    torch.manual_seed(0)
    if version == 1:
        from transformers import MambaConfig, MambaForCausalLM

        return MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=32, num_hidden_layers=3, state_size=8))
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=9, hidden_size=32, num_hidden_layers=3, state_size=8, head_dim=16, num_heads=4, n_groups=1,
        chunk_size=16,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


@VERSIONS
def test_blocks_are_transformers_blocks(version: int) -> None:
    """With copied weights: outputs, gradients of the inputs and of each weight, and the head's logits."""
    theirs = published(version)
    config = Mamba(version=version, depth=3, width=32, state=8, head_dim=64 if version == 1 else 16, chunk=0)
    ours = config.build(ModelIO(channels=3, grid=(2, 4, 5), vocab=9))
    copied = ours.state_dict()
    for name, weight in theirs.backbone.layers.state_dict().items():
        copied[f"blocks.{name}"] = weight.flatten() if name.endswith("A_log") else weight
    copied["norm.weight"] = theirs.backbone.norm_f.weight
    copied["head.weight"] = theirs.lm_head.weight
    assert len(copied) == len(ours.state_dict())
    ours.load_state_dict(copied)

    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits = theirs(inputs_embeds=other).logits
    logits.square().sum().backward()
    y, states = mine, ours._states(2, None)
    for i, block in enumerate(ours.blocks):
        y, _, _ = block(y, states[2 * i], states[2 * i + 1])
    found = ours.head(ours.norm(y))
    found.square().sum().backward()
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
    gradients = {name: q.grad for name, q in theirs.backbone.layers.named_parameters()}
    for name, p in ours.blocks.named_parameters():
        assert (p.grad - gradients[name].view(p.shape)).norm() < 1e-5 * p.grad.norm(), name


@VERSIONS
def test_recurrent_states_are_transformers(version: int) -> None:
    """Their cache after a prefix is ours: of the convolution and of the recurrence."""
    theirs = published(version)
    config = Mamba(version=version, depth=1, width=32, state=8, head_dim=64 if version == 1 else 16, chunk=0)
    ours = MambaBlock(config, None)
    layer = theirs.backbone.layers[0]
    state = {n: w.flatten() if n.endswith("A_log") else w for n, w in layer.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = theirs(inputs_embeds=x, use_cache=True).cache_params
        zero = config.build(ModelIO(channels=3, grid=(1, 1, 1), vocab=9))._states(2, None)
        _, conv, final = ours(x, *zero)
    torch.testing.assert_close(final, cache.get_recurrent_state(0, state_idx=0).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        conv.transpose(1, 2), cache.get_conv_state(0, state_idx=0)[..., -3:], atol=1e-5, rtol=1e-5
    )


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0, "state": 0}, r"model\.depth=0, model\.state=0: must be at least 1"),
        ({"chunk": -1}, r"model\.chunk=-1"),
        ({"head_dim": 24}, r"head_dim=24 must divide expand × width = 32"),
        ({"version": 1}, r"head_dim=8 is of version 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL[2], **changes)


def test_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="this model is over tokens"):
        SMALL[1].build(ModelIO(channels=3, grid=(2, 2, 2)))


def test_parameters_of_mamba_130m() -> None:
    """As state-spaces/mamba-130m and mamba2-130m have them, with their vocabularies of 50,280 and 50,288."""
    counts = {}
    for version, state, vocab in ((1, 16, 50_280), (2, 128, 50_288)):
        with torch.device("meta"):
            block = MambaBlock(Mamba(version=version, state=state), None)
        counts[version] = 24 * sum(p.numel() for p in block.parameters()) + (1 + vocab) * 768
    assert counts == {1: 129_135_360, 2: 128_989_632}


COMPILED = """
import torch
from mutoscope.models.mamba import Mamba
from mutoscope.types import Cond, ModelIO
for version in (1, 2):
    torch.manual_seed(0)
    config = Mamba(version=version, depth=1, width=16, state=4, head_dim=64 if version == 1 else 8)
    model = config.build(ModelIO(channels=2, grid=(2, 4, 4), vocab=7, text_dim=6))
    for n, p in model.named_parameters():
        if "A_log" not in n and "dt_bias" not in n:
            torch.nn.init.normal_(p, std=0.3)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    args = (torch.randn(2, 32, 16), *model._states(2, None), torch.randn(2, 3, 6), mask)
    block = model.blocks[0]
    plain = block(*args)[0]
    plain.sum().backward()
    gradients = {n: p.grad.clone() for n, p in block.named_parameters()}
    block.zero_grad()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(*args)[0]
    compiled.sum().backward()
    torch.testing.assert_close(compiled, plain)
    for n, p in block.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], atol=1e-4, rtol=1e-4)
print("one graph")
"""


@pytest.mark.slow
def test_blocks_compile_into_one_graph() -> None:
    """The scan is one operator in it. In a process of its own: the checks of shapes are not for the compiler."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILED],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == "one graph\n", done.stderr
