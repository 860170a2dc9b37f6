"""Trained weights in the ecosystem's layouts. Each export is loaded back by its own reader, into a model built afresh,
and makes the same numbers as the trained model, or there is no export.

    diffusers   a folder for load_lora_weights           peft   a folder for PeftModel.from_pretrained
    comfyui     a file for ComfyUI/models/CogVideo/loras  full   a folder for CogVideoXPipeline.from_pretrained
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

import mutoscope
from mutoscope.adapters import linear_layers, read_adapter, write_diffusers, write_kohya, write_peft
from mutoscope.build import build_model, build_trainee, model_io
from mutoscope.checkpoints import open_checkpoint
from mutoscope.files import new_folder
from mutoscope.models.cogvideox import CogVideoX, CogVideoXModel
from mutoscope.randomness import Draw
from mutoscope.recipe import Lora, Recipe
from mutoscope.run import Run
from mutoscope.sharded import whole
from mutoscope.training.lora import adapter_of, add_lora, load_adapter_state, merged_weights, network_of
from mutoscope.types import DTYPES, Cond, ModelIO
from mutoscope.weights import load_file, save_weights

AdapterLayout = Literal["diffusers", "peft", "comfyui"]
Layout = Literal["diffusers", "peft", "comfyui", "full"]
Probe = Callable[[nn.Module], Tensor]
"""What a model makes of some fixed small input."""
SHARD_BYTES = 5_000_000_000
"""The most that goes into one file of full weights."""
_SHARD = "diffusion_pytorch_model"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export, and how near it is to what was trained."""

    path: Path
    """The folder."""
    max_difference: float
    """Largest |output loaded back − output trained|."""
    largest: float
    """Largest |output trained|."""
    strength: float | None
    """Of an adapter: how much of its effect on the output is there, 1 being all of it; None where it has none that
    the precision can tell from rounding."""

    def __str__(self) -> str:
        strength = "" if self.strength is None else f", strength {self.strength:.4f}"
        return (f"{self.path}: loaded back; outputs differ by {self.max_difference:.3g} at most, "
                f"of {self.largest:.3g}{strength}")  # fmt: skip


def export_run(
    run: Run, to: Layout, out: Path | None = None, dtype: Literal["fp32", "bf16", "fp16"] | None = None
) -> Exported:
    """Write what a finished run trained to the folder `out`, or RUN/exports/LAYOUT.

    dtype: of what is written; None keeps adapters in fp32 and full weights as the model has them.

    Raises FileNotFoundError where the run is not finished or its base is gone; ValueError for a layout that is not for
    such a run, and as `export_adapter`.
    """
    if not run.weights.exists():
        raise FileNotFoundError(f"{run.weights}: the run is not finished; train it to its end: "
                                f"mutoscope train {run.folder}")  # fmt: skip
    recipe, out = run.recipe, out or run.folder / "exports" / to
    probe = probe_of(model_io(recipe))
    if to != "full":
        if recipe.lora is None:
            raise ValueError(f"--to {to} is for LoRAs, and this run trained all weights; use --to full")
        return export_adapter(
            to,
            out,
            build=lambda: build_trainee(replace(recipe, lora=None)),
            lora=recipe.lora,
            state=_trained_state(run, recipe, recipe.lora),
            probe=probe,
            about={"name": run.folder.resolve().name} | origin_of(recipe),
            dtype=DTYPES[dtype or "fp32"],
        )
    if not isinstance(recipe.model, CogVideoX):
        raise ValueError(f"--to full: a {type(recipe.model).__name__} is no part of a diffusers checkpoint; "
                         f"its weights are {run.weights}")  # fmt: skip

    def build() -> nn.Module:
        if recipe.lora is not None:
            return build_trainee(replace(recipe, lora=None))
        model = build_model(recipe)
        load_file(model, run.weights)
        return model

    return export_full(
        out,
        checkpoint=open_checkpoint(recipe.model.path),
        build=build,
        lora=recipe.lora,
        state=_trained_state(run, recipe, recipe.lora) if recipe.lora is not None else {},
        probe=probe,
        dtype=DTYPES[dtype] if dtype is not None else None,
    )


def _trained_state(run: Run, recipe: Recipe, lora: Lora) -> dict[str, Tensor]:
    """What `adapter_state` gave at the end of training."""
    with torch.device("meta"):
        network = network_of(build_model(recipe))
    return read_adapter(run.weights, network).scaled(lora.scale).state


def save_trained(model: nn.Module, recipe: Recipe, run: Run, write: bool = True) -> None:
    """Write what training made to the run's final/: all weights; or, where the recipe has adapters, those alone, as
    `load_lora_weights` of a diffusers pipeline reads them. Where processes hold the model in parts they call this
    together, as `save_weights`, and one of them with `write`."""
    if recipe.lora is not None:
        adapter = adapter_of(model, origin_of(recipe))
        adapter = replace(adapter, state={key: whole(tensor) for key, tensor in adapter.state.items()})
        if write:
            write_diffusers(run.final, adapter)
    else:
        save_weights(run.weights, model.state_dict(), {"recipe": type(recipe.model).__name__}, write)


