"""Handwriting-like digits, drawn by our own strokes: unlimited variants, no file to download and no licence to ask.

A digit is one of a few ways of writing it; a way is a list of strokes; a stroke is a Catmull-Rom curve through control
points (two strokes that share an end meet in a corner). A seed moves the control points, bends, narrows, slants and
turns the whole, and picks the width of a round pen. The ink's coverage of a pixel follows from the distance between
the pixel's centre and the curve, so that a glyph is anti-aliased at every size without supersampling.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

Point = tuple[float, float]
Stroke = tuple[Point, ...]

# x to the right, y down, both in units of the digit's height.
WAYS: tuple[tuple[tuple[Stroke, ...], ...], ...] = (
    (  # 0
        (((0.40, 0.03), (0.20, 0.05), (0.05, 0.28), (0.03, 0.62), (0.16, 0.93), (0.36, 0.98), (0.55, 0.80),
          (0.61, 0.46), (0.54, 0.16), (0.38, 0.03)),),
    ),
    (  # 1: a bare stroke, with a flag, with a flag and a foot
        (((0.32, 0.00), (0.30, 0.35), (0.29, 0.68), (0.28, 1.00)),),
        (((0.14, 0.24), (0.26, 0.13), (0.36, 0.00)), ((0.36, 0.00), (0.36, 0.50), (0.35, 1.00))),
        (((0.12, 0.23), (0.24, 0.13), (0.34, 0.00)), ((0.34, 0.00), (0.34, 0.50), (0.34, 0.98)),
         ((0.08, 0.99), (0.34, 0.98), (0.60, 0.99))),
    ),
    (  # 2: with a corner, with a loop
        (((0.05, 0.24), (0.16, 0.06), (0.36, 0.00), (0.56, 0.12), (0.56, 0.36), (0.36, 0.64), (0.04, 0.97)),
         ((0.04, 0.97), (0.34, 0.96), (0.64, 0.97))),
        (((0.05, 0.22), (0.18, 0.04), (0.38, 0.01), (0.56, 0.16), (0.52, 0.42), (0.34, 0.70), (0.12, 0.94),
          (0.01, 0.88), (0.12, 0.78), (0.34, 0.88), (0.66, 0.98)),),
    ),
    (  # 3
        (((0.05, 0.12), (0.24, 0.00), (0.48, 0.06), (0.54, 0.26), (0.42, 0.42), (0.22, 0.47)),
         ((0.22, 0.47), (0.46, 0.52), (0.60, 0.70), (0.50, 0.92), (0.26, 1.00), (0.02, 0.88))),
    ),
    (  # 4: open, closed
        (((0.12, 0.02), (0.07, 0.28), (0.04, 0.54)), ((0.04, 0.54), (0.34, 0.55), (0.66, 0.52)),
         ((0.52, 0.06), (0.50, 0.50), (0.47, 1.00))),
        (((0.46, 0.00), (0.24, 0.34), (0.01, 0.66)), ((0.01, 0.66), (0.33, 0.67), (0.66, 0.66)),
         ((0.46, 0.00), (0.46, 0.50), (0.45, 1.00))),
    ),
    (  # 5
        (((0.60, 0.00), (0.36, 0.01), (0.12, 0.03)), ((0.12, 0.03), (0.10, 0.22), (0.07, 0.46)),
         ((0.07, 0.46), (0.28, 0.38), (0.52, 0.48), (0.60, 0.70), (0.46, 0.93), (0.22, 1.00), (0.00, 0.90))),
    ),
    (  # 6
        (((0.48, 0.00), (0.26, 0.16), (0.09, 0.45), (0.04, 0.74), (0.18, 0.97), (0.42, 0.96), (0.56, 0.76),
          (0.46, 0.56), (0.24, 0.56), (0.06, 0.74)),),
    ),
    (  # 7: plain, crossed
        (((0.00, 0.04), (0.32, 0.02), (0.64, 0.00)), ((0.64, 0.00), (0.40, 0.46), (0.20, 1.00))),
        (((0.00, 0.04), (0.33, 0.02), (0.66, 0.00)), ((0.66, 0.00), (0.42, 0.46), (0.22, 1.00)),
         ((0.16, 0.53), (0.38, 0.51), (0.60, 0.50))),
    ),
    (  # 8
        (((0.52, 0.14), (0.32, 0.00), (0.10, 0.12), (0.14, 0.34), (0.34, 0.49), (0.55, 0.68), (0.52, 0.92),
          (0.28, 1.00), (0.05, 0.86), (0.10, 0.64), (0.32, 0.48), (0.50, 0.32), (0.52, 0.12)),),
    ),
    (  # 9: with a straight tail, with a bent one
        (((0.54, 0.14), (0.34, 0.00), (0.10, 0.10), (0.04, 0.32), (0.20, 0.48), (0.42, 0.40), (0.54, 0.14)),
         ((0.54, 0.14), (0.53, 0.55), (0.50, 1.00))),
        (((0.54, 0.14), (0.34, 0.00), (0.10, 0.10), (0.04, 0.32), (0.20, 0.48), (0.42, 0.40), (0.54, 0.14)),
         ((0.54, 0.14), (0.57, 0.45), (0.46, 0.84), (0.26, 1.00), (0.06, 0.95))),
    ),
)  # fmt: skip
"""The ways of writing each digit 0-9."""


def draw_digit(digit: int, size: int, seed: int, margin: float = 0.0) -> UInt8[np.ndarray, "size size"]:
    """One handwritten digit: coverage by ink, 0 to 255, on a square of `size` pixels.

    The digit keeps its aspect ratio and is centred; its longer side fills the square but for `margin`, the share of
    the square left blank on each side (MNIST: 4/28). The same seed is the same handwriting at any size.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    way = WAYS[digit][rng.integers(len(WAYS[digit]))]
    points = _bend(np.concatenate([_curve(np.array(s) + rng.normal(0, 0.015, (len(s), 2))) for s in way]), rng)
    pen = rng.uniform(0.045, 0.075)  # radius, in units of the digit's longer side
    box = size * (1 - 2 * margin)
    low, high = points.min(0), points.max(0)
    scale = box * (1 - 2 * pen) / (high - low).max()
    points = (points - (low + high) / 2) * scale + size / 2
    centres = np.arange(size, dtype=np.float64) + 0.5
    dx = (centres[:, None] - points[:, 0]) ** 2
    dy = (centres[:, None] - points[:, 1]) ** 2
    distance = np.sqrt((dy[:, None] + dx[None]).min(-1))
    return np.rint(255 * np.clip(pen * box - distance + 0.5, 0, 1)).astype(np.uint8)


def _curve(control: Float[np.ndarray, "n 2"], steps: int = 16) -> Float[np.ndarray, "m 2"]:
    """The uniform Catmull-Rom spline through the control points."""
    ends = 2 * control[[0, -1]] - control[[1, -2]]  # the missing neighbours, mirrored
    p = np.concatenate([ends[:1], control, ends[1:]])
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    t = np.linspace(0, 1, steps)[:, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve.reshape(-1, 2)


def _bend(points: Float[np.ndarray, "m 2"], rng: np.random.Generator) -> Float[np.ndarray, "m 2"]:
    """The hand: a low-frequency warp, then width, slant and rotation."""
    wave, phase = rng.uniform(0.3, 0.9, 2), rng.uniform(0, 2 * np.pi, 2)
    points = points + rng.uniform(-0.03, 0.03, 2) * np.sin(2 * np.pi * wave * points[:, ::-1] + phase)
    width, slant, angle = rng.uniform(0.85, 1.2), rng.uniform(-0.06, 0.26), rng.uniform(-0.13, 0.13)
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[width, 0], [-slant, 1]]) @ np.array([[cos, sin], [-sin, cos]])
