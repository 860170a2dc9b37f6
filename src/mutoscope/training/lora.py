"""LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353) for any network, by PEFT.

The network's own weights are frozen, in whatever precision they are: bf16, int8. The adapters are fp32, and compute in
the precision of what flows through them. At the start the network's output is what it was, bit for bit.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.adapters import DOWN, MAGNITUDE, UP, Adapter, linear_layers, read_adapter
from mutoscope.errors import listed
from mutoscope.hub import INSTALL
from mutoscope.randomness import seed_of
from mutoscope.recipe import Lora

Layer = Any
"""PEFT's LoraLayer, whose own annotations are unions that say less."""
NAME = "default"
"""The adapter's name in PEFT, which diffusers' and PEFT's own functions look for."""

_GROUPS = {
    "attention": r"(^|\.)(attn\d*|attention(_time)?|cross)\.",
    "attention+mlp": r"(^|\.)(attn\d*|attention(_time)?|cross|ff|mlp)\.",
}
"""Where linear layers lie in diffusers' transformers (attn1.to_q, ff.net.2) and in ours (attention.query, mlp.up)."""


def network_of(model: nn.Module) -> nn.Module:
    """The module whose names are those in files of adapters: the diffusers transformer in a model that wraps one, or
    the model itself."""
    inner = getattr(model, "transformer", None)
    return inner if isinstance(inner, nn.Module) else model


def add_lora(model: nn.Module, lora: Lora, seed: int) -> None:
    """Freeze a model's weights and put adapters beside its targets; nothing but those is trainable afterwards.

    A is drawn from (seed, name of the layer), as PEFT draws it; B is zero. Or both are those of `lora.init_from`.

    Raises ValueError where the targets match no layer, naming near ones; where the model has adapters already; and as
    `read_adapter`, or where the adapter to start from has other layers or another rank, or one of the two is a DoRA.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: {INSTALL}") from error
    network = network_of(model)
    if next(lora_layers(model), None) is not None:
        raise ValueError(f"this {type(network).__name__} has adapters already")
    targets = find_targets(network, lora.targets)
    start = read_adapter(Path(lora.init_from), network, lora.init_alpha) if lora.init_from is not None else None
    model.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # it declares an int, and takes any number
        target_modules="|".join(re.escape(name) for name in targets),  # a list would match ends of names, too
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
    )
    # What PEFT draws is thrown away; so should be what it takes to draw it
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # it merges in no other way
        if hasattr(network, "add_adapter"):  # diffusers' own, so that its pipelines know of the adapter
            network.add_adapter(config, NAME)  # type: ignore[operator]
        else:
            inject_adapter_in_model(config, network, NAME)
        for name, layer in lora_layers(model):
            _reset(layer, lora, seed_of(seed, "lora", name))
    if start is not None:
        _start_from(model, lora, start)


def find_targets(network: nn.Module, targets: str) -> list[str]:
    """The names of the linear layers that `Lora.targets` means. Raises ValueError where it means none."""
    pattern = re.compile(_GROUPS.get(targets, targets))
    names = list(linear_layers(network))
    if found := [name for name in names if pattern.search(name)]:
        return found
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".N", name) for name in names))
    ends = {kind.rpartition(".")[2]: kind for kind in kinds} | {kind: kind for kind in kinds}
    near = list(dict.fromkeys(ends[end] for end in get_close_matches(targets, ends, n=5, cutoff=0.5))) or kinds
    raise ValueError(f"lora.targets={targets!r} matches none of the {len(names)} linear layers of "
                     f"{type(network).__name__}; there are:{listed(near)}")  # fmt: skip


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers with an adapter by name, as `network_of` the model knows them."""
    for name, module in network_of(model).named_modules():
        if hasattr(module, "lora_A") and NAME in module.lora_A:
            yield name, module


