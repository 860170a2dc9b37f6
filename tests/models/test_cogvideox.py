"""CogVideoX against diffusers' pipelines, at any size; positions made once; blocks compiled without a break."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import embeddings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint as recompute

from mutoscope.autoencoders.cogvideox import known_latents
from mutoscope.checkpoints import load_part, open_checkpoint, scheduler_fields
from mutoscope.known_checkpoints import KNOWN, TINY
from mutoscope.models.cogvideox import CogVideoX, CogVideoXModel, check_shape
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Sampler
from mutoscope.recipes.cogvideox import t2v_lora_tiny
from mutoscope.samplers.diffusion import sample_diffusion
from mutoscope.training.offload import place
from mutoscope.types import Batch, Cond, ModelIO

Shape = tuple[int, int, int]
NATIVE, PORTRAIT, LARGER, LONGER = (9, 32, 48), (9, 48, 32), (17, 64, 64), (25, 32, 48)
"""(T, H, W) in pixels. The tiny checkpoints' own size, for 1.0; their RoPE covers 128 × 128 in 1.5."""
GRIDS = {NATIVE: (3, 4, 6), PORTRAIT: (3, 6, 4), LARGER: (5, 8, 8), LONGER: (7, 4, 6)}
every_tiny = pytest.mark.parametrize("name", TINY)
every_size = pytest.mark.parametrize("size", GRIDS, ids=str)


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield open_checkpoint("tiny://cogvideox-t2v")
    pipeline_of.cache_clear()


def is_i2v(name: str) -> bool:
    return "i2v" in name


def io(*sizes: Shape) -> ModelIO:
    grids = [GRIDS[size] for size in sizes]
    return ModelIO(channels=4, grid=grids[0], more_grids=tuple(grids[1:]), text_dim=32)


def config(name: str) -> CogVideoX:
    return CogVideoX(path=f"tiny://{name}", task="i2v" if is_i2v(name) else "t2v", weights="fp32")


def build(name: str, *sizes: Shape) -> CogVideoXModel:
    return config(name).build(io(*sizes))