def origin_of(recipe: Recipe) -> dict[str, str]:
    """Where an adapter of this recipe is from, and what whoever samples from it has to know. Loads no weights."""
    about = {
        "base_model": recipe.init_from or "",
        "id_token": ", ".join(dict.fromkeys(clips.id_token for clips in recipe.data.sets if clips.id_token)),
        "step": str(recipe.steps),
        "version": mutoscope.__version__,
    }
    if isinstance(recipe.model, CogVideoX):
        with torch.device("meta"):
            model = build_model(recipe)
        assert isinstance(model, CogVideoXModel)
        about |= {
            "base_model": recipe.model.path,
            "variant": f"CogVideoX {'1.0' if model.temporal_patch == 1 else '1.5'} {recipe.model.task}",
            "learned_positions": str(model.learned_positions).lower(),
        }
    return about


def probe_of(io: ModelIO) -> Probe:
    """What a model that fits `io` makes of noise: of a small grid where any will do, as the time it takes goes with
    its square."""

    def probe(model: nn.Module) -> Tensor:
        draw, pretrained = Draw(0, "export", [0]), isinstance(model, CogVideoXModel)
        grid = (2, 4, 4) if pretrained else io.grid
        known = length = None
        if isinstance(model, CogVideoXModel):
            length = model.transformer.config.max_text_seq_length
            known = draw.normal(io.channels, *grid) if model.is_image_to_video else None
        text = draw.normal(length or 8, io.text_dim) if io.text_dim else None
        cond = Cond(
            text=text,
            text_mask=None if text is None else torch.ones(text.shape[:2], dtype=torch.bool),
            label=torch.zeros(1, dtype=torch.int64) if io.num_labels else None,
            known=known,
        )
        out: Tensor = model(draw.normal(io.channels, *grid), torch.tensor([500.0]), cond)
        return out

    return probe


