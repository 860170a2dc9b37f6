"""LoRA adapters in files: read whoever wrote them, and written so that every reader gives them the strength they were
trained at.

The update of a layer is alpha / rank · B A. What goes wrong in this field is the alpha: CogVideo's trainer and
cogvideox-factory don't write it down, diffusers takes alpha = rank where it finds none, and several readers know no
alpha at all. So what we write has alpha / rank multiplied into B and alpha = rank, and what we read without an alpha
is refused until somebody says it.

    reader                         file                                    keys
    diffusers, ComfyUI wrapper     pytorch_lora_weights.safetensors        transformer.MODULE.lora_A.weight
    PEFT                           adapter_config.json, adapter_model...   base_model.model.MODULE.lora_A.weight
    kohya, VideoX-Fun, ComfyUI     NAME.safetensors                        lora_unet__MO_DU_LE.lora_down.weight, .alpha

MODULE is a linear layer's name in the diffusers transformer (or in one of our own networks).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mutoscope.errors import did_you_mean, listed
from mutoscope.weights import read_weights, save_weights

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
"""Of each adapted layer: A (rank, in), B (out, rank), and DoRA's magnitudes (out,)."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
HEADER, ABOUT = "lora_adapter_metadata", "mutoscope"
"""Keys of a file's header: diffusers' own, with rank and alpha, and ours, with where the adapter is from."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA, or a DoRA, of some of a network's linear layers."""

    state: dict[str, Tensor]
    """MODULE.lora_A.weight (rank, in), MODULE.lora_B.weight (out, rank) and, of a DoRA, MODULE.lora_magnitude_vector
    (out,)."""
    alphas: dict[str, float]
    """The alpha of each MODULE: its update is alpha / rank · B A."""
    origin: str = "mutoscope"
    """Whose layout the file had: diffusers, PEFT or kohya."""
    about: dict[str, str] = field(default_factory=dict)
    """What the file says of where it is from, where we wrote it: base_model, step, ..."""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each MODULE."""
        return _ranks(self.state)

    @property
    def scales(self) -> dict[str, float]:
        """alpha / rank of each MODULE."""
        return {module: self.alphas[module] / rank for module, rank in self.ranks.items()}

    @property
    def dora(self) -> bool:
        """Whether it has DoRA's magnitudes."""
        return any(key.endswith(MAGNITUDE) for key in self.state)

    def scaled(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Adapter:
        """The same update with alpha = scale · rank throughout, B making up for it; A and B in `dtype`.

        The magnitudes stay as they are: they multiply whole weights, which bf16 would change by up to 0.4 %.
        """
        state = dict(self.state)
        for module, own in self.scales.items():
            state[f"{module}.{DOWN}"] = state[f"{module}.{DOWN}"].to(dtype)
            state[f"{module}.{UP}"] = (state[f"{module}.{UP}"].float() * (own / scale)).to(dtype)
        return replace(self, state=state, alphas={module: scale * rank for module, rank in self.ranks.items()})


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network by name; where adapters were added, the layers below them by their old names."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not re.search(r"\.lora_[AB]\.", name)
    }


# ---- writing


