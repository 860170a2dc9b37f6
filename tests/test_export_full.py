"""Full weights as complete checkpoints, and exports of whole runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, DiffusionPipeline
from export_cases import DIT, IO, LORA, NAMES, base_of, config, error, maker, output, pipeline, shake, trained
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mutoscope.adapters import read_adapter, write_diffusers
from mutoscope.build import build_trained, model_io
from mutoscope.checkpoints import open_checkpoint
from mutoscope.export import Exported, export_full, export_run, origin_of, probe_of, save_trained
from mutoscope.models.cogvideox import CogVideoX, CogVideoXModel
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Lora, Recipe
from mutoscope.recipes.cogvideox import i2v_lora_tiny, t2v_full_tiny, t2v_lora_tiny
from mutoscope.run import Run
from mutoscope.text.encoders import HashedWords
from mutoscope.toml import dump_toml
from mutoscope.training.lora import adapter_of, adapter_state, add_lora, network_of
from mutoscope.weights import save_weights

ROUNDING = 2e-6
"""Some CPUs multiply matrices in an order that hangs on where they lie in memory: the same weights, other last bits."""

# ---- full weights


def full(
    out: Path, name: str, build: Callable[[], nn.Module], lora: Lora | None, state: dict[str, Tensor], **more: Any
) -> Exported:
    checkpoint = open_checkpoint(f"tiny://{name}")
    return export_full(out, checkpoint=checkpoint, build=build, lora=lora, state=state, probe=probe_of(IO), **more)


def fine_tuned(name: str) -> CogVideoXModel:
    model = maker(name)()
    model.load_state_dict(shake(model.state_dict()))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_full_fine_tune_is_a_checkpoint(name: str, tmp_path: Path) -> None:
    done = full(tmp_path / "full", name, lambda: fine_tuned(name), None, {})
    assert done.max_difference <= ROUNDING * done.largest and done.strength is None
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert isinstance(pipe, CogVideoXImageToVideoPipeline if name.endswith("i2v") else CogVideoXPipeline)
    weights = pipe.transformer.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in fine_tuned(name).transformer.state_dict().items())
    built = CogVideoX(path=str(tmp_path / "full"), task=config(name).task, weights="fp32").build(IO)  # and by our own
    torch.testing.assert_close(probe_of(IO)(built), probe_of(IO)(fine_tuned(name)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_merged_lora_is_a_checkpoint(dora: bool, tmp_path: Path) -> None:
    build, lora = maker("cogvideox-t2v"), replace(LORA, dora=dora)
    model, state = trained(build, lora)
    done = full(tmp_path / "full", "cogvideox-t2v", build, lora, state)
    assert done.strength == pytest.approx(1, abs=1e-4) and done.max_difference < 1e-5 * done.largest
    pipe = CogVideoXPipeline.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert error(pipe.transformer, model.transformer, build().transformer) < 1e-5
    done = full(tmp_path / "half", "cogvideox-t2v", build, lora, state, dtype=torch.bfloat16)
    assert done.strength == pytest.approx(1, abs=0.1)
    files = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in files.values()} == {torch.bfloat16}


def test_shards(tmp_path: Path) -> None:
    build = lambda: fine_tuned("cogvideox-t2v")
    done = full(tmp_path / "full", "cogvideox-t2v", build, None, {}, shard_bytes=100_000)
    assert done.max_difference <= ROUNDING * done.largest
    folder = tmp_path / "full" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert [p.name for p in shards] == [f"diffusion_pytorch_model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    contents = {key: (p.name, tensor) for p in shards for key, tensor in load_file(p).items()}
    assert index["weight_map"] == {key: name for key, (name, _) in contents.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in contents.values())
    assert all(sum(t.nbytes for t in load_file(p).values()) <= 100_000 for p in shards)


def test_the_other_parts_are_linked_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("tiny://cogvideox-t2v")
    build = lambda: fine_tuned("cogvideox-t2v")
    full(tmp_path / "linked", "cogvideox-t2v", build, None, {})

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    full(tmp_path / "copied", "cogvideox-t2v", build, None, {})
    weights = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "linked" / weights).samefile(checkpoint / weights)
    for out in ("linked", "copied"):
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            for source in (checkpoint / part).iterdir():
                assert (tmp_path / out / part / source.name).read_bytes() == source.read_bytes()
    configuration = tmp_path / "linked" / "vae" / "config.json"
    assert not configuration.samefile(checkpoint / "vae" / "config.json")  # people edit these


def test_a_base_that_is_not_whole_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    build = lambda: fine_tuned("cogvideox-t2v")
    more = {"build": build, "lora": None, "state": {}, "probe": probe_of(IO)}
    with pytest.raises(FileNotFoundError, match=r"model_index.json: missing"):
        export_full(tmp_path / "full", checkpoint=tmp_path / "base", **more)  # type: ignore[arg-type]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "Y"]}))
    with pytest.raises(FileNotFoundError, match=r"vae: missing, and model_index.json names it"):
        export_full(tmp_path / "full", checkpoint=tmp_path / "base", **more)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# ---- runs


def make_run(folder: Path, recipe: Recipe) -> Run:
    """A run directory but for its weights."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_toml(recipe.model.complete(recipe)))
    return Run(folder)