@cache
def pipeline_of(name: str) -> Any:
    cls = diffusers.CogVideoXImageToVideoPipeline if is_i2v(name) else diffusers.CogVideoXPipeline
    pipe = cls.from_pretrained(open_checkpoint(f"tiny://{name}"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 32, 32, generator=torch.Generator().manual_seed(seed))


def cond(name: str, shape: tuple[int, ...], seed: int = 0) -> Cond:
    """A condition for latents of this shape."""
    embedded = text(shape[0], seed)
    known = None
    if is_i2v(name):
        image = torch.randn(shape[0], shape[1], 1, *shape[3:], generator=torch.Generator().manual_seed(seed + 1))
        known = known_latents(image, shape[2])
    return Cond(text=embedded, text_mask=torch.ones(embedded.shape[:2], dtype=torch.bool), known=known)


# ---------------------------------------------------------------- parity with diffusers


@every_tiny
@every_size
def test_the_network_is_what_the_pipeline_calls(name: str, size: Shape) -> None:
    """One denoising step of diffusers' own pipeline: same latents, same text, same image, same prediction."""
    model, pipe = build(name, size), pipeline_of(name)
    # Where 5b-I2V's learned positions do not fit, diffusers' own transformer refuses or adds another model's sinusoids
    theirs = model.transformer if name == "cogvideox-i2v" and size != NATIVE else pipe.transformer
    frames, height, width = size
    calls = []
    handle = theirs.register_forward_hook(lambda _, __, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True)
    try:
        components = pipe.components | {"transformer": theirs}
        type(pipe)(**components)(
            **({"image": torch.rand(1, 3, height, width)} if is_i2v(name) else {}), prompt="a red dog",
            num_frames=frames, height=height, width=width, num_inference_steps=1, guidance_scale=1.0,
            max_sequence_length=32, output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    finally:
        handle.remove()
    ((kwargs, expected),) = calls
    seen = kwargs["hidden_states"].transpose(1, 2)
    embedded = kwargs["encoder_hidden_states"]
    condition = Cond(text=embedded, text_mask=torch.ones(embedded.shape[:2], dtype=torch.bool),
                     known=seen[:, 4:] if is_i2v(name) else None)  # fmt: skip
    with torch.no_grad():
        ours = model(seen[:, :4].contiguous(), kwargs["timestep"].float(), condition)
    assert seen.shape[2] % (2 if "1.5" in name else 1) == 0
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-6)


@every_tiny
def test_a_sample_is_the_pipelines(name: str) -> None:
    """Our sampler and diffusers' DDIM from the same noise, guided, at a portrait size: also what 1.5 puts in front of
    the latents and cuts off, what stands for no caption, and where the image is."""
    frames, height, width = PORTRAIT
    t, h, w = GRIDS[PORTRAIT]
    model, pipe = build(name, PORTRAIT), pipeline_of(name)
    objective = Diffusion(**scheduler_fields(f"tiny://{name}"))
    padded = t + objective.padding(t)
    noise = Draw(3, "sample", [0]).normal(4, padded, h, w)
    embedded, empty = (pipe.encode_prompt(p, do_classifier_free_guidance=False, max_sequence_length=32)[0]
                       for p in ("a red dog", ""))  # fmt: skip
    condition = Cond(text=embedded, text_mask=torch.ones(1, 32, dtype=torch.bool), null_text=empty)
    image: dict[str, Tensor] = {}
    if is_i2v(name):
        image = {"image": torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(5))}
        posterior = pipe.vae.encode(2 * image["image"][:, :, None] - 1).latent_dist
        factor = 1 / 0.7 if "1.5" in name else 0.7
        start = factor * posterior.sample(torch.Generator().manual_seed(9))
        condition = replace(condition, known=known_latents(start, t))
    with torch.no_grad():
        expected = type(pipe)(**pipe.components | {"transformer": model.transformer})(
            **image, prompt_embeds=embedded, negative_prompt_embeds=empty, latents=noise.transpose(1, 2),
            num_frames=frames, height=height, width=width, num_inference_steps=4, guidance_scale=4.0,
            max_sequence_length=32, output_type="latent", generator=torch.Generator().manual_seed(9),
        ).frames.transpose(1, 2)  # fmt: skip
    sampler = Sampler(
        method="ddim", steps=4, guidance_scale=4.0
    )  # diffusers walks unevenly where steps do not divide 1000
    ours = sample_diffusion(model, objective, sampler, condition, (4, t, h, w), Draw(3, "sample", [0]))
    assert ours.shape == (1, 4, t, h, w)
    torch.testing.assert_close(ours, expected[:, :, -t:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["THUDM/CogVideoX-5b", "THUDM/CogVideoX1.5-5B"])
@pytest.mark.parametrize(("height", "width"), [(480, 720), (720, 480), (512, 768), (256, 384), (768, 1360)])
def test_rotary_positions_of_full_size_are_the_pipelines(name: str, height: int, width: int) -> None:
    with torch.device("meta"):
        model = CogVideoXModel(load_part(name, "transformer", torch.bfloat16), ModelIO(channels=16, grid=(12, 60, 90)))
    pipe = diffusers.CogVideoXPipeline.__new__(diffusers.CogVideoXPipeline)
    pipe.vae_scale_factor_spatial = 8  # all that this method of a pipeline looks at
    pipe.transformer = model.transformer
    expected = pipe._prepare_rotary_positional_embeddings(height, width, 12, torch.device("cpu"))
    grid = (12 // model.temporal_patch, height // 16, width // 16)
    for ours, theirs in zip(model._rotary(grid, torch.zeros(1)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_positions_of_1_5_go_beyond_the_checkpoints_largest_size() -> None:
    """Diffusers fails there, on tensors of unequal size."""
    model = build("cogvideox-1.5-t2v", NATIVE)
    assert model.transformer.config.sample_width == 16
    x = torch.randn(1, 4, 2, 4, 32)
    assert model(x, torch.tensor([5.0]), cond("cogvideox-1.5-t2v", x.shape)).shape == x.shape
    wide, narrow = model._rotary((1, 2, 16), x), model._rotary((1, 2, 8), x)
    assert torch.equal(wide[0].reshape(2, 16, -1)[:, :8], narrow[0].reshape(2, 8, -1))


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize(("name", "function"), [
    ("cogvideox-2b", "get_3d_sincos_pos_embed"), ("cogvideox-t2v", "get_3d_rotary_pos_embed"),
])  # fmt: skip
def test_positions_are_made_once_for_each_size(name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = build(name, PORTRAIT), []
    original = getattr(embeddings, function)
    monkeypatch.setattr(embeddings, function, lambda *args, **kwargs: made.append(args) or original(*args, **kwargs))
    for size in (PORTRAIT, LARGER, PORTRAIT, LARGER):
        x = torch.randn(1, 4, *GRIDS[size])
        model(x, torch.tensor([5.0]), cond(name, x.shape))
    assert len(made) == 2


def test_learned_positions_are_used_where_all_sizes_are_their_own() -> None:
    model, x = build("cogvideox-i2v", NATIVE), torch.randn(1, 4, 3, 4, 6)
    condition, time = cond("cogvideox-i2v", x.shape), torch.tensor([7.0])
    with torch.no_grad():
        before = model(x, time, condition)
        model.transformer.patch_embed.pos_embedding[:, 32:] += 1
        assert not torch.equal(model(x, time, condition), before)
    assert model.learned_positions
    assert model.transformer.config.use_learned_positional_embeddings


@pytest.mark.parametrize("sizes", [(PORTRAIT,), (NATIVE, NATIVE, LARGER), (LONGER,)], ids=["size", "bucket", "frames"])
def test_learned_positions_are_left_out_elsewhere(sizes: tuple[Shape, ...]) -> None:
    """For good: what is saved has none, so that diffusers samples at any size, as it was trained."""
    model = build("cogvideox-i2v", *sizes)
    assert not model.learned_positions
    assert "patch_embed.pos_embedding" not in model.transformer.state_dict()
    assert not model.transformer.config.use_learned_positional_embeddings


def test_the_buffer_of_sinusoids_is_no_wider_than_the_weights() -> None:
    model, x = replace(config("cogvideox-2b"), weights="bf16").build(io(NATIVE)), torch.randn(1, 4, 3, 4, 6)
    assert model.transformer.patch_embed.pos_embedding.dtype == torch.bfloat16
    condition = cond("cogvideox-2b", x.shape)
    assert condition.text is not None
    net = load_part("tiny://cogvideox-2b", "transformer", torch.bfloat16)
    with torch.no_grad():
        out = model(x, torch.tensor([5.0]), condition)
        theirs = net(x.transpose(1, 2).bfloat16(), condition.text.bfloat16(), torch.tensor([5]), return_dict=False)[0]
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), theirs.transpose(1, 2))


# ---------------------------------------------------------------- training


@every_tiny
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    model = build(name, NATIVE)
    objective = Diffusion(**scheduler_fields(f"tiny://{name}"))
    latents = torch.randn(2, 4, 3, 4, 6)
    batch = Batch(ids=["a", "b"], samples=[0, 1], cond=cond(name, latents.shape), latents=latents)
    objective.loss(model, batch, Draw(0, "train", [0, 1])).total.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-1.5-i2v"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    x = torch.randn(1, 4, 4, 6, 4)
    gradients = []
    for recomputed in (False, True):
        model = build(name, PORTRAIT)
        if recomputed:
            for block in model.blocks:
                block.forward = partial(recompute, block.forward, use_reentrant=False)
        model(x, torch.tensor([5.0]), cond(name, x.shape)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own looking
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("name", "trained"), [("cogvideox-2b", ""), ("cogvideox-t2v", "to_q")], ids=["all", "some"])
def test_one_graph_serves_all_blocks_of_a_size_and_none_breaks(
    name: str, trained: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2b model at sizes other than its own broke the graphs of its seed's trainer. Ten blocks: more than the
    eight versions of a function that torch compiles before it gives up, silently. Where only some weights are trained,
    as under LoRA, the first block is no case of its own."""
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setitem(TINY[name]["transformer"], "num_layers", 10)
    with FakeTensorMode():
        shapes = build(name, PORTRAIT, LARGER)
    transformer = shapes.transformer.from_config(TINY[name]["transformer"])
    model = CogVideoXModel(transformer, io(PORTRAIT, LARGER))
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(trained in parameter_name)
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    place(model, replace(t2v_lora_tiny(), compile=True, activation_checkpointing=checkpointing), torch.device("cpu"))
    plain = CogVideoXModel(transformer.from_config(TINY[name]["transformer"]), io(PORTRAIT, LARGER))
    plain.load_state_dict(model.state_dict())
    for size in (PORTRAIT, LARGER, PORTRAIT):
        x = torch.randn(1, 4, *GRIDS[size])
        out = model(x, torch.tensor([5.0]), cond(name, x.shape))
        out.square().mean().backward()
        torch.testing.assert_close(out, plain(x, torch.tensor([5.0]), cond(name, x.shape)), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2
    torch._dynamo.reset()


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(("name", "task", "told"), [
    ("cogvideox-t2v", "i2v", r"for text to video, the recipe for image to video; take .*CogVideoX-5b-I2V"),
    ("cogvideox-1.5-i2v", "t2v", r"for image to video, the recipe for text to video"),
])  # fmt: skip
def test_the_task_must_be_the_checkpoints(name: str, task: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CogVideoX(path=f"tiny://{name}", task=task).build(io(NATIVE))


@pytest.mark.parametrize(("change", "told"), [
    ({"channels": 16}, "latents of 4 channels, .* autoencoder has 16"),
    ({"text_dim": None}, "text embeddings of width 32, .* text has None"),
    ({"grid": (2, 4, 6)}, r"frames=5 .* 8·n \+ 1 \(nearest: 1 or 9\)"),
    ({"more_grids": ((3, 4, 5),)}, r"width=40 .* a multiple of 16 \(nearest: 32 or 48\)"),
])  # fmt: skip
def test_the_parts_before_must_be_the_checkpoints(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config("cogvideox-t2v").build(replace(io(NATIVE), **change))


def test_sizes_are_taken_or_refused_with_the_nearest() -> None:
    of = {name: KNOWN[f"THUDM/{name}"]["transformer"] for name in ("CogVideoX-5b", "CogVideoX1.5-5B")}
    for good in ((49, 480, 720), (49, 720, 480), (1, 16, 16), (81, 768, 1360), (9, 512, 512)):
        for transformer in of.values():
            check_shape(transformer, *good)
    with pytest.raises(ValueError, match=r"frames=50 .*\(nearest: 49 or 57\)\.$"):
        check_shape(of["CogVideoX-5b"], 50, 480, 720)
    with pytest.raises(
        ValueError, match=r"frames=77 .*\(nearest: 73 or 81\)\. CogVideoX 1\.5 was trained on 16·n \+ 1"
    ):
        check_shape(of["CogVideoX1.5-5B"], 77, 768, 1360)
    with pytest.raises(ValueError, match=r"height=8 .*\(nearest: 16 or 32\)"):
        check_shape(of["CogVideoX-5b"], 49, 8, 720)


def test_what_a_forward_pass_is_given_must_fit() -> None:
    x, time = torch.randn(1, 4, 3, 4, 6), torch.tensor([5.0])
    given = cond("cogvideox-i2v", x.shape)
    t2v, i2v, later = (build(n, NATIVE) for n in ("cogvideox-t2v", "cogvideox-i2v", "cogvideox-1.5-t2v"))
    with pytest.raises(ValueError, match="for text to video and was given an image"):
        t2v(x, time, given)
    with pytest.raises(ValueError, match="for image to video and was given no image"):
        i2v(x, time, replace(given, known=None))
    with pytest.raises(ValueError, match="captions of 32 tokens, padded, and got none"):
        t2v(x, time, Cond())
    with pytest.raises(ValueError, match="captions of 32 tokens, padded, and got 31 tokens"):
        short = Cond(text=torch.zeros(1, 31, 32), text_mask=torch.ones(1, 31, dtype=torch.bool))
        t2v(x, time, short)
    with pytest.raises(ValueError, match=r"3 latents along time: .* set objective\.temporal_patch = 2"):
        later(x, time, replace(given, known=None))


def test_the_network_is_known_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    at = ModelIO(channels=16, grid=(21, 96, 170), text_dim=4096)
    with FakeTensorMode():
        model = CogVideoX(path="THUDM/CogVideoX1.5-5B-I2V", task="i2v").build(at)
    assert model.grid == (11, 48, 85)
    assert len(model.blocks) == 42
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
