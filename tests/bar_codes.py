"""Numbers in the pixels of frames, which survive lossy coding and can be read back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BITS = 10


def painted(numbers: int | Sequence[int], height: int = 32, width: int = 80) -> np.ndarray:
    """Frames (uint8, n × height × width × 3) with their numbers, or those up to a count, as a bar code: black and white
    columns, lowest bit on the left; below them the same inverted."""
    numbers = np.arange(numbers) if isinstance(numbers, int) else np.asarray(numbers)
    bits = numbers[:, None] >> np.arange(BITS) & 1
    columns = bits[:, np.arange(width) * BITS // width].astype(bool)
    lower = np.arange(height) >= height // 2
    return np.repeat(((columns[:, None] ^ lower[:, None]) * np.uint8(255))[..., None], 3, axis=-1)


def number_of(frame: np.ndarray) -> int | None:
    """The number painted on a frame; None where it can't be read without doubt."""
    height, width = frame.shape[:2]
    centres = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    upper, lower = (frame[row][centres].mean(-1) for row in (height // 4, (3 * height) // 4))
    if (np.abs(upper - lower) < 128).any():
        return None
    return int(((upper > lower) << np.arange(BITS)).sum())


def numbers_of(frames: np.ndarray) -> list[int | None]:
    """The numbers painted on frames."""
    return [number_of(frame) for frame in frames]
