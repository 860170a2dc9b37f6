"""The diffusion transformer: where information flows, what it starts as, and what conditions do to it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from mutoscope.errors import ConfigError
from mutoscope.loading import load_recipe
from mutoscope.models.dit import DiT, DiTBlock, DiTModel, preset
from mutoscope.models.layers import Attention, add_gated, grid_sinusoid, modulate, sinusoid
from mutoscope.models.patches import patchify, token_times, unpatchify
from mutoscope.overrides import override
from mutoscope.types import NO_LABEL, Cond, ModelIO

IO = ModelIO(channels=3, grid=(4, 4, 6), text_dim=12, num_labels=5)
SMALL: dict[str, Any] = {"depth": 2, "width": 32, "heads": 4, "patch": (2, 2, 3)}  # 2 x 2 x 2 tokens


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random numbers in all of its parameters: as if trained, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5))
    return model


def built(io: ModelIO = IO, **changes: Any) -> DiTModel:
    model = shaken(DiT(**SMALL | changes).build(io))
    assert isinstance(model, DiTModel)
    return model


def inputs(batch: int = 2, io: ModelIO = IO, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, io.channels, *io.grid, generator=generator), torch.linspace(10, 900, batch)


def texts(batch: int = 2, length: int = 5, seed: int = 2) -> Cond:
    """Captions of 3, 5, 3, 5, ... tokens."""
    mask = torch.arange(length)[None] < torch.tensor([3, length])[torch.arange(batch) % 2][:, None]
    text = torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(seed))
    return Cond(text=text * mask[..., None], text_mask=mask, label=torch.arange(batch))


# ---------------------------------------------------------------- where information flows


def flow(block: nn.Module, x: Tensor, *condition: Tensor) -> Tensor:
    """(t, n, t, n): whether what comes out at the first place hangs on what goes in at the second."""
    _, t, n, _ = x.shape
    jacobian = torch.autograd.functional.jacobian(lambda v: block(v, *condition).sum((0, 3)), x)
    return jacobian.abs().sum((2, 5)).reshape(t, n, t, n) > 1e-9


@pytest.mark.parametrize("along", ["space", "time", "all"])
def test_a_block_mixes_along_its_own_axis_only(along: Literal["space", "time", "all"]) -> None:
    t, n, width = 3, 4, 16
    block = shaken(DiTBlock(DiT(depth=2, width=width, heads=2), text_dim=None, along=along))
    generator = torch.Generator().manual_seed(0)
    found = flow(block, torch.randn(1, t, n, width, generator=generator), torch.randn(1, 1, width, generator=generator))
    same_frame = torch.eye(t, dtype=torch.bool)[:, None, :, None].expand(t, n, t, n)
    same_place = torch.eye(n, dtype=torch.bool)[None, :, None, :].expand(t, n, t, n)
    expected = {"space": same_frame, "time": same_place, "all": torch.ones_like(same_frame)}[along]
    assert torch.equal(found, expected)


def test_factorised_blocks_take_turns_and_joint_ones_see_all() -> None:
    """Latte's Variant 1: space, time, space, time."""
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(1, 2, 3, 32, generator=generator), torch.randn(1, 1, 32, generator=generator)
    for attention, expected in (("factorised", [6 * 3, 6 * 2] * 2), ("joint", [6 * 6] * 4)):
        model = built(depth=4, attention=attention)
        assert [int(flow(block, x, c).sum()) for block in model.blocks] == expected


def test_a_pair_of_factorised_blocks_connects_everything() -> None:
    model = built(io=ModelIO(channels=1, grid=(4, 4, 6)))
    x = torch.randn(1, 1, 4, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model(x, torch.tensor([500.0]), Cond())[0, 0, 0, 0, 0].backward()
    assert x.grad is not None and (x.grad != 0).all()


# ---------------------------------------------------------------- what it starts as


def test_a_fresh_model_says_zero_and_its_blocks_do_nothing() -> None:
    torch.manual_seed(0)
    model = DiT(**SMALL).build(IO)
    x, time = inputs()
    assert torch.equal(model(x, time, texts()), torch.zeros_like(x))
    tokens = torch.randn(2, 2, 4, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, torch.randn(2, 1, 32), texts().text, texts().text_mask), tokens)


