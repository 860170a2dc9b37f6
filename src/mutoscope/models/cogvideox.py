"""CogVideoX (arXiv:2408.06072): the pretrained transformer of text to video and image to video, 1.0 and 1.5.

The network is diffusers', so that weights, adapters and exports are everyone's. The way through it is ours: positions
are worked out once for each size, on the device, outside whatever is compiled (diffusers' forward makes those of the 2b
model anew in every pass at any size but its own), exactly as diffusers' pipelines have them, and at any size.

    1.0    patches of 1 × 2 × 2 latents. RoPE stretched from the native grid; the 2b model adds sinusoids instead, and
           5b-I2V adds a learned table besides, which fits its native size alone: at others it is left out, which
           the authors found to be without effect (huggingface/finetrainers#26).
    1.5    patches of 2 × 2 × 2, so that an even number of latents is needed (`Diffusion.temporal_patch`); RoPE in
           plain steps; image to video has an embedding of `ofs`, always 2.

Attention is over text and video together, with no mask: all positions of the text take part, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mutoscope.autoencoders.cogvideox import FRAME_STEP
from mutoscope.checkpoints import load_part, part_config, scheduler_fields
from mutoscope.known_checkpoints import Config
from mutoscope.models.cogvideox_context import share_transformer
from mutoscope.models.ulysses import ContextGroup
from mutoscope.recipe import ModelConfig, Recipe
from mutoscope.types import DTYPES, Cond, LatentSpec, ModelIO

Grid = tuple[int, int, int]
"""(t, h, w)"""
LATENTS = LatentSpec(strides=(4, 8, 8), channels=16, first_frame_alone=True)
"""How the latents of all CogVideoX lie over a clip."""
OFS = 2.0
"""What 1.5-I2V's second time embedding is given."""


@dataclass(frozen=True, kw_only=True)
class CogVideoX(ModelConfig):
    """A pretrained CogVideoX transformer."""

    native_precision: ClassVar[bool] = True
    path: str
    """The checkpoint: a folder in diffusers' format, a Hub id such as THUDM/CogVideoX-5b, or tiny://NAME."""
    task: Literal["t2v", "i2v"] = "t2v"
    """Text to video or image to video: which of the two the checkpoint must be for."""
    weights: Literal["bf16", "fp32"] = "bf16"
    """Precision that the weights are kept in and, without autocast, the network runs in."""

    def build(self, io: ModelIO) -> CogVideoXModel:
        """The network with its pretrained weights; without them, from the checkpoint's config.json alone, under
        FakeTensorMode or with meta as the default device.

        Raises ValueError where checkpoint, task, latents, captions and sizes do not go together, and as `load_part`.
        """
        config = part_config(self.path, "transformer")
        self._check(config, io)
        for grid in (io.grid, *io.more_grids):
            check_shape(config, *LATENTS.pixel_shape(*grid))
        return CogVideoXModel(load_part(self.path, "transformer", DTYPES[self.weights]), io)

    def complete(self, recipe: Recipe) -> Recipe:
        """Text encoder and autoencoder of the same checkpoint where the recipe leaves their paths empty; always the
        checkpoint's own noise schedule (that of another is a silent error) and, for image to video, the first frame.

        Raises ValueError for sizes that the model does not take, before any clip is looked at.
        """
        from mutoscope.objectives.diffusion import Diffusion
        from mutoscope.text.t5 import T5

        config = part_config(self.path, "transformer")
        for bucket in recipe.data.shapes(recipe.batch_size):
            check_shape(config, bucket.frames, bucket.height, bucket.width)
        if isinstance(recipe.objective, Diffusion):
            recipe = replace(recipe, objective=replace(recipe.objective, **scheduler_fields(self.path)))
        if isinstance(recipe.text, T5) and not recipe.text.path:
            recipe = replace(recipe, text=replace(recipe.text, path=self.path))
        if recipe.autoencoder is not None and not recipe.autoencoder.path:
            recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, path=self.path))
        return replace(recipe, first_frame=self.task == "i2v")

    def _check(self, config: Config, io: ModelIO) -> None:
        task = "i2v" if config["in_channels"] == 2 * config["out_channels"] else "t2v"
        if task != self.task:
            names = {"t2v": "text to video", "i2v": "image to video"}
            raise ValueError(f"model.path={self.path}: this checkpoint is for {names[task]}, the recipe for "
                             f"{names[self.task]}; take a checkpoint such as THUDM/CogVideoX-5b"
                             f"{'-I2V' if self.task == 'i2v' else ''}, or a recipe cogvideox.{task}_*")  # fmt: skip
        if io.channels != config["out_channels"] or io.vocab is not None:
            raise ValueError(f"model.path={self.path}: takes latents of {config['out_channels']} channels, those of "
                             f"its own autoencoder; the recipe's autoencoder has {io.channels}")  # fmt: skip
        if io.out_channels not in (None, io.channels):
            raise ValueError(f"model.path={self.path}: predicts no variance; set objective.learned_variance = false")
        if io.text_dim != config["text_embed_dim"]:
            raise ValueError(f"model.path={self.path}: takes text embeddings of width {config['text_embed_dim']}, "
                             f"those of its own text encoder; the recipe's text has {io.text_dim}")  # fmt: skip