class _InputsPrecision(nn.Linear):
    """A linear layer of fp32 weights that computes in the precision of its input. PEFT would take the input to fp32
    instead: a copy of every activation that it keeps for the backward pass, and matrix products without tensor cores.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def _reset(layer: Layer, lora: Lora, seed: int) -> None:
    """fp32 adapters, drawn from the layer's own seed; PEFT's are rounded to the base's precision."""
    device = layer.lora_A[NAME].weight.device
    down = torch.empty(lora.rank, layer.in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    linear_type = nn.Linear if lora.dora else _InputsPrecision  # a DoRA's norms want fp32 throughout
    layer.cast_input_dtype_enabled = lora.dora
    for linears, weight in ((layer.lora_A, down), (layer.lora_B, torch.zeros(layer.out_features, lora.rank))):
        linear = linear_type(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(device))
        linears[NAME] = linear
    if lora.dora:
        layer.lora_magnitude_vector[NAME].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[NAME].weight,
            lora_B=layer.lora_B[NAME].weight,
            scaling=layer.scaling[NAME],
        )


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors, under the names that `Adapter.state` has. They are the model's own memory: writing into
    them changes the model."""
    state = {}
    for name, layer in lora_layers(model):
        state[f"{name}.{DOWN}"] = layer.lora_A[NAME].weight.detach()
        state[f"{name}.{UP}"] = layer.lora_B[NAME].weight.detach()
        if NAME in layer.lora_magnitude_vector:
            state[f"{name}.{MAGNITUDE}"] = layer.lora_magnitude_vector[NAME].weight.detach()
    return state


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill a model's adapters from what `adapter_state` of one like it returned.

    Raises ValueError naming `source` and the keys that are missing, unexpected or of another shape; the model is then
    unchanged.
    """
    wanted = adapter_state(model)
    faults = [f"{key}: missing from the file" for key in wanted if key not in state]
    faults += [f"{key}: not in the model" for key in state if key not in wanted]
    faults += [
        f"{key}: {list(state[key].shape)}, the model's is {list(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    if faults or not wanted:
        raise ValueError(f"{source}: not the adapters of this {type(network_of(model)).__name__}: "
                         f"{f'{len(faults)} faults' if wanted else 'it has none; call add_lora first'}"
                         f"{listed(sorted(faults))}")  # fmt: skip
    for key, tensor in wanted.items():
        tensor.copy_(state[key])


def adapter_of(model: nn.Module, about: Mapping[str, str] | None = None) -> Adapter:
    """A model's adapters, to be written to a file. Raises ValueError where it has none."""
    alphas = {name: float(layer.scaling[NAME]) * layer.r[NAME] for name, layer in lora_layers(model)}
    if not alphas:
        raise ValueError(f"this {type(network_of(model)).__name__} has no adapters")
    return Adapter(state=adapter_state(model), alphas=alphas, about=dict(about or {}))


def _start_from(model: nn.Module, lora: Lora, start: Adapter) -> None:
    """Take over an adapter. Where its alpha / rank is another, B makes up for it: the output is that of the adapter."""
    ours, theirs = {name for name, _ in lora_layers(model)}, start.ranks
    faults = [f"{name}: not among lora.targets={lora.targets!r}" for name in theirs.keys() - ours]
    faults += [f"{name}: not in the adapter" for name in ours - theirs.keys()]
    faults += [f"{name}: of rank {r}, lora.rank={lora.rank}" for name, r in theirs.items() if r != lora.rank]
    if start.dora != lora.dora:
        faults.append(f"it is {'a' if start.dora else 'no'} DoRA: set lora.dora={str(start.dora).lower()}")
    if faults:
        raise ValueError(f"lora.init_from={lora.init_from}: {len(faults)} things do not fit:{listed(sorted(faults))}")
    load_adapter_state(model, start.scaled(lora.scale).state, source=f"lora.init_from={lora.init_from}")


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of `network_of` the model by the names they had before `add_lora`, the adapters worked in: one at
    a time, so that there is never a second copy of the model. Sums are taken in fp32, results have the base's dtype.

    Raises ValueError where an adapter's base is quantised: load the base in bf16 or fp32 and merge into that.
    """
    network = network_of(model)
    layers = dict(lora_layers(model))
    for key, tensor in network.state_dict().items():
        if re.search(r"\.lora_(A|B|magnitude_vector)\.", key):
            continue
        kind, name = type(tensor.detach()), key.replace(".base_layer.", ".")
        if name.endswith(".weight") and (kind is not Tensor or not tensor.is_floating_point()):
            raise ValueError(f"{name}: quantised ({kind.__name__}, {tensor.dtype}), and adapters cannot be merged into "
                             "that; load the model without quantisation")  # fmt: skip
        if name != key and name.endswith(".weight"):
            tensor = _merged(layers[name.removesuffix(".weight")], tensor)
        yield name, tensor


def _merged(layer: Layer, weight: Tensor) -> Tensor:
    merged = weight.float() + layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight).detach()
    if NAME in layer.lora_magnitude_vector:
        merged *= (layer.lora_magnitude_vector[NAME].weight.detach() / merged.norm(dim=1))[:, None]
    return merged.to(weight.dtype)
