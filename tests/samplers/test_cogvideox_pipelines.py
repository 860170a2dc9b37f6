"""Drawing from CogVideoX: bit for bit as diffusers' pipelines draw, from the one transformer there is, which is left as
it was."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mutoscope.adapters import write_diffusers, write_kohya, write_peft
from mutoscope.checkpoints import load_part, open_checkpoint
from mutoscope.data.video import write_video
from mutoscope.known_checkpoints import TINY
from mutoscope.recipe import Lora
from mutoscope.samplers import cogvideox
from mutoscope.samplers.cogvideox import AdapterFile, Drawer, embed_prompts, load_adapters, open_drawer
from mutoscope.samplers.request import Request, request_for
from mutoscope.training.lora import adapter_of, adapter_state, add_lora, load_adapter_state
from mutoscope.weights import hash_weights, save_weights

PROMPT, NEGATIVE = "a red dog", "a blurred cat"
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)
VIDEO = RNG.integers(0, 256, (9, 1, 1, 3), dtype=np.uint8).repeat(32, 1).repeat(48, 2)


def path(name: str = "cogvideox-t2v") -> str:
    return f"tiny://{name}"


def request(name: str = "cogvideox-t2v", **fields: Any) -> Request:
    small = {"frames": 9, "height": 32, "width": 48, "steps": 3, "negative_prompt": NEGATIVE}
    image = {"image": IMAGE} if "i2v" in name else {}
    return replace(request_for(path(name), PROMPT), **(small | image | fields))


@cache
def embeddings(name: str = "cogvideox-t2v") -> cogvideox.Embeddings:
    return embed_prompts(path(name), [request(name)], "fp32")


def transformer(name: str = "cogvideox-t2v", lora: Lora | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The checkpoint's, perhaps with a LoRA that does something."""
    made = load_part(path(name), "transformer", dtype)
    if lora is not None:
        add_lora(made, lora, seed=0)
        generator = torch.Generator().manual_seed(1)
        for key, tensor in adapter_state(made).items():
            if "lora_B" in key:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return made


@cache
def untouched(name: str) -> Drawer:
    """Of the checkpoint's own transformer, for all tests that leave it as it is: for all."""
    return Drawer(path(name), transformer(name), embeddings(name), tile=False)


def drawer(name: str = "cogvideox-t2v", net: nn.Module | None = None, tile: bool = False) -> Drawer:
    if net is None and not tile:
        return untouched(name)
    return Drawer(path(name), net or transformer(name), embeddings(name), tile=tile)


@cache
def _components(name: str) -> dict[str, Any]:
    """Of diffusers' own pipeline, loaded by diffusers."""
    kind = diffusers.CogVideoXImageToVideoPipeline if "i2v" in name else diffusers.CogVideoXPipeline
    return kind.from_pretrained(open_checkpoint(path(name))).components


def plain(name: str = "cogvideox-t2v", kind: str | None = None, **options: Any) -> Any:
    """What a user of diffusers gets for the same request; options as its pipelines have them."""
    kind = kind or ("CogVideoXImageToVideoPipeline" if "i2v" in name else "CogVideoXPipeline")
    components = _components(name) | {key: options.pop(key) for key in ("transformer", "scheduler") if key in options}
    pipe = getattr(diffusers, kind)(**components)
    pipe.set_progress_bar_config(disable=True)
    usual = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 32, "width": 48, "num_inference_steps": 3,
             "guidance_scale": 6.0, "max_sequence_length": 32, "output_type": "latent",
             "generator": torch.Generator().manual_seed(0)}  # fmt: skip
    usual |= {} if "video" in options else {"num_frames": 9}
    usual |= {"image": Image.fromarray(IMAGE)} if "i2v" in name else {}
    return pipe(**(usual | options)).frames


def plain_latents(name: str = "cogvideox-t2v", **options: Any) -> Tensor:
    """Without what 1.5 draws in front and throws away."""
    return plain(name, **options)[:, 1 if "1.5" in name else 0 :].transpose(1, 2)


