"""Whether a LoRA learns: one captioned clip, over-fitted by `train`, exported, and drawn by a fresh diffusers pipeline.

    python -m benchmarks.overfit_lora [--steps 1500] [--vae-steps 300] [--out FOLDER]

The checkpoint is the tiny one with CogVideoX-2b's layout, whose weights are random, and random weights of an
autoencoder bring back no clip. So that one is first trained, whole, to reconstruct this clip; the transformer is left
at random, frozen, under adapters on all of its linear layers. What is reported is the PSNR of the drawn frames to the
clip itself, to what the autoencoder makes of it, which is the most that can be reached, and what the pipeline draws
without the adapter. It shows that the path from clip to adapter to pipeline loses nothing, and nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from mutoscope.checkpoints import open_checkpoint
from mutoscope.data.video import write_video
from mutoscope.export import export_run
from mutoscope.models.cogvideox import CogVideoX
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Data, Lora, Optim, Recipe
from mutoscope.recipes.cogvideox import t2v_lora_tiny
from mutoscope.training.loop import train
from mutoscope.weights import save_weights

BASE, PROMPT, GOAL = "tiny://cogvideox-2b", "a square glides to the right", 25.0
FRAMES, HEIGHT, WIDTH = 9, 32, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        overfit(options.out or Path(folder), options.steps, options.vae_steps)


def overfit(folder: Path, steps: int, vae_steps: int) -> float:
    """The PSNR in dB of what the exported adapter draws to the clip; prints it and what it is to be held against."""
    start = time.process_time()
    video = clip()
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):  # one to train on, and one that is held out, unused
        write_video(folder / f"clips/{name}.mp4", video, 8, lossless=True)
        (folder / f"clips/{name}.txt").write_text(PROMPT)
    reconstruction = make_checkpoint(folder / "checkpoint", video, vae_steps)
    run = train(recipe(folder, steps), folder / "run")
    exported = export_run(run, "diffusers")
    without = draw(folder / "checkpoint", None)
    drawn = draw(folder / "checkpoint", exported.path)
    rows = {
        "the autoencoder alone, to the clip": psnr(reconstruction, video),
        "drawn without the adapter, to the clip": psnr(without, video),
        "each frame's mean colour, to the clip": psnr(video, 0 * video + video.mean((1, 2), keepdims=True)),
        "drawn with the adapter, to the autoencoder's clip": psnr(drawn, reconstruction),
        "drawn with the adapter, to the clip": psnr(drawn, video),
    }
    for name, value in rows.items():
        print(f"{name:50} {value:6.2f} dB")
    result = rows["drawn with the adapter, to the clip"]
    print(
        f"overfit_lora: {result:.2f} dB of {GOAL:g} wanted ({steps} steps, {time.process_time() - start:.0f} s of CPU)"
    )
    return result


def clip() -> UInt8[np.ndarray, "t h w 3"]:
    """A square on a shaded ground, moving by two pixels a frame."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    frames[..., 2] = 60 + 2 * x
    frames[..., 1] = 40 + 2 * y
    for t in range(FRAMES):
        frames[t, 10:22, 4 + 2 * t : 16 + 2 * t] = (230, 200, 40)
    return frames


def recipe(folder: Path, steps: int) -> Recipe:
    """cogvideox.t2v_lora_tiny on the one clip, with more adapters."""
    base = t2v_lora_tiny()
    assert isinstance(base.objective, Diffusion)
    return replace(
        base,
        data=Data(root=str(folder / "clips"), frames=FRAMES, height=HEIGHT, width=WIDTH, fps=8.0, cache=True),
        model=CogVideoX(path=str(folder / "checkpoint"), weights="fp32"),
        lora=Lora(rank=16, alpha=32.0, targets="."),
        objective=replace(base.objective, cond_dropout=0.0),
        optim=Optim(lr=1e-2, schedule="cosine", final_lr=0.02, warmup_steps=20),
        activation_checkpointing=False,
        steps=steps,
        batch_size=4,
        log_every=100,
        validate_every=0,
        save_every=steps,
    )  # fmt: skip


def make_checkpoint(folder: Path, video: UInt8[np.ndarray, "t h w 3"], steps: int) -> UInt8[np.ndarray, "t h w 3"]:
    """The tiny checkpoint with an autoencoder that has learned the clip; returns what that makes of it."""
    from diffusers import AutoencoderKLCogVideoX

    shutil.copytree(open_checkpoint(BASE), folder)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    for step in range(steps):
        posterior = vae.encode(x).latent_dist
        loss = (vae.decode(posterior.sample()).sample - x).square().mean() + 1e-5 * posterior.kl().mean() / x.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"autoencoder, step {step}: {-10 * np.log10(loss.item() / 4):.1f} dB", flush=True)
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mean
        decoded = vae.decode(latents).sample
    save_weights(folder / "vae/diffusion_pytorch_model.safetensors", vae.state_dict())
    config = json.loads((folder / "vae/config.json").read_text())
    config["scaling_factor"] = 1 / float(latents.std())  # as the published ones' was found
    (folder / "vae/config.json").write_text(json.dumps(config))
    return ((decoded[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def draw(checkpoint: Path, adapter: Path | None) -> UInt8[np.ndarray, "t h w 3"]:
    """What diffusers' own pipeline draws, with nothing of ours in it."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_lora_weights(adapter)
    frames = pipe(
        PROMPT, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=50, guidance_scale=1.0,
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames[0]  # fmt: skip
    return (255 * frames).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, over all pixels of all frames."""
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean()))


if __name__ == "__main__":
    main()