def test_a_fresh_model_learns_in_every_parameter() -> None:
    """Zero at the start must not mean dead: after a few steps a gradient reaches every parameter."""
    torch.manual_seed(0)
    model = DiT(**SMALL).build(IO)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, time = inputs()
    for _ in range(4):
        optimizer.zero_grad()
        (model(x, time, texts()) - x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# ---------------------------------------------------------------- conditions


def test_masked_tokens_have_no_influence() -> None:
    model, (x, time), cond = built(), inputs(), texts()
    assert cond.text is not None and cond.text_mask is not None
    noisy = torch.where(cond.text_mask[..., None], cond.text, 100.0)
    other = Cond(text=noisy, text_mask=cond.text_mask, label=cond.label)
    assert torch.equal(model(x, time, cond), model(x, time, other))


def test_padding_has_no_influence() -> None:
    model, (x, time), cond = built(), inputs(), texts()
    longer = Cond.stack([cond, texts(length=9)]).rows(slice(0, 2))
    torch.testing.assert_close(model(x, time, cond), model(x, time, longer), atol=1e-5, rtol=1e-5)


def test_every_real_token_has_an_influence() -> None:
    model, (x, time), cond = built(), inputs(), texts()
    assert cond.text is not None
    text = cond.text.clone().requires_grad_()
    model(x, time, Cond(text=text, text_mask=cond.text_mask, label=cond.label)).square().sum().backward()
    assert text.grad is not None
    assert torch.equal(text.grad.abs().sum(-1) > 0, cond.text_mask)


def test_a_caption_without_words_is_no_caption() -> None:
    model, (x, time) = built(), inputs()
    wordless = Cond(text=torch.zeros(2, 5, 12), text_mask=torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(model(x, time, wordless), model(x, time, Cond()), atol=1e-5, rtol=1e-5)


def test_samples_without_a_caption_do_not_disturb_the_others() -> None:
    model, (x, time), cond = built(), inputs(), texts()
    mixed = cond.dropped(torch.tensor([False, True]))
    out = model(x, time, mixed)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1], model(x[:1], time[:1], cond.rows(slice(0, 1))), atol=1e-5, rtol=1e-5)


def test_gradients_are_finite_where_a_caption_has_no_words() -> None:
    model, (x, time) = built(), inputs()
    model(x, time, texts().dropped(torch.tensor([False, True]))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_label_is_the_last_row_of_the_table() -> None:
    model, (x, time) = built(), inputs(6)
    cond = Cond(label=torch.tensor([0, 1, 2, 3, 4, NO_LABEL]))
    seen: list[Tensor] = []
    assert model.label is not None
    model.label.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x, time, cond)
    assert torch.equal(seen[0], model.label.weight)


def test_labels_and_times_change_the_output() -> None:
    model, (x, _) = built(), inputs()
    x = x[:1].expand(3, -1, -1, -1, -1)
    out = model(x, torch.tensor([500.0, 500.0, 500.0]), Cond(label=torch.tensor([0, 1, NO_LABEL])))
    assert min((out[i] - out[j]).abs().max() for i, j in ((0, 1), (1, 2), (0, 2))) > 1e-2
    out = model(x, torch.tensor([0.0, 500.0, 999.0]), Cond(label=torch.tensor([0, 0, 0])))
    assert min((out[i] - out[j]).abs().max() for i, j in ((0, 1), (1, 2), (0, 2))) > 1e-2


def test_a_dropped_condition_is_the_null_condition() -> None:
    model, (x, time), cond = built(), inputs(), texts()
    null = Cond(
        text=torch.zeros(2, 1, 12), text_mask=torch.zeros(2, 1, dtype=torch.bool), label=torch.tensor([NO_LABEL] * 2)
    )
    dropped = cond.dropped(torch.tensor([True, True]))
    torch.testing.assert_close(model(x, time, dropped), model(x, time, null), atol=1e-5, rtol=1e-5)
    assert (model(x, time, cond) - model(x, time, null)).abs().max() > 1e-2


# ---------------------------------------------------------------- layers against references in fp64