def write_diffusers(folder: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> Path:
    """Write the file that `load_lora_weights` of a diffusers pipeline reads, be the header known to it or not; a run
    keeps its adapter in it, too."""
    adapter = adapter.scaled(dtype=dtype)
    header = {f"transformer.{key}": value for key, value in _peft_fields(adapter).items()}
    path = folder / DIFFUSERS_FILE
    state = {f"transformer.{key}": value for key, value in adapter.state.items()}
    save_weights(path, state, {HEADER: json.dumps(header, sort_keys=True), ABOUT: _dump(adapter.about)})
    return path


def write_peft(folder: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> Path:
    """Write the folder that `PeftModel.from_pretrained(network, folder)` reads."""
    from peft import LoraConfig

    adapter = adapter.scaled(dtype=dtype)
    state = {f"base_model.model.{key}": value for key, value in adapter.state.items()}
    save_weights(folder / PEFT_FILE, state, {ABOUT: _dump(adapter.about)})
    config = LoraConfig(**_peft_fields(adapter), base_model_name_or_path=adapter.about.get("base_model"))
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return folder


def write_kohya(path: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> Path:
    """Write the file that ComfyUI's CogVideoX nodes and VideoX-Fun merge: W += up @ down · alpha / rank.

    Raises ValueError for a DoRA, which those cannot read.
    """
    if adapter.dora:
        raise ValueError("a DoRA cannot be written for ComfyUI: its CogVideoX nodes read plain LoRAs; "
                         "use --to diffusers, or --to full for merged weights")  # fmt: skip
    adapter = adapter.scaled(dtype=dtype)
    state: dict[str, Tensor] = {}
    for module, alpha in adapter.alphas.items():
        name = f"lora_unet__{module.replace('.', '_')}"
        state[f"{name}.lora_down.weight"] = adapter.state[f"{module}.{DOWN}"]
        state[f"{name}.lora_up.weight"] = adapter.state[f"{module}.{UP}"]
        state[f"{name}.alpha"] = torch.tensor(alpha)
    save_weights(path, state, {ABOUT: _dump(adapter.about)})
    return path


def _peft_fields(adapter: Adapter) -> dict[str, Any]:
    """A LoraConfig's fields; no more of them: one that a reader's PEFT lacks is an error there."""
    rank, other_ranks = _pattern(adapter.ranks)
    alpha, other_alphas = _pattern(adapter.alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_alphas,
        "target_modules": sorted(adapter.alphas),
        "use_dora": adapter.dora,
    }


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the others by a regular expression for their module; whole numbers as int."""
    values = {module: int(value) if value == int(value) else value for module, value in values.items()}
    common = max(values.values(), key=list(values.values()).count)
    return common, {f"^{re.escape(module)}": value for module, value in values.items() if value != common}


def _dump(about: Mapping[str, str]) -> str:
    return json.dumps(about, sort_keys=True, ensure_ascii=False)


# ---- reading


def read_adapter(path: Path, network: nn.Module, alpha: float | None = None) -> Adapter:
    """The adapter in a file or folder, every tensor of it at its place in `network`.

    path: a .safetensors file or a folder with one: diffusers' (also as CogVideo's trainer, cogvideox-factory and
        finetrainers save it), PEFT's, or kohya's (VideoX-Fun); or a run directory of our own.
    alpha: what it was trained with, for files that don't say.

    Raises FileNotFoundError; ValueError where the file is damaged or of another kind (SAT, LoKr, ...), where it
    adapts what the network does not have, in other shapes or nothing at all, and where its alpha is unknown or is not
    the one given.
    """
    file = _find(path)
    state = read_weights(file)
    header, beside = _header(file), file.with_name(PEFT_CONFIG)
    config = _parse(beside.read_text(), beside) if beside.is_file() else {}
    _refuse_other_kinds(file, state)
    layers = linear_layers(network)
    if any("lora_down" in key for key in state):
        tensors, alphas, origin = _from_kohya(file, state, layers)
    else:
        tensors, alphas, origin = _from_peft(file, state)
    _check_fit(file, tensors, layers, type(network).__name__)
    fields = {k.removeprefix("transformer."): v for k, v in _parse(header.get(HEADER, "{}"), file).items()} or config
    return Adapter(
        state=tensors,
        alphas=_alphas(file, fields, _ranks(tensors), alphas, alpha),
        origin=origin,
        about=_parse(header.get(ABOUT, "{}"), file),
    )


def _find(path: Path) -> Path:
    """The file with the tensors."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter")
    if path.is_dir():
        path = path / "final" if (path / "final").is_dir() else path
        found = sorted(p.name for p in path.glob("*.safetensors"))
        chosen = [name for name in (DIFFUSERS_FILE, PEFT_FILE) if name in found] or found
        if len(chosen) != 1:
            others = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
            raise ValueError(f"{path}: expected one .safetensors file with an adapter, found {others}; name the file")
        path = path / chosen[0]
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: not a .safetensors file; others are pickles, which can run code and are not opened")
    return path


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _parse(text: str, source: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: what it says of the adapter is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{source}: what it says of the adapter is not a table: {text[:100]}")
    return parsed


_OTHER_KINDS = {
    r"matrix_[AB]\.": "a checkpoint of SAT (SwissArmyTransformer); convert it with CogVideo's "
    "tools/export_sat_lora_weight.py, and give the alpha of its training",
    r"\.(lokr|hada|oft|ia3)_": "a LoKr, LoHa, OFT or IA3, not a LoRA",
    r"dora_scale$": "a DoRA of kohya's kind; only those of PEFT and diffusers can be read",
    r"^(lora_te|text_encoder)": "an adapter of the text encoder, which is frozen here",
    r"\.diff(_[bm])?$": "full weight differences beside the LoRA (VideoX-Fun), not a LoRA alone",
    r"lora_B\.bias$": "a LoRA with biases",
}


def _refuse_other_kinds(file: Path, state: Mapping[str, Tensor]) -> None:
    for pattern, kind in _OTHER_KINDS.items():
        if found := [key for key in state if re.search(pattern, key)]:
            raise ValueError(f"{file}: cannot be loaded: it holds {kind} ({found[0]}, {len(found)} such keys)")


def _from_peft(file: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float], str]:
    """Tensors under our names, and alphas where the file has them as tensors."""
    prefixes = {"base_model.model.": "PEFT", "transformer.": "diffusers", "diffusion_model.": "diffusers"}
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    origin, unknown = "diffusers", []
    for key, tensor in state.items():
        name = key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE}.weight") else key
        for prefix, writer in prefixes.items():
            if name.startswith(prefix):
                name, origin = name.removeprefix(prefix), writer
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = tensor.item()
        elif name.endswith((DOWN, UP, MAGNITUDE)):
            tensors[name] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} of {len(state)} keys are no LoRA's:{listed(unknown)}")
    return tensors, alphas, origin


