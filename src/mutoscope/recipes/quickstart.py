"""Small enough for two CPU cores, for any folder of short clips. `mutoscope demo` trains the first two."""

from __future__ import annotations

from dataclasses import replace

from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.models.dit import DiT
from mutoscope.models.gpt import GPT
from mutoscope.models.mamba import Mamba
from mutoscope.models.sparse_context import Nearest
from mutoscope.models.sparse_gpt import SparseGPT
from mutoscope.models.stdit import STDiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.objectives.tokens import NextToken
from mutoscope.recipe import Autoencoder, Data, Optim, Recipe, Sampler, TokenSampler
from mutoscope.text.encoders import HashedWords

CLIPS = Data(root="flying-mnist://demo", frames=8, height=32, width=32, fps=8, num_labels=10)
_TINY_CLIPS = replace(CLIPS, root="flying-mnist://tiny", frames=4, height=16, width=16)


def autoencoder() -> Recipe:
    """Patch-local autoencoder of small clips: 4 × 4 × 4 pixels to 12 numbers.

    Every patch is encoded by itself, so that background is the same latent everywhere and at all times: what a
    generator need not learn. Noise on the latents while training makes the decoder forgive a generator's errors.

    Source: our own (docs/design/004-demo.md).
    Command: mutoscope train quickstart.autoencoder [--data.root DIR_OF_MP4]
    Hardware: 2 CPU cores, under half a minute.
    Status: verified
    """
    return Recipe(
        data=replace(CLIPS, cache=True),
        model=ConvAutoencoder(
            network="patch", strides=(4, 4, 4), encoder_channels=(256,), decoder_channels=(256,), latent_channels=12,
            bounded=True, latent_noise=0.1,
        ),
        objective=Reconstruction(),
        optim=Optim(lr=3e-3, schedule="cosine", warmup_steps=20),
        steps=500,
        batch_size=32,
        validate_every=250,
        sample_every=500,
        save_every=500,
    )  # fmt: skip


def dit() -> Recipe:
    """Latent diffusion transformer, conditioned on the clip's class.

    Source: DiT (arXiv:2212.09748) with joint attention over space and time, rectified flow, Muon.
    Command: mutoscope train quickstart.dit
    Hardware: 2 CPU cores, under 5 minutes.
    Status: verified
    """
    return Recipe(
        data=CLIPS,
        autoencoder=Autoencoder(path="runs/autoencoder", recipe="quickstart.autoencoder"),
        model=DiT(depth=4, width=160, heads=5, patch=(1, 1, 1), attention="joint"),
        objective=Diffusion(),
        sampler=Sampler(steps=20, guidance_scale=3.0),
        optim=Optim(name="muon", lr=3e-3, betas=(0.9, 0.99), schedule="cosine", warmup_steps=50),
        steps=2000,
        batch_size=16,
        precision="bf16",
        ema=0.995,
        log_every=50,
        validate_every=1000,
        sample_every=2000,
        save_every=1000,
    )


def stdit() -> Recipe:
    """STDiT: attention within a frame and along time in turn, conditioned on the clip's class.

    Source: Open-Sora 1.2's STDiT3, rectified flow, Muon.
    Command: mutoscope train quickstart.stdit
    Hardware: a CPU core, 13 minutes.
    Expected result: all of 200 videos show the digit asked for (docs/leaderboard.md).
    Status: verified
    """
    model = STDiT(version=3, depth=3, width=160, heads=5, patch=(1, 1, 1))
    return replace(dit(), model=model, steps=2400)


def text_to_video() -> Recipe:
    """The same transformer, conditioned on captions instead of a class.

    Source: as quickstart.dit, with cross-attention to the words.
    Command: mutoscope train quickstart.text_to_video --data.root DIR_OF_MP4_WITH_TXT
    Hardware: 2 CPU cores, 5 minutes.
    Expected result: on 4,000 clips of `mutoscope data make flying-mnist --preset demo`, all of 200 videos show the
        digit of their caption (`mutoscope evaluate`).
    Status: verified
    """
    return replace(dit(), text=HashedWords(), data=replace(CLIPS, num_labels=0))