def test_a_lora_run(tmp_path: Path) -> None:
    recipe = replace(i2v_lora_tiny(), lora=LORA, steps=7)
    run = make_run(tmp_path / "disney", replace(recipe, data=replace(recipe.data, id_token="DISNEY")))
    with pytest.raises(FileNotFoundError, match="the run is not finished; train it"):
        export_run(run, "diffusers")
    model, _ = trained(maker("cogvideox-i2v"))
    write_diffusers(run.final, adapter_of(model))
    for to in ("diffusers", "peft", "comfyui", "full"):
        done = export_run(run, to)  # type: ignore[arg-type]
        assert done.path == run.folder / "exports" / to and done.strength == pytest.approx(1, abs=1e-4)
    assert (run.folder / "exports" / "comfyui" / "disney.safetensors").is_file()
    assert export_run(run, "diffusers", tmp_path / "there", "bf16").path == tmp_path / "there"
    network = maker("cogvideox-i2v")().transformer
    about = read_adapter(tmp_path / "there", network).about
    assert about == origin_of(run.recipe) | {"name": "disney"}
    assert about | {"version": ""} == {
        "name": "disney", "base_model": "tiny://cogvideox-i2v", "variant": "CogVideoX 1.0 i2v", "step": "7",
        "id_token": "DISNEY", "learned_positions": "true", "version": "",
    }  # fmt: skip
    assert read_adapter(run.folder, network).scales["transformer_blocks.0.attn1.to_q"] == 1
    assert LORA.scale == 0.5


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=8, alpha=4.0),
        Lora(rank=4, alpha=12.0, dora=True),
        Lora(rank=4, alpha=3.0, targets="attention+mlp"),
        Lora(rank=4, alpha=3.0, targets=r"0\.attn1\.to_(q|out)|time_embedding|proj_out"),
    ],
    ids=["alpha", "dora", "mlp", "regex"],
)
def test_a_run_keeps_its_adapter_as_diffusers_reads_it(lora: Lora, tmp_path: Path) -> None:
    """One file: what `load_lora_weights` makes of final/ is what our own loading makes of it, at the same strength."""
    run = make_run(tmp_path / "run", replace(t2v_lora_tiny(), lora=lora))
    model, state = trained(maker("cogvideox-t2v"), lora)
    save_trained(model, run.recipe, run)
    assert [p.name for p in run.final.iterdir()] == ["pytorch_lora_weights.safetensors"]
    with safe_open(run.weights, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert fields["transformer.r"] == fields["transformer.lora_alpha"] == lora.rank
    pipe = pipeline("cogvideox-t2v")
    pipe.load_lora_weights(run.final)
    assert error(pipe.transformer, network_of(model), base_of("cogvideox-t2v")) < 1e-5
    ours = adapter_state(build_trained(run))
    assert ours.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=0)


def test_positions_that_were_left_out_are_told(tmp_path: Path) -> None:
    """Of an I2V model that is trained at another size than its own: whoever samples has to leave them out as well."""
    recipe = i2v_lora_tiny()
    recipe = replace(recipe, lora=LORA, data=replace(recipe.data, height=48, width=48))
    run = make_run(tmp_path / "run", recipe)
    build = lambda: config("cogvideox-i2v").build(replace(IO, grid=(3, 6, 6)))
    write_diffusers(run.final, adapter_of(trained(build)[0]))
    export_run(run, "diffusers")
    assert read_adapter(run.folder / "exports" / "diffusers", build().transformer).about["learned_positions"] == "false"
    export_run(run, "full")
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(run.folder / "exports" / "full", dtype=torch.float32)
    assert not pipe.transformer.config.use_learned_positional_embeddings
    with pytest.raises(ValueError, match="different resolution"):
        output(base_of("cogvideox-i2v"), height=6)
    assert output(pipe.transformer, height=6).isfinite().all()


def test_a_run_of_all_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", t2v_full_tiny())
    save_weights(run.weights, fine_tuned("cogvideox-t2v").state_dict())
    with pytest.raises(ValueError, match="--to peft is for LoRAs, and this run trained all weights; use --to full"):
        export_run(run, "peft")
    done = export_run(run, "full")
    assert done.max_difference <= ROUNDING * done.largest
    pipe = CogVideoXPipeline.from_pretrained(run.folder / "exports" / "full", dtype=torch.float32)
    wanted = fine_tuned("cogvideox-t2v").transformer.state_dict()
    assert all(torch.equal(wanted[k], v) for k, v in pipe.transformer.state_dict().items())


def test_a_lora_run_over_a_run_of_ours(tmp_path: Path) -> None:
    data = Data(root="flying-mnist://tiny", frames=3, height=4, width=6)
    recipe = Recipe(data=data, text=HashedWords(width=32), model=DIT, objective=Diffusion(), steps=1, batch_size=1)
    io = model_io(recipe)
    base = make_run(tmp_path / "base", recipe)
    torch.manual_seed(0)
    model = DIT.build(io)
    model.load_state_dict(shake(model.state_dict()))
    save_weights(base.weights, model.state_dict())
    run = make_run(tmp_path / "run", replace(recipe, init_from=str(base.folder), lora=LORA))
    add_lora(model, LORA, seed=0)
    for key, tensor in shake(adapter_state(model)).items():
        adapter_state(model)[key].copy_(tensor)
    write_diffusers(run.final, adapter_of(model))
    done = export_run(run, "peft")
    assert done.strength == pytest.approx(1, abs=1e-4)
    assert done.largest == pytest.approx(float(probe_of(io)(model).detach().abs().max()))
    with pytest.raises(ValueError, match="a DiT is no part of a diffusers checkpoint"):
        export_run(run, "full")