def test_attention_against_its_formula() -> None:
    attention = shaken(Attention(16, 4, context_width=12))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 7, 12, generator=generator)
    mask = torch.rand(2, 7, generator=generator) < 0.6

    exact = copy.deepcopy(attention).double()
    assert isinstance(exact, Attention)
    norm = lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    q = exact.query(x.double()).reshape(2, 5, 4, 4)
    k, v = (y.reshape(2, 7, 4, 4) for y in exact.key_value(context.double()).split(16, -1))
    q, k = norm(q) * exact.query_scale, norm(k) * exact.key_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2  # √4
    weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    expected = exact.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
    torch.testing.assert_close(attention(x, context, mask).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("times", [1, 3])
def test_gradients_of_modulation_and_gates(times: int) -> None:
    """Of whole videos and of their frames, each input alone, too."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = (torch.randn(2, times, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for function, inputs in ((modulate, (x, a, b)), (add_gated, (x, a, y))):
        for alone in [None, *range(3)]:
            for i, value in enumerate(inputs):
                value.requires_grad_(alone in (None, i))
            assert torch.autograd.gradcheck(function, inputs)
    torch.testing.assert_close(add_gated(x, a, y), x + a[:, :, None] * y)


def test_modulation_and_sinusoids() -> None:
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert modulate(x, torch.tensor([[[10.0, 20.0]]]), torch.tensor([[[0.0, 1.0]]])).tolist() == [[[[11.0, 24.0]]]]
    table = sinusoid(torch.tensor([0.0, 3.0]), 4)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.03, 3.0, 0.03]])
    torch.testing.assert_close(table, torch.cat([expected[:, :2].cos(), expected[:, 2:].sin()], 1))


def test_every_place_of_the_grid_has_its_own_position() -> None:
    positions = grid_sinusoid((5, 6, 7), 32).reshape(5, 6, 7, 32)
    flat = positions.flatten(0, 2)
    assert (torch.cdist(flat, flat) + torch.eye(len(flat))).min() > 0.1
    # A quarter of the width for h, a quarter for w, half for t
    axes = [sinusoid(torch.tensor([place]), width)[0] for place, width in ((3.0, 8), (4.0, 8), (2.0, 16))]
    torch.testing.assert_close(positions[2, 3, 4], torch.cat(axes))


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 3), (4, 4, 6)])
def test_patches_come_back_as_the_video_they_were_cut_from(patch: tuple[int, int, int]) -> None:
    model = built(patch=patch)
    x, _ = inputs()
    patches = patchify(x, patch)
    t, h, w = (size // p for size, p in zip(IO.grid, patch, strict=True))
    assert patches.shape == (2, t, h * w, 3 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(patches, model.grid, patch), x)
    # A token holds one patch of the video, and nothing of its neighbours
    first = x[0, :, : patch[0], : patch[1], : patch[2]]
    assert torch.equal(patches[0, 0, 0].sort().values, first.flatten().sort().values)


def test_videos_are_independent_of_their_company() -> None:
    model, (x, time), cond = built(), inputs(4), texts(4)
    together = model(x, time, cond)
    for i in range(4):
        row = slice(i, i + 1)
        torch.testing.assert_close(model(x[row], time[row], cond.rows(row)), together[row], atol=5e-5, rtol=1e-5)


LATTE = {"S": 32.48, "B": 129.54, "L": 456.81, "XL": 673.68}
"""Millions of parameters as Latte's paper prints them, cut after two digits (arXiv:2401.03048 table 1)."""


@pytest.mark.parametrize("size", LATTE)
def test_parameter_counts_of_latte(size: str) -> None:
    """Of Latte as it is: with a learned variance, and with queries and keys as they are."""
    config = DiT(preset=f"Latte-{size}/2", qk_norm=False)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = config.build(ModelIO(channels=4, out_channels=8, grid=(16, 32, 32)))
    count = sum(p.numel() for p in model.parameters())
    assert int(count / 1e4) / 100 == LATTE[size]


def test_presets_are_sizes_by_name() -> None:
    for size, (depth, width, heads) in {"T": (2, 384, 3), "S": (12, 384, 6), "XL": (28, 1152, 16)}.items():
        for patch in (2, 4, 8):
            config = preset(f"Latte-{size}/{patch}")
            assert (config.depth, config.width, config.heads, config.patch) == (depth, width, heads, (1, patch, patch))
    assert preset("Latte-S/2") == DiT(), "the default"
    named = replace(DiT(preset="Latte-B/4"), base_frames=8, qk_norm=False)
    assert named.sized == replace(preset("Latte-B/4"), base_frames=8, qk_norm=False)
    with pytest.raises(ValueError, match=r"no size 'Latte-M/2'; there are Latte-T/2, "):
        preset("Latte-M/2")
    with pytest.raises(ValueError, match=r"preset=Latte-B/2 says what depth, heads are; leave them out"):
        DiT(preset="Latte-B/2", depth=4, heads=4)


def test_a_preset_is_named_on_the_command_line() -> None:
    recipe = override(load_recipe("minisora.dit"), ["--model.preset", "Latte-B/4"])
    assert isinstance(recipe.model, DiT) and recipe.model.sized.width == 768 and recipe.model.sized.patch == (1, 4, 4)
    with pytest.raises(ConfigError, match=r"recipe\.model\.preset: expected one of 'Latte-T/2'.*did you mean Latte-B/"):
        override(load_recipe("minisora.dit"), ["--model.preset", "Latte-B/3"])


def test_tokens_that_cover_given_and_drawn_frames_are_at_the_noisier_time() -> None:
    times = torch.tensor([[0.0, 0.0, 0.0, 700.0]])
    assert token_times(times, (2, 1, 1)).tolist() == [[0.0, 700.0]]
    assert token_times(torch.tensor([700.0]), (2, 1, 1)).tolist() == [[700.0]]
    model, (x, time), cond = built(), inputs(), texts()
    frames = time[:, None].expand(-1, 4).clone()
    torch.testing.assert_close(model(x, frames, cond), model(x, time, cond), atol=1e-4, rtol=1e-4)
    frames[:, :2] = 0
    assert (model(x, frames, cond) - model(x, time, cond)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 36}, r"model\.width=36 must be a multiple of 8 and of heads=4"),
        ({"width": 40, "heads": 6}, r"model\.width=40 .* heads=6"),
        ({"depth": 3}, r"model\.depth=3 must be even"),
        ({"patch": (1, 3, 2)}, r"model\.patch \(1, 3, 2\) does not divide .* \(4, 4, 6\) along h"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | changes).build(IO)


