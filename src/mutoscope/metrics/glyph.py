"""Which digit does a video show, and does it move as it should? For Flying MNIST clips of one digit each.

Nothing is trained, so there is no network whose blind spots a generator could hit: the brightest patch of a frame is
cut out, brought to a fixed box and compared by normalised correlation with hundreds of digits written by the same pen
(`data/digits.py`) in other hands. Shape is all that counts; colour, brightness, size and place do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor

from mutoscope.data.digits import draw_digit
from mutoscope.data.flying_mnist import Preset, plan
from mutoscope.randomness import seed_of

BOX = 20
"""Side of the box that digits are brought to, as MNIST's."""
BLUR = 0.7
"""Standard deviation, in pixels of the box, of the blur that forgives a stroke half a pixel off."""
NEIGHBOURS = 3
"""A digit's score is the mean correlation with that many of its best templates."""
DARK = 0.1
"""A frame with nothing brighter than this share of white is blank."""
NO_DIGIT = -1
"""The class of a blank frame, and of a clip of blank frames."""


@dataclass(frozen=True, kw_only=True)
class GlyphResult:
    """What `GlyphMetric.classify` sees in each clip."""

    per_frame: Int64[Tensor, "b t"]
    """Digit of each frame, or NO_DIGIT."""
    per_clip: Int64[Tensor, "b"]
    """Digit of each clip, or NO_DIGIT: the one whose scores summed over the frames are highest."""
    similarity: Float[Tensor, "b"]
    """That sum over the number of frames, blank ones included: 0.96 for real clips, 0.4 for noise, 0 for blank."""
    foreground: Bool[Tensor, "b t"]
    """Frames that are not blank."""
    displacement: Float[Tensor, "b"]
    """Mean distance in pixels that the centroid of the foreground moves from one frame to the next, over the pairs of
    which neither is blank; 0 where there is no such pair."""


