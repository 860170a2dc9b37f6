"""Runs the training step of a checkout of a-r-r-o-w/cogvideox-factory, for the benchmarks that are measured against it.

The step is not written anew: the statements of the script's own loop are taken from its source, from the moments of a
stored clip to the optimizer's step, and run as they stand, around a model, an optimizer and an Accelerator that are
made as the script makes them.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

PEER = "a-r-r-o-w/cogvideox-factory"
_SCRIPT = Path("training/cogvideox/cogvideox_text_to_video_lora.py")


def lora_step(
    checkout: Path,
    transformer: nn.Module,
    scheduler: Any,
    *,
    rank: int,
    alpha: float,
    precision: Literal["fp32", "bf16"],
    checkpointing: bool,
    lr: float,
    scaling_factor: float,
) -> Callable[[Tensor, Tensor], float]:
    """The script's step as a function from stored moments (B, 2c, t, h, w) and embeddings (B, l, d) to the loss.

    transformer: diffusers' CogVideoXTransformer3DModel with the weights to start from, adapters not yet added.
    """
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState
    from diffusers.models.autoencoders.autoencoder_kl import DiagonalGaussianDistribution
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig

    utils = _utils(checkout)
    args = SimpleNamespace(load_tensors=True, max_grad_norm=1.0, use_cpu_offload_optimizer=False, learning_rate=lr)
    AcceleratorState._reset_state(reset_partial_state=True)  # which knows of one precision in a process
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=True)
    weight_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net: Any = transformer
    net.requires_grad_(False)
    net.to(dtype=weight_dtype)
    if checkpointing:
        net.enable_gradient_checkpointing()
    net.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=alpha, init_lora_weights=True, target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
    )
    optimizer = utils.get_optimizer(
        [{"params": [p for p in net.parameters() if p.requires_grad], "lr": lr}], optimizer_name="adamw",
        learning_rate=lr, beta1=0.9, beta2=0.95, weight_decay=1e-4,
    )  # fmt: skip
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    net, optimizer, lr_scheduler = accelerator.prepare(net, optimizer, lr_scheduler)
    net.train()
    config = net.config
    names = {
        "accelerator": accelerator, "alphas_cumprod": scheduler.alphas_cumprod.to(dtype=torch.float32), "args": args,
        "DiagonalGaussianDistribution": DiagonalGaussianDistribution, "DistributedType": DistributedType,
        "get_gradient_norm": utils.get_gradient_norm, "lr_scheduler": lr_scheduler, "model_config": config,
        "optimizer": optimizer,
        "prepare_rotary_positional_embeddings": utils.prepare_rotary_positional_embeddings,
        "RoPE_BASE_HEIGHT": config.sample_height * 8, "RoPE_BASE_WIDTH": config.sample_width * 8,
        "scheduler": scheduler, "torch": torch, "transformer": net, "VAE_SCALE_FACTOR_SPATIAL": 8,
        "VAE_SCALING_FACTOR": scaling_factor, "weight_dtype": weight_dtype,
    }  # fmt: skip
    step = _loop_body(checkout / _SCRIPT, names)
    return lambda moments, text: step({"videos": moments, "prompts": text})


def _utils(checkout: Path) -> Any:
    file = checkout / _SCRIPT.parent / "utils.py"
    if not file.is_file():
        raise SystemExit(f"--peer {checkout}: not a checkout of {PEER} (no {_SCRIPT.parent}/utils.py in it)")
    spec = importlib.util.spec_from_file_location("cogvideox_factory_utils", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _loop_body(script: Path, names: dict[str, Any]) -> Callable[[dict[str, Tensor]], float]:
    """What the script does with a batch, up to the numbers that it logs, as a function of the batch."""
    loops = [
        node
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.For) and "train_dataloader" in ast.unparse(node.iter)
    ]
    if len(loops) != 1:
        raise SystemExit(f"{script}: {len(loops)} loops over train_dataloader, where one was expected")
    body = loops[0].body
    end = next(i for i, node in enumerate(body) if isinstance(node, ast.With)) + 1
    function = ast.parse("def step(batch):\n    return loss.detach().item()").body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = [*body[:end], *function.body]
    module = ast.fix_missing_locations(ast.Module(body=[function], type_ignores=[]))
    exec(compile(module, str(script), "exec"), names)
    step: Callable[[dict[str, Tensor]], float] = names["step"]
    return step
