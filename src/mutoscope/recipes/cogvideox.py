"""cogvideox: fine-tuning CogVideoX (arXiv:2408.06072), text to video and image to video, by adapters or whole.

`--model.path` names the checkpoint, a folder in diffusers' format or a Hub id: THUDM/CogVideoX-2b, THUDM/CogVideoX-5b,
THUDM/CogVideoX-5b-I2V, THUDM/CogVideoX1.5-5B, THUDM/CogVideoX1.5-5B-I2V. Text encoder, autoencoder and noise schedule
are its own. CogVideoX 1.0 wants 8·n + 1 frames (49) of 480×720 at 8 per second, 1.5 16·n + 1 (81) of 768×1360 at 16.

Encode once, then train from the store: neither the text encoder nor, for text to video, the autoencoder is in memory.

    mutoscope encode cogvideox.t2v_lora --data.root clips --out runs/latents
    mutoscope train cogvideox.t2v_lora --data.root clips --data.latents runs/latents --out runs/lora
"""

from __future__ import annotations

from dataclasses import replace

from mutoscope.models.cogvideox import CogVideoX
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.recipe import Autoencoder, Data, Lora, Optim, Recipe, Sampler
from mutoscope.text.t5 import T5

_OBJECTIVE = Diffusion(schedule="scaled_linear", prediction="v", zero_terminal_snr=True)
_IMAGE_OBJECTIVE = replace(_OBJECTIVE, known_dropout=0.05)


def t2v_lora() -> Recipe:
    """LoRA of CogVideoX-5b, text to video, on 49 frames of 480×720.

    Source: cogvideox-factory, training/cogvideox/cogvideox_text_to_video_lora.py with rank 128, alpha 128, AdamW (0.9,
    0.95), 1e-4. There adapters were bf16 and captions never dropped; here adapters are fp32 and 10 % are dropped.
    Command: mutoscope encode cogvideox.t2v_lora --data.root clips --out runs/latents
        mutoscope train cogvideox.t2v_lora --data.root clips --data.latents runs/latents --out runs/lora
    Hardware and time: a GPU of 24 GB; not timed.
    Expected result: published recipes take 1500 to 4000 steps for 50 to 100 clips.
    Status: untested
    """
    return Recipe(
        data=Data(root="data/clips", frames=49, height=480, width=720, fps=8.0, workers=4),
        autoencoder=Autoencoder(path="", recipe=None, dtype="bf16"),
        text=T5(path=""),
        model=CogVideoX(path="THUDM/CogVideoX-5b"),
        lora=Lora(rank=128),
        objective=_OBJECTIVE,
        sampler=Sampler(method="ddim", steps=50, guidance_scale=6.0),
        optim=Optim(lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4, warmup_steps=100),
        steps=3000,
        batch_size=1,
        activation_checkpointing=True,
        validate_every=500,
        sample_every=0,
        save_every=500,
        num_samples=2,
    )


def t2v_lora_tiny() -> Recipe:
    """The LoRA in seconds on a CPU: a random CogVideoX of 88 thousand parameters, 9 frames of 32×48.

    Source: cogvideox.t2v_lora with all sizes cut down.
    Command: mutoscope train cogvideox.t2v_lora_tiny --out runs/t2v_lora_tiny
    Hardware and time: a CPU, seconds.
    Status: verified
    """
    return _tiny(t2v_lora(), CogVideoX(path="tiny://cogvideox-t2v", weights="fp32"))


def i2v_lora() -> Recipe:
    """LoRA of CogVideoX-5b-I2V, image to video, on 49 frames of 480×720.

    Source: cogvideox-factory, training/cogvideox/cogvideox_image_to_video_lora.py: the first frame is noised with
    σ = exp(N(−3, ½)) and left out for 5 % of the clips; here for each clip by itself, and also with stored latents.
    Command: mutoscope encode cogvideox.i2v_lora --data.root clips --out runs/latents
        mutoscope train cogvideox.i2v_lora --data.root clips --data.latents runs/latents --out runs/lora
    Hardware and time: a GPU of 24 GB; not timed.
    Expected result: as cogvideox.t2v_lora.
    Status: untested
    """
    return replace(
        t2v_lora(),
        model=CogVideoX(path="THUDM/CogVideoX-5b-I2V", task="i2v"),
        objective=_IMAGE_OBJECTIVE,
    )


