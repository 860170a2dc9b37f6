"""The flags of cogvideox-factory's scripts, and what they are called here: whoever types one is told the field.

docs/cogvideox.md has the same table, with reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

FIELDS: dict[str, tuple[str, ...]] = {
    # model
    "pretrained_model_name_or_path": ("model.path",),
    "model_id": ("model.path",),
    "revision": (),
    "variant": (),
    "cache_dir": (),
    # data
    "data_root": ("data.root",),
    "dataset_file": ("data.dataset_file",),
    "video_column": ("data.video_file", "data.video_column"),
    "caption_column": ("data.caption_file", "data.caption_columns"),
    "id_token": ("data.id_token",),
    "height_buckets": ("data.buckets", "data.height"),
    "width_buckets": ("data.buckets", "data.width"),
    "frame_buckets": ("data.buckets", "data.frames"),
    "max_num_frames": ("data.frames",),
    "load_tensors": ("data.latents",),
    "random_flip": ("data.flip",),
    "video_reshape_mode": ("data.resize",),
    "fps": ("data.fps",),
    "target_fps": ("data.fps",),
    "skip_frames_start": ("data.skip_frames_start",),
    "skip_frames_end": ("data.skip_frames_end",),
    "dataloader_num_workers": ("data.workers",),
    "num_decode_threads": ("data.workers",),
    "pin_memory": (),
    "height": ("data.height",),
    "width": ("data.width",),
    "max_sequence_length": (),
    "save_image_latents": (),
    "save_latents_and_embeddings": (),
    "num_artifact_workers": (),
    "dtype": ("autoencoder.dtype",),
    # validation
    "validation_prompt": ("validation_file",),
    "validation_images": ("validation_file",),
    "validation_prompt_separator": ("validation_file",),
    "num_validation_videos": ("validation_file",),
    "validation_epochs": ("sample_every",),
    "validation_steps": ("sample_every",),
    "guidance_scale": ("sampler.guidance_scale",),
    "use_dynamic_cfg": ("validation_file",),
    "enable_model_cpu_offload": (),
    # training
    "rank": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "mixed_precision": ("model.weights", "precision"),
    "output_dir": ("out",),
    "train_batch_size": ("batch_size",),
    "num_train_epochs": ("steps",),
    "max_train_steps": ("steps",),
    "checkpointing_steps": ("save_every",),
    "checkpoints_total_limit": ("keep_last",),
    "resume_from_checkpoint": (),
    "gradient_accumulation_steps": ("accumulate",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "learning_rate": ("optim.lr",),
    "scale_lr": (),
    "lr_scheduler": ("optim.schedule",),
    "lr_warmup_steps": ("optim.warmup_steps",),
    "lr_num_cycles": (),
    "lr_power": (),
    "enable_slicing": (),
    "use_slicing": (),
    "enable_tiling": ("autoencoder.tiling",),
    "use_tiling": ("autoencoder.tiling",),
    "noised_image_dropout": ("objective.known_dropout",),
    "ignore_learned_positional_embeddings": (),
    # optimizer
    "optimizer": ("optim.name",),
    "use_8bit": ("optim.name",),
    "use_4bit": ("optim.name",),
    "use_torchao": (),
    "beta1": ("optim.betas",),
    "beta2": ("optim.betas",),
    "beta3": (),
    "prodigy_decouple": (),
    "prodigy_use_bias_correction": (),
    "prodigy_safeguard_warmup": (),
    "weight_decay": ("optim.weight_decay",),
    "epsilon": ("optim.eps",),
    "max_grad_norm": ("optim.max_grad_norm",),
    "use_cpu_offload_optimizer": ("optim.offload",),
    "offload_gradients": ("optim.offload",),
    # the rest
    "tracker_name": ("wandb",),
    "push_to_hub": (),
    "hub_token": (),
    "hub_model_id": (),
    "logging_dir": (),
    "allow_tf32": (),
    "nccl_timeout": (),
    "report_to": ("wandb",),
}
"""The fields (`out` is the verb's option) that do what a flag did; none where there is nothing to set, for reasons in
docs/cogvideox.md. `seed` and `batch_size` are called so here, too."""

_KINDS = {
    "video_column": "{0} (a file with a video in each line, as videos.txt) or {1} (a column of a table)",
    "caption_column": "{0} (a file with a caption in each line, as prompts.txt) or {1} (columns of a table)",
}


def told(flags: Sequence[str]) -> Iterator[str]:
    """A line for each of cogvideox-factory's flags among those typed."""
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in FIELDS:
            continue
        fields = [f"--{field}" for field in FIELDS[name]]
        if fields:
            said = _KINDS.get(name, " and ".join(fields)).format(*fields)
            yield f"{flag}: a flag of cogvideox-factory's; here it is {said}"
        else:
            yield f"{flag}: a flag of cogvideox-factory's, and nothing that is set here; docs/cogvideox.md says why"
