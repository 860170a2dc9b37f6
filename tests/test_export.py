"""Exported adapters, opened by the libraries they are for: a pipeline of diffusers, PEFT, and kohya's rule by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_cases import DIT, IO, LORA, NAMES, base_of, error, maker, output, pipeline, shake, trained, write
from safetensors.torch import load_file
from torch import Tensor, nn

import mutoscope.export as export
from mutoscope.adapters import Adapter, read_adapter
from mutoscope.recipe import Lora
from mutoscope.training.lora import adapter_state, add_lora

# ---- adapters


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_in_a_diffusers_pipeline(name: str, tmp_path: Path) -> None:
    """rank ≠ alpha: upstream's come out at twice their strength."""
    model, state = trained(maker(name))
    done = write("diffusers", tmp_path / "lora", maker(name), LORA, state)
    assert done.path == tmp_path / "lora" and done.max_difference < 1e-5 * done.largest
    assert done.strength == pytest.approx(1, abs=1e-5)
    pipe = pipeline(name)
    base = base_of(name)
    if (
        pipe.transformer.config.use_learned_positional_embeddings
        != model.transformer.config.use_learned_positional_embeddings
    ):
        pytest.fail("the probe's grid made the model drop its learned positions")
    pipe.load_lora_weights(tmp_path / "lora")
    assert error(pipe.transformer, model.transformer, base) < 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.transformer), output(base))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's, of every second adapter
def test_several_adapters_with_weights_in_a_pipeline(tmp_path: Path) -> None:
    """Half of one and a quarter of another that is the same at twice the strength: the one itself."""
    model, state = trained(maker("cogvideox-t2v"))
    write("diffusers", tmp_path / "one", maker("cogvideox-t2v"), LORA, state)
    write("diffusers", tmp_path / "twice", maker("cogvideox-t2v"), replace(LORA, alpha=8.0), state)
    pipe, base = pipeline("cogvideox-t2v"), base_of("cogvideox-t2v")
    pipe.load_lora_weights(tmp_path / "one", adapter_name="one")
    pipe.load_lora_weights(tmp_path / "twice", adapter_name="twice")
    pipe.set_adapters(["one", "twice"], [0.5, 0.25])
    assert error(pipe.transformer, model.transformer, base) < 1e-5
    pipe.set_adapters(["one", "twice"], [0.0, 1.0])
    assert error(pipe.transformer, model.transformer, base) > 0.5
    pipe.set_adapters(["one"], [1.0])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert error(pipe.transformer, model.transformer, base) < 1e-5