# ---------------------------------------------------------------- the same as diffusers


@pytest.mark.parametrize("name", ["cogvideox-t2v", "cogvideox-1.5-i2v"])
def test_frames_are_the_pipelines_to_the_bit(name: str) -> None:
    (frames,) = plain(name, output_type="pil")
    drawn = drawer(name).draw(request(name))
    assert drawn.dtype == np.uint8 and drawn.shape == (9, 32, 48, 3)
    np.testing.assert_array_equal(drawn, np.stack([np.array(frame) for frame in frames]))


@pytest.mark.parametrize(
    "name, scheduler", [*((name, "ddim") for name in TINY), ("cogvideox-2b", "dpm"), ("cogvideox-1.5-i2v", "dpm")]
)
def test_latents_are_the_pipelines_to_the_bit(name: str, scheduler: Any) -> None:
    kind = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}[scheduler]
    expected = plain_latents(name, scheduler=kind.from_config(_components(name)["scheduler"].config))
    drawn = drawer(name).latents(request(name, scheduler=scheduler))
    assert drawn.shape == (1, 4, 3, 4, 6)
    assert torch.equal(drawn, expected)


def test_the_checkpoints_own_solver_is_taken_where_none_is_named() -> None:
    draw = drawer().latents
    assert torch.equal(draw(request()), draw(request(scheduler="ddim")))
    assert not torch.equal(draw(request()), draw(request(scheduler="dpm")))


def test_without_guidance_the_negative_prompt_is_not_asked_for() -> None:
    asked = request(guidance_scale=1.0)
    embedded = embed_prompts(path(), [asked], "fp32")
    assert list(embedded) == [PROMPT]
    drawn = Drawer(path(), transformer(), embedded).latents(asked)
    torch.testing.assert_close(drawn, plain_latents(guidance_scale=1.0), rtol=0, atol=1e-5)  # of other addresses


def test_cogvideos_dynamic_guidance_is_the_pipelines() -> None:
    drawn = drawer().latents(request(dynamic_guidance="cogvideox"))
    assert torch.equal(drawn, plain_latents(use_dynamic_cfg=True))
    assert not torch.equal(drawn, plain_latents())


def test_cosine_guidance_falls_from_step_to_step() -> None:
    """Where CogVideo's formula, given the noise level, reads 2.29, 2.54, 6.97, 6.42, 2.79 of 50 steps."""
    scales = [cogvideox._cosine(6.0, k / 50) for k in range(51)]
    assert scales[:3] == pytest.approx([7.0, 6.86, 6.51], abs=0.005)
    assert scales == sorted(scales, reverse=True) and scales[-1] == 1


def test_cosine_guidance_is_what_each_step_is_given() -> None:
    scales = [1 + 6 * (1 - np.cos(np.pi * (k / 3) ** 5)) / 2 for k in (3, 2, 1)]

    def set_next(pipe: Any, step: int, _: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = float(scales[min(step + 1, 2)])
        return tensors

    expected = plain_latents(guidance_scale=scales[0], callback_on_step_end=set_next)
    torch.testing.assert_close(drawer().latents(request(dynamic_guidance="cosine")), expected, rtol=0, atol=1e-6)


def test_a_prompt_is_embedded_as_the_pipeline_does_whatever_its_company() -> None:
    other = request(prompt="something else, and much longer than the other")
    embedded = embed_prompts(path(), [other, request(), request()], "fp32")
    assert list(embedded) == [other.prompt, NEGATIVE, PROMPT]
    pipe = diffusers.CogVideoXPipeline(**_components("cogvideox-t2v"))
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=32)
    assert torch.equal(embedded[PROMPT], positive)
    assert torch.equal(embedded[NEGATIVE], negative)


# ---------------------------------------------------------------- from a video


