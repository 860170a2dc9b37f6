"""Pretrained checkpoints in diffusers' format: a folder with a sub-folder for each part (transformer, vae,
text_encoder, tokenizer, scheduler), on this machine or on the Hugging Face Hub.

Weights come from safetensors files alone (the others are pickles, which run code), every key accounted for, one tensor
at a time straight into the dtype that is wanted: no second copy. No code of a checkpoint's is ever run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mutoscope.errors import listed
from mutoscope.hub import INSTALL, download, is_hub_id
from mutoscope.known_checkpoints import DEFAULTS, IMAGE_VAE, KNOWN, KNOWN_IMAGE_VAES, Config
from mutoscope.tiny_checkpoints import make_tiny, tiny_config

PARTS = tuple(DEFAULTS)
"""The parts of a checkpoint, as their folders are called."""
TINY = "tiny://"
"""What the path of a tiny random checkpoint begins with (see `tiny_checkpoints`)."""

_CLASSES = {
    "transformer": {"CogVideoXTransformer3DModel": "diffusers"},
    "vae": {"AutoencoderKLCogVideoX": "diffusers", "AutoencoderKL": "diffusers"},
    "text_encoder": {"T5EncoderModel": "transformers"},
}
"""The classes that may stand in a part's config.json, and the library of each."""
_CONFIG_FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
_WEIGHT_FILES = ("diffusion_pytorch_model", "model")
_ALONE = {"vae": "AutoencoderKL"}
"""Parts that are published by themselves as well, with their files in no folder, and the class of such ones."""
_OLD_KEYS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What attention was called in the autoencoders of images that diffusers before 0.17 wrote."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_checkpoint(path: str, parts: Sequence[str] = PARTS) -> Path:
    """The folder of a checkpoint.

    path: a folder in diffusers' format, the id of one on the Hugging Face Hub ("THUDM/CogVideoX-5b"), of which the
        given parts are downloaded where they are not in its cache, or tiny://NAME, which is made on first use.

    Raises FileNotFoundError where there is no such folder, file or repository, or no way to it; ValueError where what
    is there is something else, saying what it seems to be, or where a library that it takes is missing.
    """
    if path.startswith(TINY):
        return make_tiny(path.removeprefix(TINY))
    folder = Path(path).expanduser()
    if not folder.exists():
        return _download(path, [pattern for part in parts for pattern in _patterns(part)])
    if folder.is_file() or not any((folder / part).is_dir() or _is_alone(folder, part) for part in parts):
        raise ValueError(f"{path}: {_what_it_is(folder)}; what is wanted is a folder in diffusers' format, with "
                         f"{', '.join(parts)} in it, as <pipeline>.save_pretrained writes it")  # fmt: skip
    return folder


def part_folder(path: str, part: str) -> Path:
    """The folder of a part: in the checkpoint's; or that itself, where it is a single part, as an autoencoder often is
    (stabilityai/sd-vae-ft-mse). Raises as `open_checkpoint`."""
    folder = open_checkpoint(path, [part])
    return folder if _is_alone(folder, part) else folder / part


def _is_alone(folder: Path, part: str) -> bool:
    config = folder / "config.json"
    return part in _ALONE and config.is_file() and _class_name(json.loads(config.read_text())) == _ALONE[part]


def part_config(path: str, part: str) -> Config:
    """What the config.json of a part of a checkpoint says, with the defaults of what it leaves out. No weights are
    read or downloaded; for the ids in `known_checkpoints.KNOWN`, not even a network is needed.

    Raises as `open_checkpoint` does, and ValueError for a part whose class is not known here.
    """
    if path.startswith(TINY):
        return tiny_config(path.removeprefix(TINY), part)
    name = _CONFIG_FILES.get(part, "config.json")
    if path in KNOWN and not Path(path).exists():
        return KNOWN[path][part]
    if path in KNOWN_IMAGE_VAES and part == "vae" and not Path(path).exists():
        return KNOWN_IMAGE_VAES[path]
    wanted = [f"{part}/{name}", *([name] if part in _ALONE else [])]
    folder = open_checkpoint(path, [part]) if Path(path).expanduser().exists() else _download(path, wanted)
    file = folder / name if _is_alone(folder, part) else folder / part / name
    if not file.is_file():
        raise FileNotFoundError(f"{path}: {part}/{name} is missing")
    config = json.loads(file.read_text())
    found = _class_name(config)
    if part in _CLASSES and found not in _CLASSES[part]:
        raise ValueError(f"{path}: its {part} is a {found}; known here: {', '.join(_CLASSES[part])}")
    return (IMAGE_VAE if found == "AutoencoderKL" else DEFAULTS[part]) | config


