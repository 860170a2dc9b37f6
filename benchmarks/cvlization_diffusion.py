"""Loads the diffusion models of a checkout of kungfuai/CVlization (examples/generative/video_generation/minisora).

They import timm, xformers and wandb. Of timm they use three layers that are written here; captions alone need xformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from benchmarks.cvlization import PEER

FOLDER = "examples/generative/video_generation/minisora"


def stdit(checkout: Path, **options: Any) -> nn.Module:
    """The seed's STDiT, unconditional."""
    model: nn.Module = _import(checkout, "stdit.model").STDiT(unconditional=True, **options)
    return model


def latte(checkout: Path, **options: Any) -> nn.Module:
    """The seed's Latte."""
    model: nn.Module = _import(checkout, "latte").Latte(**options)
    return model


def iddpm(checkout: Path, channels_axis: int, steps: int = 1000) -> Any:
    """The seed's IDDPM as iddpm.py (channels_axis 1) or train_dit.py (2) make it: linear, ε, learned range, MSE;
    respaced to `steps` of the 1000."""
    package = "iddpm_scheduler." if channels_axis == 1 else ""
    gd, respace = (_import(checkout, f"{package}{name}") for name in ("gaussian_diffusion", "respace"))
    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, [steps]),
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.MSE,
    )


class Mlp(nn.Module):
    """timm's, without dropout."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float) -> None:
        super().__init__()
        assert not drop
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    """timm's."""

    def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def _import(checkout: Path, module: str) -> Any:
    folder = checkout / FOLDER
    if not folder.is_dir():
        raise SystemExit(f"--peer {checkout}: not a checkout of {PEER} (no {FOLDER} in it)")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        _stub("timm.models.vision_transformer", Mlp=Mlp, PatchEmbed=PatchEmbed)
        _stub("timm.models.layers", DropPath=nn.Identity)
        _stub("xformers.ops")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"--peer {checkout}: the seed needs {error.name}: pip install {error.name}") from None


def _stub(name: str, **members: Any) -> None:
    """A module of that name with these members, and the packages above it."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        module = sys.modules.setdefault(path, ModuleType(path))
        if n > 1:
            setattr(sys.modules[".".join(parts[: n - 1])], parts[n - 1], module)
    for key, value in members.items():
        setattr(sys.modules[name], key, value)