def test_video_to_video_is_the_pipelines() -> None:
    frames = [Image.fromarray(frame) for frame in VIDEO]
    expected = plain_latents(kind="CogVideoXVideoToVideoPipeline", video=frames, strength=0.7)
    steps = []
    asked = request(video=VIDEO, strength=0.7)
    drawn = drawer().latents(asked, lambda: steps.append(1))
    assert torch.equal(drawn, expected)
    assert len(steps) == asked.passes == 2


def test_1_5_draws_from_a_video_too_which_diffusers_refuses() -> None:
    """Its latents are odd in number; the first frame, repeated, makes them even."""
    name, frames = "cogvideox-1.5-t2v", [Image.fromarray(frame) for frame in VIDEO]
    with pytest.raises(ValueError, match="must be divisible"):
        plain(name, kind="CogVideoXVideoToVideoPipeline", video=frames)
    expected = plain_latents(name, kind="CogVideoXVideoToVideoPipeline", video=[frames[0]] * 4 + frames, strength=0.8)
    drawn = drawer(name).latents(request(name, video=VIDEO))
    assert drawn.shape == (1, 4, 3, 4, 6)
    assert torch.equal(drawn, expected)


def test_a_video_file_is_read_at_the_requests_rate_and_cut_to_its_size(tmp_path: Path) -> None:
    """17 frames at 16 a second, larger on top and bottom: every second one, and the middle of it."""
    wide = np.zeros((18, 64, 48, 3), np.uint8)
    wide[::2, 16:48] = wide[1::2, 16:48] = VIDEO
    write_video(tmp_path / "a.mp4", wide, 16, lossless=True)
    from_file = drawer().latents(request(video=tmp_path / "a.mp4", fps=8))
    assert torch.equal(from_file, drawer().latents(request(video=VIDEO)))