def _from_kohya(
    file: Path, state: Mapping[str, Tensor], layers: Mapping[str, nn.Linear]
) -> tuple[dict[str, Tensor], dict[str, float], str]:
    """As `_from_peft`; which dots the underscores in kohya's names stand for is seen from the network's own names."""
    names = {name.replace(".", "_"): name for name in layers}
    kinds = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": "alpha"}
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for key, tensor in state.items():
        kind = next((kind for kind in kinds if key.endswith(f".{kind}")), "")
        stem = re.sub(r"^(lora_unet_+|diffusion_model\.|transformer\.)", "", key.removesuffix(f".{kind}"))
        module = names.get(stem.replace(".", "_"))
        if module is None or not kind:
            unknown.append(key)
        elif kind == "alpha":
            alphas[module] = tensor.item()
        else:
            tensors[f"{module}.{kinds[kind]}"] = tensor
    if unknown:
        raise ValueError(f"{file}: {len(unknown)} of {len(state)} keys are of no linear layer here:{listed(unknown)}")
    by_rule = {m: float(rank) for m, rank in _ranks(tensors).items()}  # of a layer without an alpha: alpha = rank
    return tensors, by_rule | alphas, "kohya"


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {key.removesuffix(f".{DOWN}"): t.shape[0] for key, t in tensors.items() if key.endswith(DOWN)}


def _check_fit(file: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Linear], network: str) -> None:
    """Raise ValueError unless every adapted layer is there, whole and in its shape."""
    faults = list(_misfits(tensors, layers))
    if not tensors or faults:
        raise ValueError(f"{file}: not an adapter of this {network}: "
                         f"{f'{len(faults)} faults' if tensors else 'it adapts nothing'}{listed(faults)}")  # fmt: skip


def _misfits(tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Linear]) -> Iterator[str]:
    modules = dict.fromkeys(re.sub(r"\.lora_(A|B|magnitude).*", "", key) for key in tensors)
    dora = any(key.endswith(MAGNITUDE) for key in tensors)
    for module in modules:
        if module not in layers:
            yield f"{module}: no such linear layer{did_you_mean(module, layers)}"
            continue
        down, up, magnitude = (tensors.get(f"{module}.{kind}") for kind in (DOWN, UP, MAGNITUDE))
        if down is None or up is None or (dora and magnitude is None):
            yield f"{module}: only a part of its LoRA is there"
            continue
        if not all(part.isfinite().all() for part in (down, up, magnitude) if part is not None):
            yield f"{module}: has numbers that are not finite"
        layer = layers[module]
        wanted = [(down.shape[0], layer.in_features), (layer.out_features, down.shape[0])]
        found = [tuple(down.shape), tuple(up.shape)]
        if found != wanted or (magnitude is not None and tuple(magnitude.shape) != (layer.out_features,)):
            yield f"{module}: A and B {found[0]} and {found[1]}, the layer wants {wanted[0]} and {wanted[1]}"


def _alphas(
    file: Path, fields: Mapping[str, Any], ranks: Mapping[str, int], tensors: Mapping[str, float], alpha: float | None
) -> dict[str, float]:
    """The alpha of each module: by the file's own tensors, by a LoraConfig's fields, or as given where those say
    nothing."""
    if tensors:
        own = dict(tensors)
    elif "lora_alpha" in fields:
        own = {module: _by_pattern(fields, module) for module in ranks}
    elif alpha is not None:
        own = dict.fromkeys(ranks, alpha)
    else:
        rank = max(ranks.values())
        raise ValueError(
            f"{file}: of rank {rank}, and does not say with which alpha it was trained, so that its strength is "
            f"unknown. Give it: {rank} if by cogvideox-factory or finetrainers at their defaults (alpha = rank), "
            f"{rank / 2:g} if by CogVideo's own trainer at its defaults (rank 128, alpha 64)"
        )
    if lacking := ranks.keys() - own.keys():
        raise ValueError(f"{file}: {len(lacking)} of {len(ranks)} layers have no alpha:{listed(sorted(lacking))}")
    if alpha is not None and (others := sorted({a for a in own.values() if a != alpha})):
        raise ValueError(
            f"{file}: was trained with alpha {others[0]:g} by its own account, not {alpha:g}; leave it out"
        )
    stretch = (lambda rank: math.sqrt(rank)) if fields.get("use_rslora") else (lambda rank: 1.0)
    return {module: own[module] * stretch(rank) for module, rank in ranks.items()}  # rsLoRA's scale: alpha / √rank


def _by_pattern(fields: Mapping[str, Any], module: str) -> float:
    """As PEFT reads its alpha_pattern: the first that fits the end of the name."""
    for pattern, alpha in (fields.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(fields["lora_alpha"])