def test_a_pipeline_draws_with_it(tmp_path: Path) -> None:
    _, state = trained(maker("cogvideox-t2v"))
    write("diffusers", tmp_path / "lora", maker("cogvideox-t2v"), LORA, state)
    pipe = pipeline("cogvideox-t2v")
    pipe.set_progress_bar_config(disable=True)
    draw = lambda: pipe(
        "a cat", num_frames=9, height=32, width=48, num_inference_steps=2, output_type="latent", max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    before = draw()
    pipe.load_lora_weights(tmp_path / "lora")
    assert draw().isfinite().all() and not torch.equal(draw(), before)
    pipe.unload_lora_weights()
    assert torch.equal(draw(), before)


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-1.5-i2v"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_lora_in_peft(name: str, dora: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = replace(LORA, dora=dora, targets="attention+mlp")
    model, state = trained(maker(name), lora)
    done = write("peft", tmp_path / "lora", maker(name), lora, state)
    assert done.strength == pytest.approx(1, abs=1e-4)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fresh, base = base_of(name), base_of(name)
    adapted = PeftModel.from_pretrained(fresh, str(tmp_path / "lora"))
    assert error(adapted, model.transformer, base) < 1e-5
    assert torch.equal(output(adapted.unload()), output(base))


def merge_by_kohyas_rule(transformer: nn.Module, file: Path, strength: float = 1.0) -> None:
    """As ComfyUI's CogVideoX nodes do it, on their own terms: the names taken apart at underscores, as far as there is
    an attribute of that name."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        layer, part = key.split(".", 1)
        groups.setdefault(layer, {})[part] = tensor
    for layer, parts in groups.items():
        assert layer.startswith("lora_unet__")
        module, waiting = transformer, ""
        for word in layer.removeprefix("lora_unet__").split("_"):
            waiting = f"{waiting}_{word}" if waiting else word
            if waiting in module._modules:
                module, waiting = module._modules[waiting], ""
        assert not waiting and set(parts) == {"lora_up.weight", "lora_down.weight", "alpha"}
        scale = parts["alpha"].item() / parts["lora_down.weight"].shape[0]
        module.weight.data += strength * scale * parts["lora_up.weight"].float() @ parts["lora_down.weight"].float()


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-1.5-t2v"])
def test_a_lora_in_comfyui(name: str, tmp_path: Path) -> None:
    lora = replace(LORA, targets="attention+mlp")
    model, state = trained(maker(name), lora)
    done = write("comfyui", tmp_path / "lora", maker(name), lora, state)
    assert done.strength == pytest.approx(1, abs=1e-4)
    fresh, base = base_of(name), base_of(name)
    merge_by_kohyas_rule(fresh, tmp_path / "lora" / "disney.safetensors")
    assert error(fresh, model.transformer, base) < 1e-5


def test_a_dora_in_a_diffusers_pipeline_but_not_in_comfyui(tmp_path: Path) -> None:
    lora = replace(LORA, dora=True)
    model, state = trained(maker("cogvideox-t2v"), lora)
    write("diffusers", tmp_path / "lora", maker("cogvideox-t2v"), lora, state)
    pipe, base = pipeline("cogvideox-t2v"), base_of("cogvideox-t2v")
    pipe.load_lora_weights(tmp_path / "lora")
    assert error(pipe.transformer, model.transformer, base) < 1e-4
    with pytest.raises(ValueError, match="a DoRA cannot be written for ComfyUI"):
        write("comfyui", tmp_path / "comfy", maker("cogvideox-t2v"), lora, state)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("to", ["diffusers", "peft", "comfyui"])
@pytest.mark.parametrize(
    ("weights", "dtype"), [("fp32", torch.bfloat16), ("bf16", torch.float32), ("bf16", torch.float16)]
)
def test_half_precision_keeps_the_strength(to: str, weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build = maker("cogvideox-t2v", weights)
    _, state = trained(build)
    done = write(to, tmp_path / "lora", build, LORA, state, dtype=dtype)
    assert done.strength == pytest.approx(1, abs=0.1) and done.max_difference < 0.05 * done.largest
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    assert {v.dtype for k, v in load_file(file).items() if "alpha" not in k} == {dtype}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    build = maker("cogvideox-t2v")
    model, state = trained(build)
    for to in ("diffusers", "peft", "comfyui"):
        write(to, tmp_path / to, build, LORA, state)
        read = read_adapter(tmp_path / to, build().transformer)
        assert set(read.scales.values()) == {1.0} and read.about["base_model"] == "tiny"
        again = build()
        add_lora(again, Lora(rank=8, alpha=32.0, init_from=str(tmp_path / to)), seed=1)
        assert error(again.transformer, model.transformer, build().transformer) < 1e-5


def test_a_model_of_ours_goes_to_peft_alone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = DIT.build(IO)
        model.load_state_dict(shake(model.state_dict()))
        return model

    _, state = trained(build)
    done = write("peft", tmp_path / "peft", build, LORA, state)
    assert done.strength == pytest.approx(1, abs=1e-4) and done.max_difference < 1e-4 * done.largest
    for to in ("diffusers", "comfyui"):
        with pytest.raises(ValueError, match=f"--to {to}: this is a DiTModel"):
            write(to, tmp_path / to, build, LORA, state)


# ---- what goes wrong


@pytest.mark.parametrize("to", ["diffusers", "peft", "comfyui"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_wrong_strength_is_found_and_nothing_is_left(
    to: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's defect put in: the alpha is not worked into B."""
    build = maker("cogvideox-t2v", weights)
    _, state = trained(build)
    forgetful = lambda self, scale=1.0, dtype=torch.float32: replace(
        self, alphas={m: float(r) for m, r in self.ranks.items()}
    )
    monkeypatch.setattr(Adapter, "scaled", forgetful)
    with pytest.raises(
        ValueError, match=r"strength (1\.[5-9]|2\.)\d+\. This is not what was trained, so nothing was written"
    ):
        write(to, tmp_path / "lora", build, LORA, state)
    assert not list(tmp_path.iterdir())


def test_an_empty_load_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers says no more than a warning in the log where no key has the name it looks for."""
    build = maker("cogvideox-t2v")
    _, state = trained(build)
    monkeypatch.setattr(export, "_load_as_diffusers", lambda network, folder: None)
    with pytest.raises(ValueError, match=r"strength 0\.0000\. This is not what was trained"):
        write("diffusers", tmp_path / "lora", build, LORA, state)
    assert not list(tmp_path.iterdir())


def test_an_export_takes_no_others_place(tmp_path: Path) -> None:
    build = maker("cogvideox-t2v")
    _, state = trained(build)
    (tmp_path / "lora").mkdir()
    write("diffusers", tmp_path / "lora", build, LORA, state)  # an empty folder is nobody's
    for out in (tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors"):
        with pytest.raises(ValueError, match="there is something already"):
            write("peft", out, build, LORA, state)


def test_an_untrained_lora_has_no_strength_to_tell(tmp_path: Path) -> None:
    build = maker("cogvideox-t2v")
    model = build()
    add_lora(model, LORA, seed=0)
    done = write("diffusers", tmp_path / "lora", build, LORA, adapter_state(model))
    assert done.strength is None and done.max_difference <= 1e-6 * done.largest
    assert str(done).startswith(f"{tmp_path / 'lora'}: loaded back; outputs differ by 0 at most, of ")
