"""Loads parts of a checkout of kungfuai/CVlization, the seed, for the benchmarks that are measured against it."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

PEER = "kungfuai/CVlization"


def vector_quantizer(checkout: Path, num_codes: int, dim: int, low_utilization_cost: float) -> nn.Module:
    """The seed's VectorQuantizer."""
    components = _import(checkout, "cvlization.torch.net.vae.video_vae_components")
    return _quietly(components.VectorQuantizer, num_codes, dim, low_utilization_cost=low_utilization_cost)


def vqvae(checkout: Path, variant: str, num_codes: int, dim: int, low_utilization_cost: float) -> nn.Module:
    """The seed's VQVAE module, without Lightning: what it logs is thrown away, which costs it nothing."""

    class LightningModule(nn.Module):
        def save_hyperparameters(self) -> None: ...

    lightning, pytorch = ModuleType("lightning"), ModuleType("lightning.pytorch")
    pytorch.LightningModule = LightningModule  # type: ignore[attr-defined]
    lightning.pytorch = pytorch  # type: ignore[attr-defined]
    sys.modules |= {"lightning": lightning, "lightning.pytorch": pytorch}
    module = _import(checkout, "cvlization.torch.net.vae.video_vqvae")
    args = SimpleNamespace(
        network_variant=variant, embedding_dim=dim, n_codes=num_codes,
        low_utilization_cost=low_utilization_cost, commitment_cost=0.25, kl_loss_weight=1.0,
    )  # fmt: skip
    return _quietly(module.VQVAE, args)


def gpt(checkout: Path, **config: float) -> nn.Module:
    """The seed's GPT (nanoGPT), without Weights & Biases."""
    sys.modules.setdefault("wandb", ModuleType("wandb"))
    module = _import(checkout, "cvlization.torch.training_pipeline.lm.gpt")
    model: nn.Module = _quietly(module.GPT, module.GPTConfig(**config))
    configure = model.configure_optimizers
    model.configure_optimizers = lambda *args: _quietly(configure, *args)  # type: ignore[assignment]
    return model


def _import(checkout: Path, module: str) -> Any:
    if not (checkout / "cvlization").is_dir():
        raise SystemExit(f"--peer {checkout}: not a checkout of {PEER} (no folder cvlization in it)")
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"--peer {checkout}: the seed needs {error.name}: pip install {error.name}") from None


def _quietly(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return make(*args, **options)
