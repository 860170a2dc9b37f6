"""DALLE2-video: from captions to videos by way of CLIP's embeddings (https://github.com/SeanNobel/DALLE2-video).

So far there is its first stage, the contrastive model of videos and captions.
"""

from __future__ import annotations

from dataclasses import replace

from mutoscope.models.clip import Clip
from mutoscope.objectives.contrastive import Contrastive
from mutoscope.recipe import Data, Optim, Recipe
from mutoscope.text.encoders import HashedWords


def clip() -> Recipe:
    """Videos and captions into one space, at the sizes of DALLE2-video, for CelebV-Text.

    Source: DALLE2-video, train_clip.py and configs/celebv-text.yaml: 5 seconds of 224×224, patches of 56×56, width and
    embedding 512, 2 blocks within frames and 2 along time, batches of 64, Adam at 1e-3, 500 epochs of 16,000 clips.
    The text tower there is OpenAI's ViT-B/32, frozen; here it is trained from scratch beside the other, over words
    that are fixed random vectors, and sentences of 160 words are not cut. The temperature is learned (there it is a
    constant, 1/148). 6 frames a second are taken in place of 30, of which neighbours hardly differ, and the mean over
    a frame's tokens in place of its first. The learning rate falls along a cosine, after a warm-up.
    Command: mutoscope train dalle2_video.clip --data.root data/celebv_text --out runs/clip
        mutoscope evaluate runs/clip
    Hardware and time: a GPU; not timed.
    Expected result: DALLE2-video published no figures.
    Status: untested
    """
    return Recipe(
        data=Data(root="data/celebv_text", frames=30, height=224, width=224, fps=6.0, workers=8),
        text=HashedWords(width=512, max_length=160),
        model=Clip(text_depth=6),
        objective=Contrastive(),
        optim=Optim(lr=1e-3, warmup_steps=2000, schedule="cosine"),
        steps=125_000,
        batch_size=64,
        precision="bf16",
        validate_every=1000,
        sample_every=0,
        save_every=1000,
    )


def clip_tiny() -> Recipe:
    """The same in minutes on a CPU core, for flying digits: 8×32×32 pixels in tubelets of 2×8×8.

    Source: dalle2_video.clip with all sizes cut down.
    Command: mutoscope train dalle2_video.clip_tiny --out runs/clip_tiny
        mutoscope evaluate runs/clip_tiny
    Hardware and time: a core of an Intel Xeon, 2 min 20 s.
    Expected result: among 400 val clips 83 % of captions find their video first and 98 % among the first 5; 82 % and
    98 % the other way round (2026-11-29).
    Status: verified
    """
    return replace(
        clip(),
        data=Data(root="flying-mnist://demo", frames=8, height=32, width=32, cache=True),
        text=HashedWords(width=64, max_length=8),
        model=Clip(width=96, heads=4, text_depth=1, patch=(2, 8, 8), embedding=64),
        optim=Optim(lr=2e-3, warmup_steps=50, schedule="cosine"),
        precision="fp32",
        steps=800,
        batch_size=64,
        log_every=50,
        validate_every=100,
        save_every=200,
    )