def check_shape(config: Config, frames: int, height: int, width: int) -> None:
    """Whether a transformer of this configuration takes clips of this size in pixels.

    Frames must be 8·n + 1, also for 1.5, which was trained on 16·n + 1 (whole seconds); height and width multiples of
    16. Raises ValueError naming the nearest sizes that are taken.
    """
    trained = " CogVideoX 1.5 was trained on 16·n + 1." if config["patch_size_t"] else ""
    step = LATENTS.strides[1] * config["patch_size"]
    for name, size, multiple, extra in (
        ("frames", frames, FRAME_STEP, 1),
        ("height", height, step, 0),
        ("width", width, step, 0),
    ):
        if size < 1 or (size - extra) % multiple:
            below = max((size - extra) // multiple * multiple + extra, extra or multiple)
            rule = f"{multiple}·n + 1" if extra else f"a multiple of {multiple}"
            raise ValueError(f"{name}={size} does not fit CogVideoX: it must be {rule} "
                             f"(nearest: {below} or {below + multiple}).{trained if extra else ''}")  # fmt: skip


class CogVideoXModel(nn.Module):
    """Noisy latents (B, c, t, h, w), times 0 … 999 (B,), Cond -> the prediction v (B, c, t, h, w)."""

    learned_positions: bool
    """Whether the learned table of positions is in use: always where the checkpoint has one and all sizes that the
    recipe trains at are its own. An adapter's metadata must tell, so that it is sampled as it was trained."""
    compiled_blocks: bool = False
    """Whether the blocks are compiled: set by whoever does that."""

    def __init__(self, transformer: Any, io: ModelIO) -> None:
        """transformer: diffusers' CogVideoXTransformer3DModel."""
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self.native: Grid = (
            (config.sample_frames - 1) // config.temporal_compression_ratio + 1,
            config.sample_height,
            config.sample_width,
        )
        self.temporal_patch: int = config.patch_size_t or 1
        t, h, w = io.grid
        self.grid = self._tokens((t + -t % self.temporal_patch, h, w))
        self.is_image_to_video: bool = config.in_channels != config.out_channels
        self.learned_positions = config.use_learned_positional_embeddings and all(
            grid == self.native for grid in (io.grid, *io.more_grids)
        )
        if config.use_learned_positional_embeddings and not self.learned_positions:
            _drop_learned_positions(transformer)
        if not config.use_rotary_positional_embeddings:  # diffusers has it in fp64, a quarter of a gigabyte
            embed = transformer.patch_embed
            embed.pos_embedding = embed.pos_embedding.to(self._dtype)
        self._positions: dict[tuple[Grid, torch.device, torch.dtype], tuple[Tensor, Tensor] | Tensor] = {}

    @property
    def blocks(self) -> nn.ModuleList:
        """The unit of checkpointing, compilation and offload."""
        return self.transformer.transformer_blocks

    def share_sequence(self, group: ContextGroup) -> None:
        """See `ulysses.share_sequence`."""
        share_transformer(self.transformer, group)

    @property
    def _dtype(self) -> torch.dtype:
        """That the network runs in: of weights that nobody quantises or wraps."""
        return self.transformer.norm_final.weight.dtype

    def forward(
        self, x: Float[Tensor, "b c t h w"], time: Float[Tensor, "b"], cond: Cond
    ) -> Float[Tensor, "b c t h w"]:
        """Raises ValueError for sizes that patches do not divide, captions of another length than the checkpoint's,
        and known frames where the model takes none, or none where it needs them."""
        net, grid = self.transformer, self._tokens((x.shape[2], x.shape[3], x.shape[4]))
        dtype = self._dtype
        text = self._text(cond)
        video = self._with_known(x, cond)

        # 1. Time, and what 1.5's image to video has besides
        c = net.time_embedding(net.time_proj(time).to(dtype))
        if net.ofs_embedding is not None:
            c = c + net.ofs_embedding(net.ofs_proj(time.new_full((1,), OFS)).to(dtype))

        # 2. Patches and positions
        text = net.patch_embed.text_proj(text.to(dtype))
        tokens = self._patchify(video.to(dtype))
        if (added := self._added(grid, tokens)) is not None:
            tokens = tokens + added
        rotary = self._cached(grid, tokens, self._rotary) if net.config.use_rotary_positional_embeddings else None

        # 3. Blocks. Below an adapter's first weights nothing has a gradient; were that so of the first block's input,
        # it would be compiled by itself
        if self.compiled_blocks and torch.is_grad_enabled():
            tokens, text = (y.requires_grad_() if y.is_leaf else y for y in (tokens, text))
        for block in self.blocks:
            tokens, text = block(
                hidden_states=tokens, encoder_hidden_states=text, temb=c, image_rotary_emb=rotary, attention_kwargs=None
            )

        # 4. Prediction
        out = net.proj_out(net.norm_out(net.norm_final(tokens), temb=c))
        return self._unpatchify(out, grid).to(x.dtype)

    def _text(self, cond: Cond) -> Tensor:
        length = self.transformer.config.max_text_seq_length
        if cond.text is None or cond.text.shape[1] != length:
            found = "none" if cond.text is None else f"{cond.text.shape[1]} tokens"
            raise ValueError(f"CogVideoX takes captions of {length} tokens, padded, and got {found}; the recipe's text "
                             "must be this checkpoint's T5")  # fmt: skip
        return cond.text

    def _with_known(self, x: Tensor, cond: Cond) -> Tensor:
        if cond.known_mask is not None:
            raise ValueError("CogVideoX has one time for all frames, and takes none that are given in place of noise; "
                             "set objective.prefix_share = 0")  # fmt: skip
        if not self.is_image_to_video:
            if cond.known is not None:
                raise ValueError("this CogVideoX is for text to video and was given an image (cond.known); take one "
                                 "for image to video, such as THUDM/CogVideoX-5b-I2V")  # fmt: skip
            return x
        if cond.known is None:
            raise ValueError("this CogVideoX is for image to video and was given no image: cond.known is missing")
        if cond.known.shape != x.shape:
            raise ValueError(f"known latents of shape {tuple(cond.known.shape)} for a video of {tuple(x.shape)}")
        return torch.cat([x, cond.known], 1)

    def _tokens(self, latents: Grid) -> Grid:
        """Latents along t, h and w -> tokens."""
        patch, (t, h, w) = self.transformer.config.patch_size, latents
        if t % self.temporal_patch:
            raise ValueError(f"{t} latents along time: this CogVideoX takes {self.temporal_patch} together; set "
                             f"objective.temporal_patch = {self.temporal_patch}, which completes them")  # fmt: skip
        if h % patch or w % patch:
            raise ValueError(f"{h} × {w} latents: this CogVideoX takes patches of {patch} × {patch}")
        return t // self.temporal_patch, h // patch, w // patch

    # ---- positions

    def _added(self, grid: Grid, tokens: Tensor) -> Tensor | None:
        """What is added to the tokens: the 2b model's sinusoids, or the learned table where it fits. Text has none."""
        config = self.transformer.config
        if config.use_rotary_positional_embeddings and not self.learned_positions:
            return None
        if grid == self._tokens(self.native):
            return self.transformer.patch_embed.pos_embedding[:, config.max_text_seq_length :].to(tokens.dtype)
        return None if self.learned_positions else self._cached(grid, tokens, self._sinusoids)

    def _cached(self, grid: Grid, like: Tensor, make: Any) -> Any:
        """The positions of this grid, in the dtype and on the device of the tokens."""
        key = (grid, like.device, like.dtype)
        if key not in self._positions:
            self._positions[key] = make(grid, like)
        return self._positions[key]

    @torch.no_grad()
    def _sinusoids(self, grid: Grid, like: Tensor) -> Float[Tensor, "1 n d"]:
        """Of the 2b model, one for each token."""
        from diffusers.models.embeddings import get_3d_sincos_pos_embed

        config, (t, h, w) = self.transformer.config, grid
        positions = get_3d_sincos_pos_embed(
            like.shape[-1], (w, h), t, config.spatial_interpolation_scale, config.temporal_interpolation_scale,
            device=like.device, output_type="pt",
        )  # fmt: skip
        return positions.flatten(0, 1)[None].to(like.dtype)

    @torch.no_grad()
    def _rotary(self, grid: Grid, like: Tensor) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
        """(cos, sin) of RoPE, one for each token, fp32 whatever the network's dtype."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        config, (t, h, w) = self.transformer.config, grid
        p = config.patch_size
        cos, sin = get_3d_rotary_pos_embed(
            config.attention_head_dim,
            crops_coords=_crop(h, w, config.sample_height // p, config.sample_width // p),
            grid_size=(h, w),
            temporal_size=t,
            grid_type="slice" if config.patch_size_t else "linspace",
            max_size=(h, w),
            device=like.device,
        )
        return cos, sin

    # ---- patches

    def _patchify(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b n d"]:
        embed, config = self.transformer.patch_embed, self.transformer.config
        p, x = config.patch_size, x.transpose(1, 2)
        b, t, c, h, w = x.shape
        if config.patch_size_t is None:
            return embed.proj(x.flatten(0, 1)).unflatten(0, (b, t)).flatten(3).transpose(2, 3).flatten(1, 2)
        x = x.reshape(b, t // self.temporal_patch, self.temporal_patch, c, h // p, p, w // p, p)
        # Within a patch, 1.5 has channels outermost and columns innermost
        return embed.proj(x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3))

    def _unpatchify(self, tokens: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b c t h w"]:
        p, p_t, (t, h, w) = self.transformer.config.patch_size, self.temporal_patch, grid
        x = tokens.reshape(len(tokens), t, h, w, -1, p_t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)


def _crop(h: int, w: int, base_height: int, base_width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The corners (top, left) and (bottom, right) of the part of the native grid that a grid of h × w is stretched
    over: its largest part of that shape, in the middle."""
    if h / w > base_height / base_width:
        height, width = base_height, round(base_height / h * w)
    else:
        height, width = round(base_width / w * h), base_width
    top, left = round((base_height - height) / 2), round((base_width - width) / 2)
    return (top, left), (top + height, left + width)


def _drop_learned_positions(transformer: Any) -> None:
    """Make the transformer one without learned positions, for diffusers' pipelines and exports as well."""
    embed = transformer.patch_embed
    del embed.pos_embedding
    embed.use_positional_embeddings = embed.use_learned_positional_embeddings = False
    transformer.register_to_config(use_learned_positional_embeddings=False)