class GlyphMetric:
    """The judge of clips that should look like those of one preset."""

    def __init__(self, preset: Preset, templates: int = 64) -> None:
        """Writes `templates` of each digit, over the preset's sizes. Raises ValueError for clips of several digits."""
        if preset.digits != (1, 1):
            raise ValueError(f"the glyph metric reads clips of one digit; preset {preset.name!r} has {preset.digits}")
        self.preset = preset
        low, high = preset.glyph
        drawn = np.zeros((10, templates, high + 4, high + 4), np.uint8)  # Room around the ink, as in a frame.
        for digit in range(10):
            for n in range(templates):
                size = low + n % (high - low + 1)
                glyph = draw_digit(digit, size, seed_of("template", digit, n), preset.margin)
                drawn[digit, n, 2 : 2 + size, 2 : 2 + size] = glyph
        grey = torch.from_numpy(drawn).flatten(0, 1) / 255
        self.templates = _normalised(_boxed(grey, grey > 0.5)).view(10, templates, BOX * BOX)
        paths = torch.stack([torch.from_numpy(plan(preset, "val", i)[0].positions) for i in range(500)]).float()
        self.real_displacement = _mean_step(paths, torch.ones(paths.shape[:2], dtype=torch.bool))
        """Displacement of 500 of the preset's own clips."""

    def classify(self, videos: UInt8[Tensor, "b t h w 3"] | Float[Tensor, "b t h w 3"]) -> GlyphResult:
        """The digit and the motion of each clip; bytes, or floats in [0, 1] (overshoot is clipped).

        Raises ValueError for frames of another size than the preset's, and for floats that are evidently in [-1, 1].
        """
        size = self.preset.size
        if videos.shape[2:4] != (size, size):
            raise ValueError(
                f"the glyph metric of preset {self.preset.name!r} needs frames of {size} × {size} pixels; "
                f"got {videos.shape[2]} × {videos.shape[3]}"
            )
        if videos.is_floating_point() and videos.mean() < -0.25:
            raise ValueError(f"videos must be bytes or floats in [0, 1]; their mean is {videos.mean():.2f}")
        batch = max(1, 2**22 // videos[0].numel()) if len(videos) else 1  # Bounds the memory.
        parts = [self._read(part) for part in videos.split(batch)]
        scores, centroids, foreground = (torch.cat(p) for p in zip(*parts, strict=True))
        per_frame = torch.where(foreground, scores.argmax(-1), NO_DIGIT)
        best = scores.mean(1).max(-1)
        return GlyphResult(
            per_frame=per_frame,
            per_clip=torch.where(foreground.any(1), best.indices, NO_DIGIT),
            similarity=best.values,
            foreground=foreground,
            displacement=_mean_step(centroids, foreground),
        )

    def accuracy(
        self, videos: UInt8[Tensor, "b t h w 3"] | Float[Tensor, "b t h w 3"], labels: Int[Tensor, "b"]
    ) -> dict[str, float]:
        """How well clips show the digits asked for.

        ``glyph_accuracy``: share of clips whose digit (`GlyphResult.per_clip`) is the label; ``glyph_frame_accuracy``:
        share of frames; ``glyph_similarity``: mean similarity; ``foreground``: share of frames not blank;
        ``displacement``: mean, in pixels per frame; ``motion_error``: 1-Wasserstein distance between the clips'
        displacements and those of the preset's own clips, in pixels per frame.
        """
        seen = self.classify(videos)
        labels = labels.to(seen.per_clip.device)
        at = torch.linspace(0, 1, 201)
        error = seen.displacement.cpu().quantile(at) - self.real_displacement.quantile(at)
        return {
            "glyph_accuracy": (seen.per_clip == labels).float().mean().item(),
            "glyph_frame_accuracy": (seen.per_frame == labels[:, None]).float().mean().item(),
            "glyph_similarity": seen.similarity.mean().item(),
            "foreground": seen.foreground.float().mean().item(),
            "displacement": seen.displacement.mean().item(),
            "motion_error": error.abs().mean().item(),
        }

    def _read(self, videos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (b, t, 10), centroids (b, t, 2), foreground (b, t)."""
        b, t = videos.shape[:2]
        grey = videos.amax(-1).flatten(0, 1)
        grey = grey.float().clamp(0, 1) if videos.is_floating_point() else grey.float() / 255
        grey, ink, peak = self._cut_out(grey)
        foreground = peak > DARK
        queries = _normalised(_boxed(grey, ink))
        correlation = queries @ self.templates.to(queries).flatten(0, 1).T
        scores = correlation.view(b * t, 10, -1).topk(NEIGHBOURS, -1).values.mean(-1) * foreground[:, None]
        weight = grey * ink
        mass = weight.sum((1, 2)).clamp(min=1e-6)
        pixels = torch.arange(grey.shape[1], device=grey.device, dtype=grey.dtype)
        centroids = torch.stack([weight.sum(1) @ pixels / mass, weight.sum(2) @ pixels / mass], -1)
        return scores.view(b, t, 10), centroids.view(b, t, 2), foreground.view(b, t)

    def _cut_out(self, grey: Float[Tensor, "n h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """The frames black but for the glyph-sized window with the most energy, which pixels of it are ink, and the
        brightness of the ink."""
        side, size = self.preset.glyph[1], self.preset.size
        sums = F.pad((grey**2).cumsum(1).cumsum(2), (1, 0, 1, 0))
        energy = sums[:, side:, side:] - sums[:, :-side, side:] - sums[:, side:, :-side] + sums[:, :-side, :-side]
        at = energy.flatten(1).argmax(1)
        pixels = torch.arange(size, device=grey.device)
        rows, columns = (
            (pixels >= start[:, None]) & (pixels < start[:, None] + side)
            for start in (at // energy.shape[2], at % energy.shape[2])
        )
        grey = grey * (rows[:, :, None] & columns[:, None])
        # Not the brightest pixel, which may be a speck: at least this many are ink in the thinnest digit, a 1.
        thinnest = max(1, int((self.preset.glyph[0] * (1 - 2 * self.preset.margin)) ** 2 / 40))
        peak = grey.flatten(1).topk(thinnest).values[:, -1]
        ink = grey > 0.5 * peak[:, None, None]
        company = F.avg_pool2d(ink[:, None].float(), 3, 1, 1, divisor_override=1)[:, 0]
        return grey, ink & (company >= 2), peak  # A lone pixel is a speck.


def _boxed(grey: Float[Tensor, "n h w"], ink: Bool[Tensor, "n h w"]) -> Float[Tensor, "n box box"]:
    """The square around the ink and half a pixel more, resampled to BOX × BOX by area."""
    (left, right), (top, bottom) = _extent(ink.any(1)), _extent(ink.any(2))
    side = torch.maximum(right - left, bottom - top) + 1
    rows = _area_weights((top + bottom) / 2, side, grey.shape[1])
    columns = _area_weights((left + right) / 2, side, grey.shape[2])
    return rows @ grey @ columns.mT


def _extent(hit: Bool[Tensor, "n l"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Where the True part begins and ends; all of it if nothing is True."""
    return hit.float().argmax(1).float(), hit.shape[1] - hit.flip(1).float().argmax(1).float()


def _area_weights(centre: Float[Tensor, "n"], side: Float[Tensor, "n"], length: int) -> Float[Tensor, "n box l"]:
    """For BOX cells that divide the interval: the share that each of `length` pixels has in each cell."""
    edges = (centre - side / 2)[:, None] + side[:, None] * torch.linspace(0, 1, BOX + 1, device=side.device)
    pixel = torch.arange(length, device=side.device)
    overlap = torch.minimum(edges[:, 1:, None], pixel + 1) - torch.maximum(edges[:, :-1, None], pixel)
    return overlap.clamp(min=0) * (BOX / side)[:, None, None]


def _normalised(boxes: Float[Tensor, "n box box"]) -> Float[Tensor, "n d"]:
    """Blurred, flattened, and brought to mean 0 and norm 1 (or 0, where a box is of one brightness)."""
    kernel = torch.exp(-0.5 * (torch.arange(-2, 3, device=boxes.device) / BLUR) ** 2)
    kernel = kernel / kernel.sum()
    blurred = F.conv2d(boxes[:, None], kernel[None, None, :, None] * kernel, padding=2).flatten(1)
    return F.normalize(blurred - blurred.mean(1, keepdim=True), eps=1e-6)


def _mean_step(points: Float[Tensor, "b t 2"], there: Bool[Tensor, "b t"]) -> Float[Tensor, "b"]:
    """Mean distance between points of neighbouring frames that are both there; 0 without any."""
    both = there[:, 1:] & there[:, :-1]
    return (points.diff(dim=1).norm(dim=-1) * both).sum(1) / both.sum(1).clamp(min=1)