def export_adapter(
    to: AdapterLayout,
    out: Path,
    *,
    build: Callable[[], nn.Module],
    lora: Lora,
    state: Mapping[str, Tensor],
    probe: Probe,
    about: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Write a trained LoRA to the folder `out`.

    build: makes the base model; called twice, one after the other, so that one model is in memory at a time.
    state: what `adapter_state` gave after training.
    about: where the adapter is from, for the files' headers; "base_model" and "name" are used beside that.
    dtype: of the adapter's matrices.

    Raises ValueError where `out` is taken, where the layout is not for this model or this adapter, and where what is
    read back is not what was trained; `out` is then as it was.
    """
    _check_vacant(out)
    model = build().eval()
    base = _look(probe, model)
    add_lora(model, replace(lora, init_from=None, init_alpha=None), seed=0)
    load_adapter_state(model, state, source="the trained adapter")
    trained, adapter = _look(probe, model), adapter_of(model, about)
    exact = dtype == torch.float32 and _is_fp32(model)
    if to != "peft" and not hasattr(network_of(model), "load_lora_adapter"):
        raise ValueError(f"--to {to}: this is a {type(model).__name__}, and {to} knows no such model; use --to peft")
    del model
    with new_folder(out) as folder:
        if to == "diffusers":
            load, written = _load_as_diffusers, write_diffusers(folder, adapter, dtype)
        elif to == "peft":
            load, written = _load_as_peft, write_peft(folder, adapter, dtype)
        else:
            load, written = _load_as_kohya, write_kohya(folder / f"{about['name']}.safetensors", adapter, dtype)
        fresh = build().eval()
        load(network_of(fresh), written)
        return _compared(out, base, trained, _look(probe, fresh), exact)


def export_full(
    out: Path,
    *,
    checkpoint: Path,
    build: Callable[[], nn.Module],
    lora: Lora | None,
    state: Mapping[str, Tensor],
    probe: Probe,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write a complete checkpoint in diffusers' format to the folder `out`: the trained transformer, and everything
    else as `checkpoint`, the folder that training started from, has it (weights as hard links where the disk allows).

    build: makes the model, with a diffusers transformer: the base of a LoRA, or the fully trained one; called once.
    lora, state: of a LoRA, which is merged; None and empty of a full fine-tune.
    dtype: of the weights; None keeps the model's.

    Raises as `export_adapter`.
    """
    _check_vacant(out)
    model: Any = build().eval()
    network: Any = network_of(model)
    base = None
    if lora is not None:
        base = _look(probe, model)
        add_lora(model, replace(lora, init_from=None, init_alpha=None), seed=0)
        load_adapter_state(model, state, source="the trained adapter")
    trained = _look(probe, model)
    exact = dtype in (None, torch.float32) and _is_fp32(model)
    with new_folder(out) as folder:
        _copy_parts(checkpoint, folder, but="transformer")
        _write_transformer(model, folder / "transformer", dtype, shard_bytes)
        reader, dtype = type(network), dtype or next(network.parameters()).dtype
        model.transformer = network = None  # let go of the trained one before there is another
        model.transformer = reader.from_pretrained(folder / "transformer", dtype=dtype).eval()
        return _compared(out, base, trained, _look(probe, model), exact)


# ---- readers


def _load_as_diffusers(network: nn.Module, path: Path) -> None:
    """What `load_lora_weights` of a pipeline comes down to."""
    network.load_lora_adapter(  # type: ignore[operator]
        str(path.parent), prefix="transformer", weight_name=path.name, adapter_name="exported"
    )


def _load_as_peft(network: nn.Module, path: Path) -> None:
    from peft import PeftModel

    PeftModel.from_pretrained(network, str(path))  # it takes any module


@torch.no_grad()
def _load_as_kohya(network: nn.Module, path: Path) -> None:
    """kohya's rule, as ComfyUI's CogVideoX nodes and VideoX-Fun follow it: W += up @ down · alpha / rank."""
    names = {name.replace(".", "_"): layer for name, layer in linear_layers(network).items()}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (it has no __iter__)
            module, _, kind = key.partition(".")
            if kind == "lora_up.weight":
                up, down = file.get_tensor(key).float(), file.get_tensor(f"{module}.lora_down.weight").float()
                scale = file.get_tensor(f"{module}.alpha").item() / up.shape[1]
                weight = names[module.removeprefix("lora_unet__")].weight
                weight.copy_(weight.float() + scale * up @ down)


# ---- comparison


def _look(probe: Probe, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return probe(model).double()


def _is_fp32(model: nn.Module) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters())


def _compared(out: Path, base: Tensor | None, trained: Tensor, exported: Tensor, exact: bool) -> Exported:
    """Raise ValueError where the two outputs are further apart than rounding takes them.

    In bf16, roundings through some forty blocks come to percents of the output, more than a weak adapter does. But
    they point anywhere, and the strength is measured along what the adapter does: one of a wrong alpha still shows.
    """
    done = Exported(
        path=out,
        max_difference=float((exported - trained).abs().max()),
        largest=float(trained.abs().max()),
        strength=_strength(base, trained, exported, rounding=1e-6 if exact else 1e-2),
    )
    near = done.max_difference <= (1e-4 if exact else 0.1) * done.largest
    full = done.strength is None or abs(done.strength - 1) <= (0.01 if exact else 0.2)
    if not (near and full):
        raise ValueError(f"{done}. This is not what was trained, so nothing was written; please report it")
    return done


def _strength(base: Tensor | None, trained: Tensor, exported: Tensor, rounding: float) -> float | None:
    if base is None:
        return None
    effect = trained - base
    if effect.norm() <= rounding * trained.norm():
        return None
    return float(((exported - base) * effect).sum() / effect.square().sum())


# ---- folders


def _check_vacant(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: there is something already; move it away, or choose another --out")


def _copy_parts(checkpoint: Path, folder: Path, but: str) -> None:
    """All parts that model_index.json names but one. Weights are hard links where they can be, being never changed in
    place; configurations are copies, as people edit them."""
    index = checkpoint / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index}: missing; it names the parts of a complete checkpoint")
    shutil.copyfile(index, folder / index.name)
    parts = [name for name, kind in json.loads(index.read_text()).items() if isinstance(kind, list) and kind[0]]
    for part in sorted({*parts} - {but}):
        if not (checkpoint / part).is_dir():
            raise FileNotFoundError(f"{checkpoint / part}: missing, and model_index.json names it")
        for source in sorted((checkpoint / part).rglob("*")):
            target = folder / source.relative_to(checkpoint)
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(source.resolve(), target) if source.suffix == ".safetensors" else shutil.copyfile(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _write_transformer(model: nn.Module, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """config.json and the weights, in as many files as it takes and with no more than one of them in memory."""
    folder.mkdir()
    network_of(model).save_config(folder)  # type: ignore[operator]
    shards: list[list[str]] = []
    total, size, waiting = 0, 0, dict[str, Tensor]()

    def flush() -> None:
        save_weights(folder / str(len(shards)), waiting)
        shards.append(list(waiting))
        waiting.clear()

    for key, tensor in merged_weights(model):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if waiting and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        waiting[key] = tensor
        total, size = total + tensor.nbytes, size + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0").rename(folder / f"{_SHARD}.safetensors")
        return
    places: dict[str, str] = {}
    for i, keys in enumerate(shards):
        name = f"{_SHARD}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / str(i)).rename(folder / name)
        places |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{_SHARD}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