def i2v_lora_tiny() -> Recipe:
    """The image-to-video LoRA in seconds on a CPU.

    Source: cogvideox.i2v_lora with all sizes cut down.
    Command: mutoscope train cogvideox.i2v_lora_tiny --out runs/i2v_lora_tiny
    Hardware and time: a CPU, seconds.
    Status: verified
    """
    return _tiny(i2v_lora(), CogVideoX(path="tiny://cogvideox-i2v", task="i2v", weights="fp32"))


def t2v_full() -> Recipe:
    """All weights of CogVideoX-5b, text to video, on 49 frames of 480×720.

    Source: cogvideox-factory, training/cogvideox/cogvideox_text_to_video_sft.py, 1e-5.
    Command: mutoscope encode cogvideox.t2v_full --data.root clips --out runs/latents
        mutoscope train cogvideox.t2v_full --data.root clips --data.latents runs/latents --out runs/full
    Hardware and time: a GPU of 141 GB; not timed.
    Expected result: the source published none.
    Status: untested
    """
    return replace(
        t2v_lora(),
        model=CogVideoX(path="THUDM/CogVideoX-5b", weights="fp32"),
        lora=None,
        precision="bf16",
        optim=Optim(lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4, warmup_steps=100),
    )


def t2v_full_tiny() -> Recipe:
    """All weights of a random CogVideoX in seconds on a CPU.

    Source: cogvideox.t2v_full with all sizes cut down.
    Command: mutoscope train cogvideox.t2v_full_tiny --out runs/t2v_full_tiny
    Hardware and time: a CPU, seconds.
    Status: verified
    """
    return _tiny(t2v_full(), CogVideoX(path="tiny://cogvideox-t2v", weights="fp32"))


def i2v_full() -> Recipe:
    """All weights of CogVideoX-5b-I2V, image to video, on 49 frames of 480×720.

    Source: cogvideox-factory, training/cogvideox/cogvideox_image_to_video_sft.py.
    Command: mutoscope encode cogvideox.i2v_full --data.root clips --out runs/latents
        mutoscope train cogvideox.i2v_full --data.root clips --data.latents runs/latents --out runs/full
    Hardware and time: a GPU of 141 GB; not timed.
    Expected result: the source published none.
    Status: untested
    """
    return replace(
        t2v_full(),
        model=CogVideoX(path="THUDM/CogVideoX-5b-I2V", task="i2v", weights="fp32"),
        objective=_IMAGE_OBJECTIVE,
    )


def i2v_full_tiny() -> Recipe:
    """All weights of a random image-to-video CogVideoX in seconds on a CPU.

    Source: cogvideox.i2v_full with all sizes cut down.
    Command: mutoscope train cogvideox.i2v_full_tiny --out runs/i2v_full_tiny
    Hardware and time: a CPU, seconds.
    Status: verified
    """
    return _tiny(i2v_full(), CogVideoX(path="tiny://cogvideox-i2v", task="i2v", weights="fp32"))


def _tiny(recipe: Recipe, model: CogVideoX) -> Recipe:
    return replace(
        recipe,
        data=Data(root="flying-mnist://tiny", frames=9, height=32, width=48, short="loop", cache=True),
        autoencoder=Autoencoder(path="", recipe=None),
        text=T5(path="", weights="fp32"),
        model=model,
        lora=None if recipe.lora is None else Lora(rank=4),
        sampler=Sampler(method="ddim", steps=2, guidance_scale=6.0),
        precision="fp32",
        optim=Optim(lr=1e-3),
        steps=8,
        batch_size=2,
        log_every=2,
        validate_every=4,
        sample_every=0,
        save_every=4,
    )