def test_joint_attention_has_any_depth() -> None:
    x, time = inputs()
    assert built(depth=3, attention="joint")(x, time, texts()).shape == x.shape


# ---------------------------------------------------------------- precision and compilation


def test_autocast_stays_near_full_precision() -> None:
    torch.manual_seed(0)
    model = DiT(**SMALL | {"width": 64}).build(IO)
    nn.init.normal_(model.head.weight, std=0.1)
    for block in model.blocks:
        nn.init.normal_(block.modulation.weight, std=0.1)
    (x, time), cond = inputs(), texts()
    full = model(x, time, cond)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, time, cond)
    half.float().square().mean().backward()
    error = (half - full).square().mean().sqrt() / full.square().mean().sqrt()
    assert error < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_model_in_bf16_runs_without_autocast() -> None:
    model, (x, time) = built().bfloat16(), inputs()
    assert model(x.bfloat16(), time, texts()).dtype == torch.bfloat16


COMPILED = """
import torch
from mutoscope.models.dit import DiT
from mutoscope.types import Cond, ModelIO

torch.manual_seed(0)
for attention in ("factorised", "joint"):
    model = DiT(depth=2, width=16, heads=2, attention=attention).build(
        ModelIO(channels=2, grid=(2, 4, 4), text_dim=6, num_labels=3)
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, time = torch.randn(2, 2, 2, 4, 4), torch.tensor([10.0, 900.0])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    cond = Cond(text=torch.randn(2, 3, 6) * mask[..., None], text_mask=mask, label=torch.tensor([2, -1]))
    plain = model(x, time, cond)
    plain.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x, time, cond)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, plain)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-4)
print("one graph")
"""


def test_it_compiles_into_one_graph() -> None:
    """In a process of its own: the checks of shapes that tests run with are not for the compiler."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILED],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "one graph\n", done.stderr