def test_images_come_as_files_as_arrays_and_from_pillow(tmp_path: Path) -> None:
    """Of another aspect ratio they are cut, not squashed, as in training."""
    name, tall = "cogvideox-i2v", np.zeros((64, 48, 3), np.uint8)
    tall[16:48] = IMAGE
    Image.fromarray(tall).save(tmp_path / "a.png")
    draw = drawer(name).latents
    expected = draw(request(name))
    for image in (IMAGE, tall, Image.fromarray(tall), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(draw(request(name, image=image)), expected)
    assert not torch.equal(draw(request(name, image=tall, resize="squash")), expected)


# ---------------------------------------------------------------- learned positions


def without_learned_positions(name: str) -> nn.Module:
    net: Any = transformer(name)
    net.patch_embed.use_learned_positional_embeddings = False
    return net


@pytest.mark.parametrize("size", [(9, 48, 32), (17, 32, 48)], ids=["portrait", "longer"])
def test_learned_positions_are_left_out_where_they_do_not_fit(size: tuple[int, int, int]) -> None:
    """diffusers refuses portraits, and gives longer videos the sinusoids of another model without a word."""
    name, (frames, height, width) = "cogvideox-i2v", size
    options = {"num_frames": frames, "height": height, "width": width,
               "image": Image.fromarray(IMAGE).resize((width, height))}  # fmt: skip
    asked = request(name, frames=frames, height=height, width=width, image=options["image"])
    net: Any = transformer(name)
    drawn = drawer(name, net).latents(asked)
    assert torch.equal(drawn, plain_latents(name, transformer=without_learned_positions(name), **options))
    if frames == 17:
        assert not torch.equal(drawn, plain_latents(name, **options))
    else:
        with pytest.raises(ValueError, match="different resolution"):
            plain_latents(name, **options)
    assert net.patch_embed.use_learned_positional_embeddings  # back again, for the next video
    assert torch.equal(drawer(name, net).latents(request(name)), plain_latents(name))


@pytest.mark.parametrize("learned", [True, False])
def test_an_adapter_tells_whether_it_was_trained_with_them(tmp_path: Path, learned: bool) -> None:
    name = "cogvideox-i2v"
    trained = transformer(name, Lora(rank=2))
    write_diffusers(tmp_path, adapter_of(trained, {"learned_positions": str(learned).lower()}))
    trained.patch_embed.use_learned_positional_embeddings = learned  # type: ignore[union-attr]
    net = transformer(name)
    load_adapters(net, [AdapterFile(path=tmp_path)])
    assert torch.equal(drawer(name, net).latents(request(name)), drawer(name, trained).latents(request(name)))


# ---------------------------------------------------------------- from the model in training


def test_a_transformer_in_training_is_left_as_it_was() -> None:
    """Same bits before and after, dropout and all, and nothing drawn from torch's generator."""
    net: Any = transformer(lora=Lora(rank=4, dropout=0.5)).train()
    for block in net.transformer_blocks:
        block.forward = partial(recompute, block.forward, use_reentrant=False)
    before = hash_weights(net), torch.get_rng_state(), [p.requires_grad for p in net.parameters()]
    draw = drawer(net=net)
    first, again = draw.draw(request()), draw.draw(request())
    np.testing.assert_array_equal(first, again)
    assert draw.transformer is net
    assert net.training and all(module.training for module in net.modules())
    assert not net._forward_pre_hooks
    assert hash_weights(net) == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert [p.requires_grad for p in net.parameters()] == before[2]
    net(torch.randn(1, 3, 4, 4, 6), torch.randn(1, 32, 32), torch.tensor([5]),
        image_rotary_emb=(torch.ones(18, 16), torch.zeros(18, 16)))[0].sum().backward()  # fmt: skip
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_a_sample_in_training_is_that_of_the_finished_run(tmp_path: Path) -> None:
    """By the same code, from weights that were written and read."""
    lora = Lora(rank=4, alpha=8.0)
    trained: Any = transformer(lora=lora).train()
    for block in trained.transformer_blocks:
        block.forward = partial(recompute, block.forward, use_reentrant=False)
    in_training = drawer(net=trained, tile=True).draw(request())
    save_weights(tmp_path / "model.safetensors", adapter_state(trained))

    def build() -> nn.Module:
        fresh = load_part(path(), "transformer", torch.float32)
        add_lora(fresh, lora, seed=1)
        load_adapter_state(fresh, adapter_state(trained), source="the run")
        return fresh

    later = open_drawer(path(), [request()], weights="fp32", build=build).draw(request())
    np.testing.assert_array_equal(later, in_training)


def test_what_ends_a_drawing_leaves_everything_in_place() -> None:
    net: Any = transformer("cogvideox-i2v").train()
    draw = drawer("cogvideox-i2v", net)
    expected = draw.latents(request("cogvideox-i2v"))
    steps = []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt

    portrait = request("cogvideox-i2v", height=48, width=32)
    with pytest.raises(KeyboardInterrupt):
        draw.latents(portrait, stop)
    assert len(steps) == 2
    assert net.training and net.patch_embed.use_learned_positional_embeddings and not net._forward_pre_hooks
    assert torch.equal(draw.latents(request("cogvideox-i2v")), expected)


def test_parts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder is gone before there is a transformer; the autoencoder is away while the transformer works."""
    events: list[str] = []
    monkeypatch.setattr(Drawer, "_move_vae", lambda self, device: events.append("away" if device == "cpu" else "here"))
    monkeypatch.setattr(Drawer, "_start", _noting(Drawer._start, events, "start"))

    def build() -> nn.Module:
        assert not [True for thing in gc.get_objects() if type(thing) is transformers.T5EncoderModel]
        made = transformer("cogvideox-i2v")
        made.register_forward_hook(lambda *_: events.append("step"))
        return made

    gc.collect()
    _components.cache_clear()
    gc.collect()
    draw = open_drawer(path("cogvideox-i2v"), [request("cogvideox-i2v")], weights="fp32", build=build)
    encode = draw.vae.encode
    draw.vae.encode = lambda *args: (events.append("encode"), encode(*args))[1]
    decode = draw.vae.decode
    draw.vae.decode = lambda *args: (events.append("decode"), decode(*args))[1]
    draw.draw(request("cogvideox-i2v"))
    steps = ["away", "step"] * 3
    assert events == ["start", "here", "encode", *steps, "away", "here", "decode", "away"]


def _noting(function: Callable[..., Any], events: list[str], what: str) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        events.append(what)
        return function(*args)

    return noted


def test_numbers_that_are_none_are_not_drawn() -> None:
    net: Any = transformer()
    with torch.no_grad():
        net.proj_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"latents are not all finite numbers.* float32"):
        drawer(net=net).latents(request())


def test_bf16_is_drawn_in_bf16() -> None:
    draw = open_drawer(path(), [request()], weights="bf16", tile=False)
    assert draw.dtype == draw.vae.dtype == torch.bfloat16
    assert draw.latents(request()).dtype == torch.bfloat16
    assert draw.draw(request()).shape == (9, 32, 48, 3)


def test_tiles_are_nearly_the_same_picture() -> None:
    latents = drawer().latents(request())
    whole, tiled = (drawer(tile=tile).decode(latents).astype(int) for tile in (False, True))
    assert tiled.shape == whole.shape
    assert 0 < np.abs(tiled - whole).mean() < np.abs(whole[1:] - whole[:-1]).mean() / 3


# ---------------------------------------------------------------- adapters


def test_an_adapter_draws_what_was_trained_in_every_layout(tmp_path: Path) -> None:
    """Rank and alpha differ, which is where others go wrong; a run directory is read as well."""
    trained = transformer(lora=Lora(rank=4, alpha=8.0))
    expected = drawer(net=trained).latents(request())
    adapter = adapter_of(trained)
    files = [write_diffusers(tmp_path / "diffusers", adapter), write_peft(tmp_path / "peft", adapter)]
    files.append(write_kohya(tmp_path / "kohya.safetensors", adapter))
    write_diffusers(tmp_path / "run" / "final", adapter)
    for file in [*files, tmp_path / "run"]:
        net = transformer()
        load_adapters(net, [AdapterFile(path=file)])
        torch.testing.assert_close(drawer(net=net).latents(request()), expected, rtol=0, atol=1e-5)
    assert (expected - drawer().latents(request())).abs().max() > 0.01


def test_layers_of_several_ranks_and_alphas_and_doras_keep_their_strength(tmp_path: Path) -> None:
    """The commonest rank's alpha used to be taken for every layer's."""
    large, small = (adapter_of(transformer(lora=lora)) for lora in (Lora(rank=4, alpha=8.0), Lora(rank=2, alpha=1.0)))
    some = sorted(large.alphas)[::3]
    keep = lambda adapter, inside: {k: v for k, v in adapter.state.items() if (k.split(".lora_")[0] in some) == inside}
    mixed = replace(large, state=keep(large, False) | keep(small, True),
                    alphas=large.alphas | {module: small.alphas[module] for module in some})  # fmt: skip
    write_diffusers(tmp_path / "mixed", mixed)
    merged, drawn = transformer(), transformer()
    load_adapters(drawn, [AdapterFile(path=tmp_path / "mixed")])
    with torch.no_grad():
        for name, scale in mixed.scales.items():
            update = mixed.state[f"{name}.lora_B.weight"] @ mixed.state[f"{name}.lora_A.weight"]
            merged.get_submodule(name).weight += scale * update  # type: ignore[operator]
    expected = drawer(net=merged).latents(request())
    torch.testing.assert_close(drawer(net=drawn).latents(request()), expected, rtol=0, atol=1e-5)

    dora, drawn = transformer(lora=Lora(rank=4, alpha=8.0, dora=True)), transformer()
    write_diffusers(tmp_path / "dora", adapter_of(dora))
    load_adapters(drawn, [AdapterFile(path=tmp_path / "dora")])
    expected = drawer(net=dora).latents(request())
    torch.testing.assert_close(drawer(net=drawn).latents(request()), expected, rtol=0, atol=1e-5)


def test_several_adapters_add_up_by_weight_also_on_top_of_a_models_own(tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=2.0)
    trained = transformer(lora=lora)
    write_diffusers(tmp_path, adapter_of(trained))
    halves, own = transformer(), transformer(lora=lora)
    load_adapters(halves, [AdapterFile(path=tmp_path, weight=0.75), AdapterFile(path=tmp_path, weight=0.25)])
    load_adapters(own, [AdapterFile(path=tmp_path, weight=-1.0)])
    expected = drawer(net=trained).latents(request())
    torch.testing.assert_close(drawer(net=halves).latents(request()), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawer(net=own).latents(request()), drawer().latents(request()), rtol=0, atol=1e-5)


def test_an_adapter_of_another_model_or_of_unknown_strength_is_refused(tmp_path: Path) -> None:
    """diffusers loads the one as nothing and the other at any strength, with a word in the log at most."""
    state = {f"transformer.{key}": tensor for key, tensor in adapter_state(transformer(lora=Lora(rank=4))).items()}
    save_weights(tmp_path / "silent.safetensors", state)
    save_weights(tmp_path / "other.safetensors", {key.replace("attn1", "attn2"): v for key, v in state.items()})
    with pytest.raises(ValueError, match="does not say with which alpha"):
        load_adapters(transformer(), [AdapterFile(path=tmp_path / "silent.safetensors")])
    with pytest.raises(ValueError, match="not an adapter of this"):
        load_adapters(transformer(), [AdapterFile(path=tmp_path / "other.safetensors", alpha=4)])
    net = transformer()
    load_adapters(net, [AdapterFile(path=tmp_path / "silent.safetensors", alpha=4.0)])
    expected = drawer(net=transformer(lora=Lora(rank=4))).latents(request())
    torch.testing.assert_close(drawer(net=net).latents(request()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("runs/cat:0.5", ("runs/cat", 0.5, None)),
        ("runs/cat:-1:64", ("runs/cat", -1.0, 64.0)),
        ("runs/cat:.25:", ("runs/cat:.25:", 1.0, None)),
        ("cat:dog", ("cat:dog", 1.0, None)),
        ("1:2", ("1", 2.0, None)),
    ],
)
def test_adapters_on_the_command_line(text: str, expected: tuple[str, float, float | None]) -> None:
    file = AdapterFile.parse(text)
    assert (str(file.path), file.weight, file.alpha) == expected


def test_a_path_with_a_colon_in_it_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "step:5").touch()
    assert AdapterFile.parse(str(tmp_path / "step:5")) == AdapterFile(path=tmp_path / "step:5")


# ---------------------------------------------------------------- offloading


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_offloading_wants_a_gpu(offload: Any) -> None:
    with pytest.raises(ValueError, match=f"--offload {offload}.* no GPU"):
        open_drawer("no/such/checkpoint", [], offload=offload)


@pytest.mark.parametrize("name", ["cogvideox-t2v", "cogvideox-i2v"])
def test_diffusers_hooks_reach_every_pipeline_of_a_drawer(name: str) -> None:
    """What "model" offloading does on a GPU, with the CPU in its place: hooks on shared parts, for all pipelines."""
    expected = drawer(name).draw(request(name))
    draw = drawer(name, transformer(name))
    draw.offload = "model"
    draw._pipe.enable_model_cpu_offload(device="cpu")
    moved: list[str] = []
    draw.vae._hf_hook.pre_forward = _noting(draw.vae._hf_hook.pre_forward, moved, "vae")
    for _ in range(2):
        np.testing.assert_array_equal(draw.draw(request(name)), expected)
    assert "vae" in moved


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="for machines with a GPU")
def test_offloading_draws_the_same(offload: Any) -> None:
    for name in ("cogvideox-t2v", "cogvideox-i2v"):
        whole, parts = (open_drawer(path(name), [request(name)], weights="fp32", offload=o) for o in ("none", offload))
        expected = whole.draw(request(name))
        for _ in range(2):
            np.testing.assert_array_equal(parts.draw(request(name)), expected)
