"""What the numbers of a recipe may be."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

Limits = dict[str, int | float]
"""What a number may be, in the keywords of JSON Schema."""

POSITIVE: Limits = {"exclusiveMinimum": 0}
AT_LEAST_0: Limits = {"minimum": 0}
AT_LEAST_1: Limits = {"minimum": 1}
SHARE: Limits = {"minimum": 0, "exclusiveMaximum": 1}
UP_TO_1: Limits = {"minimum": 0, "maximum": 1}

LIMITS: dict[str, Limits] = {
    "steps": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "accumulate": AT_LEAST_1,
    "ema": SHARE,
    "log_every": AT_LEAST_1,
    "validate_every": AT_LEAST_0,
    "sample_every": AT_LEAST_0,
    "save_every": AT_LEAST_1,
    "keep_last": AT_LEAST_1,
    "keep_every": AT_LEAST_0,
    "num_samples": AT_LEAST_1,
    "offload_blocks": AT_LEAST_0,
    "data.frames": AT_LEAST_1,
    "data.height": AT_LEAST_1,
    "data.width": AT_LEAST_1,
    "data.fps": POSITIVE,
    "data.frame_interval": AT_LEAST_1,
    "data.skip_frames_start": AT_LEAST_0,
    "data.skip_frames_end": AT_LEAST_0,
    "data.flip": UP_TO_1,
    "data.window_interval": AT_LEAST_1,
    "data.template_weights": POSITIVE,
    "data.max_broken": AT_LEAST_0,
    "data.timeout": POSITIVE,
    "data.val_fraction": SHARE,
    "data.num_labels": AT_LEAST_0,
    "data.latent_window": AT_LEAST_1,
    "data.workers": AT_LEAST_0,
    "lora.rank": AT_LEAST_1,
    "lora.alpha": POSITIVE,
    "lora.dropout": SHARE,
    "sampler.steps": AT_LEAST_1,
    "sampler.guidance_scale": AT_LEAST_0,
    "sampler.eta": UP_TO_1,
    "sampler.temperature": AT_LEAST_0,
    "sampler.top_k": AT_LEAST_0,
    "sampler.top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "optim.lr": POSITIVE,  # 0 trains nothing and says so nowhere
    "optim.betas": SHARE,
    "optim.eps": POSITIVE,
    "optim.weight_decay": AT_LEAST_0,
    "optim.muon_lr": POSITIVE,
    "optim.warmup_steps": AT_LEAST_0,
    "optim.final_lr": {"minimum": 0, "maximum": 1},
    "optim.max_grad_norm": AT_LEAST_0,
    "optim.max_bad_steps": AT_LEAST_1,
    "parallel.shard": AT_LEAST_0,
    "parallel.replicate": AT_LEAST_0,
    "parallel.context": AT_LEAST_1,
    "parallel.timeout": POSITIVE,
    "parallel.stall": AT_LEAST_0,
}
"""By the field's path. A network's and an objective's own limits are in their ``__post_init__``."""

_TESTS = {
    "minimum": (operator.ge, "at least"),
    "exclusiveMinimum": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
    "exclusiveMaximum": (operator.lt, "below"),
}


def out_of_limits(recipe: Any) -> Iterator[str]:
    """A line for every number of a recipe that LIMITS forbids."""
    for path, limits in LIMITS.items():
        value: Any = recipe
        for name in path.split("."):
            value = getattr(value, name, None)  # None where the part is absent
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(_TESTS[rule][0](number, bound) for number in numbers for rule, bound in limits.items()):
            allowed = " and ".join(f"{_TESTS[rule][1]} {bound:g}" for rule, bound in limits.items())
            yield f"recipe.{path}: must be {allowed}, got {value}"