def scheduler_fields(path: str) -> dict[str, Any]:
    """The fields of `objectives.diffusion.Diffusion` that train a checkpoint's transformer as it was trained: its own
    table of noise, what it predicts, and the latents that it takes together in time.

    Raises ValueError for a scheduler that trains by something else.
    """
    config, transformer = part_config(path, "scheduler"), part_config(path, "transformer")
    expected = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None,
                "num_train_timesteps": 1000, "prediction_type": "v_prediction"}  # fmt: skip
    if wrong := [f"{key} = {config[key]!r}, not {value!r}" for key, value in expected.items() if config[key] != value]:
        raise ValueError(f"{path}: scheduler/scheduler_config.json is of a kind not known here: {'; '.join(wrong)}")
    return {
        "schedule": "scaled_linear",
        "prediction": "v",
        "snr_shift_scale": float(config["snr_shift_scale"]),
        "zero_terminal_snr": bool(config["rescale_betas_zero_snr"]),
        "temporal_patch": transformer["patch_size_t"] or 1,
    }


def load_part(path: str, part: str, dtype: torch.dtype) -> nn.Module:
    """A part of a checkpoint with its weights in `dtype`, on the CPU, in eval mode.

    Under FakeTensorMode, or with meta as the default device, weights are shapes alone and the config.json is enough.

    Raises as `part_config`; FileNotFoundError for a missing file; ValueError where weights are damaged, are pickles, or
    do not match the module key by key and shape by shape: the first ten that do not, and how many there are.
    """
    config = part_config(path, part)
    probe = torch.empty(0)
    if probe.is_meta or isinstance(probe, FakeTensor):
        return _construct(part, config, dtype).eval()
    folder = part_folder(path, part)
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ValueError(f"{path}: pretrained models take accelerate: {INSTALL}") from error
    with init_empty_weights(include_buffers=False):  # buffers that no file holds are worked out by the module
        module = _construct(part, config, dtype)
    if part == "text_encoder":  # without weights, what is tied became several
        module.tie_weights()  # type: ignore[operator]
    _load(module, weight_files(folder), dtype, source=f"{path}: {part}")
    return module.eval()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: one, or the shards that an index names.

    Raises FileNotFoundError for shards that are missing, ValueError where there are only pickles or nothing.
    """
    for name in _WEIGHT_FILES:
        index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ValueError(f"{index}: names files outside of its folder:{listed(outside)}")
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise FileNotFoundError(f"{folder}: {len(missing)} of {len(shards)} shards are missing:"
                                        f"{listed(missing)}")  # fmt: skip
            return [folder / shard for shard in shards]
        if single.is_file():
            return [single]
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES) if folder.is_dir() else []
    if pickles:
        raise ValueError(f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run code and are "
                         "not opened; save the model again with safe_serialization=True")  # fmt: skip
    raise ValueError(f"{folder}: no weights: neither of {', '.join(f'{n}.safetensors' for n in _WEIGHT_FILES)}, "
                     "nor the index of their shards")  # fmt: skip


def hash_part(path: str, part: str) -> str:
    """xxh3-128 over the names and bytes of a part's weights (of the tokenizer, of all its files): its identity,
    whatever its configuration. Reads a file at most once, a block at a time."""
    folder = part_folder(path, part)
    files = sorted(f for f in folder.iterdir() if f.is_file()) if part == "tokenizer" else weight_files(folder)
    digest = xxhash.xxh3_128()
    for file in files:
        about = file.stat()
        digest.update(f"{file.name} {_hash_file(file, about.st_size, about.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _hash_file(file: Path, size: int, modified: int) -> str:
    """Remembered for as long as the file's size and time stay as they are."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as blocks:
        while block := blocks.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


# ---- what is at a path


