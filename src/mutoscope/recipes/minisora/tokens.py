"""Next-token models over the tokens of minisora's autoencoders."""

from __future__ import annotations

from dataclasses import replace

from mutoscope.models.gpt import GPT
from mutoscope.models.mamba import Mamba
from mutoscope.models.sparse_context import Nearest
from mutoscope.models.sparse_gpt import SparseGPT
from mutoscope.objectives.tokens import NextToken
from mutoscope.recipe import Autoencoder, Optim, Recipe, TokenSampler
from mutoscope.recipes.minisora import FULL, TINY
from mutoscope.text.encoders import HashedWords


def gpt() -> Recipe:
    """GPT of 8 blocks over the tokens of minisora.vqvae, in windows of 512 of a clip's 32,768.

    Source: minisora's README, train_latent_nanogpt.py --block_size 512 --batch_size 8 --gradient_accumulation_steps 4,
    with the script's --n_layer 8 --n_head 6 --n_embd 768 --dropout 0.2 --learning_rate 5e-4 --min_lr 1e-4 --beta2 0.99
    --warmup_iters 100 --max_iters 50000 (the README's 10,000,000 is "until stopped").
    The seed's model did not know where in the clip its window was; this one does, sees each token's neighbours in
    space and time, and takes captions. The seed's rate reached its end at step 5,000; here at the last step.
    `--model.positions 1d --model.neighbours False --model.qk-norm False` gives the seed's network.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
        mutoscope encode minisora.gpt --out runs/tokens
        mutoscope train minisora.gpt --data.latents runs/tokens --out runs/gpt
    Hardware and time: a GPU of 24 GB or more; not timed.
    Expected result: the seed published no figures.
    Status: untested
    """
    return Recipe(
        data=FULL,
        autoencoder=Autoencoder(path="runs/vqvae", recipe="minisora.vqvae"),
        text=HashedWords(max_length=80),
        model=GPT(depth=8, width=768, heads=6, dropout=0.2),
        objective=NextToken(window=512),
        sampler=TokenSampler(top_k=100),
        optim=Optim(
            lr=5e-4, betas=(0.9, 0.99), weight_decay=0.1, warmup_steps=100, schedule="cosine", final_lr=0.2
        ),
        steps=50_000,
        batch_size=8,
        accumulate=4,
        precision="bf16",
        validate_every=2000,
        sample_every=10_000,
        save_every=2000,
        num_samples=2,
    )  # fmt: skip


def gpt_tiny() -> Recipe:
    """The GPT in seconds on a CPU, over tokens of 8×16×16 clips: 2×4×4, in windows of 12.

    Source: minisora.gpt with all sizes cut down.
    Command: mutoscope train minisora.gpt_tiny --out runs/gpt_tiny
    Status: verified
    """
    return replace(
        gpt(),
        data=replace(TINY, frames=8, short="loop"),
        autoencoder=Autoencoder(path="untrained://", recipe="minisora.vqvae_tiny"),
        text=HashedWords(width=16, max_length=8),
        model=GPT(depth=2, width=32, heads=2, dropout=0.2),
        objective=NextToken(window=12),
        optim=Optim(lr=1e-3, warmup_steps=5),
        precision="fp32",
        steps=20,
        batch_size=4,
        accumulate=1,
        log_every=5,
        validate_every=10,
        sample_every=10,
        save_every=10,
        num_samples=4,
    )


def mamba() -> Recipe:
    """Mamba-1 of 32 blocks over the tokens of minisora.vqvae, the 32,768 of a clip as one sequence.

    Source: minisora's README, train_latent_mamba.py --n_layer 32 --n_embed 1280 --batch_size 8 --block_size 512, and
    the script's constant --learning_rate 5e-4 and --beta2 .99. There windows of 512 tokens, an eighth of a latent
    frame, began without a state and without a place, and the likeliest token was always taken; here a clip is one
    sequence, computed 2048 positions at a time, and positions and neighbours are told. It takes captions.
    `--model.version 2 --model.state 64` is Mamba-2, which needs no kernels to be fast on a GPU.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
        mutoscope encode minisora.mamba --out runs/tokens
        mutoscope train minisora.mamba --data.latents runs/tokens --out runs/mamba
    Hardware and time: a GPU with mamba_ssm (pip install "mutoscope[mamba]"); neither time nor memory were measured.
    Expected result: the seed published no figures ("quality is low").
    Status: untested
    """
    return replace(
        gpt(),
        model=Mamba(version=1, depth=32, width=1280, state=16, chunk=2048),
        objective=NextToken(),
        optim=Optim(lr=5e-4, betas=(0.9, 0.99), weight_decay=0.1, warmup_steps=100),
        batch_size=1,
        accumulate=1,
        log_every=20,
    )


def mamba_tiny() -> Recipe:
    """Mamba in seconds on a CPU, over tokens of 8×16×16 clips: 2×4×4, 12 positions at a time.

    Source: minisora.mamba with all sizes cut down.
    Command: mutoscope train minisora.mamba_tiny --out runs/mamba_tiny
    Status: verified
    """
    model = Mamba(version=1, depth=2, width=32, state=4, chunk=12)
    return replace(gpt_tiny(), model=model, objective=NextToken())


def sparse_gpt() -> Recipe:
    """GPT over all 32,768 tokens of a clip of minisora.vqvae, each sees the 128 nearest known ones.

    Source: minisora's README, train_latent_mdgpt.py --block_size 512 --sparse_block_size 512 --num_latent_frames 8
    --batch_size 8 --gradient_accumulation_steps 4 --use_1d_pos_emb --only_predict_last, with the script's other
    defaults as in minisora.gpt. (Its own --sparse_block_size is 128; 512 of a block of 512 leave nothing out.)
    There a forward pass told one token, and the command stopped at an error; here it tells all of a clip at once.
    `--model.positions 1d --objective.window 512 --objective.only-last True` is the README's way. With
    `--model.context.type mutoscope.models.sparse_context:Frames` a frame's tokens see it and all of the one before, as
    in the script at that time; `...:Strided` is train_latent_nanogpt.py's --sparse_context_window --context_stride 2
    --context_stride_start 32.
    Command: mutoscope train minisora.vqvae --out runs/vqvae
        mutoscope encode minisora.sparse_gpt --out runs/tokens
        mutoscope train minisora.sparse_gpt --data.latents runs/tokens --out runs/sparse_gpt
    Hardware and time: a GPU of 24 GB or more; not timed.
    Expected result: the seed published no figures.
    Status: untested
    """
    return replace(
        gpt(),
        model=SparseGPT(depth=8, width=768, heads=6, dropout=0.2, context=Nearest(tokens=128)),
        objective=NextToken(),
        steps=20_000,
        batch_size=1,
        accumulate=4,
        activation_checkpointing=True,
    )


def sparse_gpt_tiny() -> Recipe:
    """The sparse GPT in seconds on a CPU, over tokens of 8×16×16 clips: 2×4×4, each of which sees 6.

    Source: minisora.sparse_gpt with all sizes cut down.
    Command: mutoscope train minisora.sparse_gpt_tiny --out runs/sparse_gpt_tiny
    Status: verified
    """
    return replace(
        gpt_tiny(),
        model=SparseGPT(depth=2, width=32, heads=2, dropout=0.2, context=Nearest(tokens=6)),
        objective=NextToken(),
        activation_checkpointing=True,
    )