def tokenizer() -> Recipe:
    """Patch-local autoencoder of small clips: 4 × 4 × 4 pixels to one of 1000 codes.

    As in quickstart.autoencoder, every patch is encoded by itself: all background is one code. By finite scalar
    quantisation, which has no codebook that could fall idle. A clip has 2 × 8 × 8 tokens: for a small model, few
    positions and many steps are better than sharper pixels.

    Source: FSQ (arXiv:2309.15505); the rest is our own (docs/design/006-tokens.md).
    Command: mutoscope train quickstart.tokenizer [--data.root DIR_OF_MP4]
    Hardware: a CPU core, half a minute.
    Expected result: the glyph metric reads 99 % of reconstructed val clips.
    Status: verified
    """
    return replace(
        autoencoder(),
        model=ConvAutoencoder(
            network="patch", strides=(4, 4, 4), encoder_channels=(256,), decoder_channels=(256,), latent_channels=4,
            bottleneck="fsq", fsq_levels=(8, 5, 5, 5),
        ),
    )  # fmt: skip


def gpt() -> Recipe:
    """GPT over the tokens of quickstart.tokenizer, conditioned on the clip's class.

    Source: nanoGPT's blocks with positions in t, h and w and the known neighbours of each token at its input; Muon.
    Command: mutoscope train quickstart.tokenizer --out runs/tokenizer
        mutoscope encode quickstart.gpt --out runs/tokens
        mutoscope train quickstart.gpt --data.latents runs/tokens
    Hardware: a CPU core, 12 minutes.
    Expected result: all of 200 videos show the digit asked for (docs/leaderboard.md).
    Status: verified
    """
    return Recipe(
        data=CLIPS,
        autoencoder=Autoencoder(path="runs/tokenizer", recipe="quickstart.tokenizer"),
        model=GPT(depth=4, width=128, heads=4),
        objective=NextToken(),
        sampler=TokenSampler(temperature=0.9, guidance_scale=2.0),
        optim=Optim(name="muon", lr=3e-3, betas=(0.9, 0.99), schedule="cosine", warmup_steps=30),
        steps=3900,
        batch_size=16,
        precision="bf16",
        log_every=50,
        validate_every=1300,
        sample_every=3900,
        save_every=1300,
    )


def mamba() -> Recipe:
    """Mamba-1 over the tokens of quickstart.tokenizer, conditioned on the clip's class.

    Source: arXiv:2312.00752, with positions in t, h and w and the known neighbours of each token at its input; Muon.
    Command: mutoscope train quickstart.tokenizer --out runs/tokenizer
        mutoscope encode quickstart.mamba --out runs/tokens
        mutoscope train quickstart.mamba --data.latents runs/tokens
    Hardware: a CPU core, 7 minutes.
    Expected result: 99.5 % of 200 videos show the digit asked for (docs/leaderboard.md).
    Status: verified
    """
    return replace(gpt(), model=Mamba(version=1, depth=4, width=128, state=8), steps=1250)


def mamba2() -> Recipe:
    """Mamba-2 over the tokens of quickstart.tokenizer, conditioned on the clip's class.

    Source: arXiv:2405.21060; the rest as quickstart.mamba.
    Command: mutoscope train quickstart.tokenizer --out runs/tokenizer
        mutoscope encode quickstart.mamba2 --out runs/tokens
        mutoscope train quickstart.mamba2 --data.latents runs/tokens
    Hardware: a CPU core, 7 minutes.
    Expected result: all of 200 videos show the digit asked for (docs/leaderboard.md).
    Status: verified
    """
    return replace(gpt(), model=Mamba(version=2, depth=4, width=128, state=32, head_dim=32), steps=1650)


def sparse_gpt() -> Recipe:
    """The same GPT, in which each token sees the 32 nearest known ones.

    Source: quickstart.gpt, with attention as in minisora's "mdGPT".
    Command: mutoscope train quickstart.tokenizer --out runs/tokenizer
        mutoscope encode quickstart.sparse_gpt --out runs/tokens
        mutoscope train quickstart.sparse_gpt --data.latents runs/tokens
    Hardware: a CPU core, 12 minutes.
    Expected result: 99.5 % of 200 videos show the digit asked for (docs/leaderboard.md).
    Status: verified
    """
    return replace(gpt(), model=SparseGPT(depth=4, width=128, heads=4, context=Nearest(tokens=32)), steps=3200)