def _patterns(part: str) -> list[str]:
    """What to download of a part: no pickles, no weights in other precisions beside the main ones."""
    if part in ("scheduler", "tokenizer"):
        return [f"{part}/*"]
    weights = [f"{part}/{name}{end}" for name in _WEIGHT_FILES for end in (".safetensors", "-*-of-*.safetensors")]
    alone = [f.removeprefix(f"{part}/") for f in [f"{part}/config.json", *weights]] if part in _ALONE else []
    return [f"{part}/*.json", *weights, *alone]


def _download(path: str, patterns: Iterable[str]) -> Path:
    if not is_hub_id(path):
        raise FileNotFoundError(f"{path}: no such folder; nor is it the id of a model on the Hugging Face Hub, as in "
                                "THUDM/CogVideoX-5b")  # fmt: skip
    return download(path, kind="model", patterns=["model_index.json", *patterns])


def _what_it_is(path: Path) -> str:
    """A guess, in words, at what somebody has given in place of a checkpoint."""
    if path.is_file():
        return "a single file" + (" (a pickle, which can run code)" if path.suffix in _PICKLES else "")
    names = {f.name for f in path.iterdir()}
    if names & {"adapter_config.json", "pytorch_lora_weights.safetensors"}:
        return "a LoRA adapter; give the model that it was trained on here"
    if any(path.glob("**/mp_rank_*_model_states.pt")):
        return "a SAT checkpoint, in pickles; convert it by diffusers' scripts/convert_cogvideox_to_diffusers.py"
    if "config.json" in names:
        return f"one part of a checkpoint ({_class_name(json.loads((path / 'config.json').read_text()))}); give the \
folder above it"
    if "model_index.json" in names:
        return "a checkpoint without this part"
    return "an empty folder" if not names else f"a folder of {', '.join(sorted(names)[:5])}"


def _class_name(config: Config) -> str:
    return str(config.get("_class_name") or next(iter(config.get("architectures") or ["model of no known class"])))


# ---- modules and their weights


def _construct(part: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """The module of a configuration, made in `dtype` wherever tensors are made."""
    name = _class_name(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if _CLASSES[part][name] == "diffusers":
            import diffusers

            return getattr(diffusers, name).from_config(config)
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class.from_dict(config))
    except ImportError as error:
        raise ValueError(f"{name} takes diffusers and transformers: {INSTALL}") from error
    finally:
        torch.set_default_dtype(before)


def _load(module: nn.Module, files: Sequence[Path], dtype: torch.dtype, source: str) -> None:
    """Fill a module that was made without weights, one tensor at a time."""
    slots: dict[int, list[str]] = defaultdict(list)  # tied weights have several names and, mostly, one entry in a file
    shapes: dict[str, list[int]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        slots[id(tensor)].append(name)
        shapes[name] = list(tensor.shape)
    aliases = {name: names for names in slots.values() for name in names}

    where: dict[str, Path] = {}
    misshapen = []
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it has no __iter__)
                name = _present_name(key, shapes)
                where[name] = file
                if name in shapes and (shape := tensors.get_slice(key).get_shape()) != shapes[name]:
                    misshapen.append(f"{name}: {shape}, not {shapes[name]}")
    faults = {
        "missing": [names[0] for names in slots.values() if not any(name in where for name in names)],
        "unexpected": [name for name in where if name not in shapes],
        "of another shape": misshapen,
    }
    if any(faults.values()):
        told = "".join(f"\n{len(keys)} {what}:{listed(keys)}" for what, keys in faults.items() if keys)
        matching = len(slots) - len(faults["missing"]) - len(misshapen)
        raise ValueError(f"{source}: these weights are not of the {type(module).__name__} in its config.json: "
                         f"{matching} of {len(slots)} match{told}")  # fmt: skip
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(key)
                tensor = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)  # off the file
                _assign(module, aliases[_present_name(key, shapes)], tensor)


def _present_name(key: str, known: Collection[str]) -> str:
    """What the module calls what a file calls `key`."""
    if key in known:
        return key
    renamed = key
    for old, new in _OLD_KEYS.items():
        renamed = renamed.replace(old, new)
    return renamed if renamed in known else key


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged, or not a safetensors file: {error}") from None


def _assign(module: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of these names: several where it is tied."""
    owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    value = nn.Parameter(tensor) if isinstance(getattr(*owners[0]), nn.Parameter) else tensor
    for owner, leaf in owners:
        setattr(owner, leaf, value)