def autoencoder_tiny() -> Recipe:
    """The patch-local autoencoder in seconds, on clips of 4 frames of 16×16 pixels.

    Source: quickstart.autoencoder with all sizes cut down.
    Command: mutoscope train quickstart.autoencoder_tiny
    Status: verified
    """
    return replace(
        _in_seconds(autoencoder()),
        data=_TINY_CLIPS,
        model=ConvAutoencoder(
            network="patch", strides=(2, 4, 4), encoder_channels=(16,), decoder_channels=(16,), latent_channels=4,
            bounded=True, latent_noise=0.1,
        ),
    )  # fmt: skip


def dit_tiny() -> Recipe:
    """The transformer in seconds, on pixels of clips of 4 frames of 16×16.

    Source: quickstart.dit with all sizes cut down.
    Command: mutoscope train quickstart.dit_tiny
    Status: verified
    """
    return replace(
        _in_seconds(dit()),
        data=_TINY_CLIPS,
        autoencoder=None,
        model=DiT(depth=2, width=32, heads=2, patch=(2, 4, 4), attention="joint"),
        sampler=Sampler(steps=4, guidance_scale=2.0),
    )


def stdit_tiny() -> Recipe:
    """The STDiT in seconds, on pixels of clips of 4 frames of 16×16.

    Source: quickstart.stdit with all sizes cut down.
    Command: mutoscope train quickstart.stdit_tiny
    Status: verified
    """
    return replace(dit_tiny(), model=STDiT(version=3, depth=1, width=32, heads=2, patch=(1, 4, 4)))


def text_to_video_tiny() -> Recipe:
    """The same, conditioned on captions.

    Source: quickstart.text_to_video with all sizes cut down.
    Command: mutoscope train quickstart.text_to_video_tiny
    Status: verified
    """
    return replace(dit_tiny(), text=HashedWords(width=16, max_length=8), data=replace(_TINY_CLIPS, num_labels=0))


def tokenizer_tiny() -> Recipe:
    """The patch-local tokenizer in seconds: clips of 4×16×16 pixels to 2×4×4 tokens of 60 codes.

    Source: quickstart.tokenizer with all sizes cut down.
    Command: mutoscope train quickstart.tokenizer_tiny
    Status: verified
    """
    return replace(
        _in_seconds(tokenizer()),
        data=_TINY_CLIPS,
        model=ConvAutoencoder(
            network="patch", strides=(2, 4, 4), encoder_channels=(16,), decoder_channels=(16,), latent_channels=3,
            bottleneck="fsq", fsq_levels=(5, 4, 3),
        ),
    )  # fmt: skip


def gpt_tiny() -> Recipe:
    """The GPT in seconds, on the tokens of quickstart.tokenizer_tiny, trained or not.

    Source: quickstart.gpt with all sizes cut down.
    Command: mutoscope train quickstart.gpt_tiny
    Status: verified
    """
    return replace(
        _in_seconds(gpt()),
        data=_TINY_CLIPS,
        autoencoder=Autoencoder(path="untrained://", recipe="quickstart.tokenizer_tiny"),
        model=GPT(depth=2, width=32, heads=2),
    )


def mamba_tiny() -> Recipe:
    """Mamba-1 in seconds, on the tokens of quickstart.tokenizer_tiny, trained or not.

    Source: quickstart.mamba with all sizes cut down.
    Command: mutoscope train quickstart.mamba_tiny
    Status: verified
    """
    return replace(gpt_tiny(), model=Mamba(version=1, depth=2, width=32, state=4))


def mamba2_tiny() -> Recipe:
    """Mamba-2 in seconds, on the tokens of quickstart.tokenizer_tiny, trained or not.

    Source: quickstart.mamba2 with all sizes cut down.
    Command: mutoscope train quickstart.mamba2_tiny
    Status: verified
    """
    return replace(gpt_tiny(), model=Mamba(version=2, depth=2, width=32, state=8, head_dim=16))


def sparse_gpt_tiny() -> Recipe:
    """The sparse GPT in seconds, on the tokens of quickstart.tokenizer_tiny, trained or not.

    Source: quickstart.sparse_gpt with all sizes cut down.
    Command: mutoscope train quickstart.sparse_gpt_tiny
    Status: verified
    """
    return replace(gpt_tiny(), model=SparseGPT(depth=2, width=32, heads=2, context=Nearest(tokens=8)))


def _in_seconds(recipe: Recipe) -> Recipe:
    return replace(
        recipe, steps=20, batch_size=4, log_every=5, validate_every=10, sample_every=10, save_every=10, num_samples=4
    )
