"""Suggested shapes are ones that the model can take, few, and waste little."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutoscope.data.buckets import choose_bucket
from mutoscope.data.prepare.shapes import Allowed, assess, choose_shapes, to_toml
from mutoscope.recipe import Bucket
from mutoscope.toml import read_toml
from mutoscope.types import PIXELS, LatentSpec

COGVIDEOX = LatentSpec(strides=(4, 8, 8), channels=16, first_frame_alone=True)


@st.composite
def alloweds(draw: st.DrawFn) -> Allowed:
    spec = LatentSpec(
        strides=(draw(st.sampled_from([1, 4, 8])), *[draw(st.sampled_from([1, 8, 16]))] * 2),
        channels=4,
        first_frame_alone=draw(st.booleans()),
    )
    patch = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    least = spec.pixel_shape(patch[0], 1, 1)[0]
    return Allowed(
        spec=spec, patch=patch, max_frames=draw(st.integers(least, least + 200)), area=draw(st.integers(64, 10**6))
    )


def takes(allowed: Allowed, frames: int, height: int, width: int) -> bool:
    grid = allowed.spec.latent_shape(frames, height, width)
    return all(size % patch == 0 for size, patch in zip(grid, allowed.patch, strict=True))


def test_frames_golden() -> None:
    frames = lambda spec, patch=(1, 1, 1), most=20: Allowed(spec=spec, patch=patch, max_frames=most, area=1).frames()
    assert frames(COGVIDEOX) == [1, 5, 9, 13, 17]
    assert frames(COGVIDEOX, (2, 1, 1)) == [5, 13]
    assert frames(LatentSpec(strides=(4, 8, 8), channels=16)) == [4, 8, 12, 16, 20]
    assert frames(PIXELS, most=3) == [1, 2, 3]
    with pytest.raises(ValueError, match="max_frames=4: the model takes no fewer than 5 frames"):
        frames(COGVIDEOX, (2, 1, 1), 4)


def test_sizes_golden() -> None:
    def size(aspect: float, area: int) -> tuple[int, int]:
        return Allowed(spec=COGVIDEOX, patch=(1, 2, 2), max_frames=1, area=area).size(aspect)

    assert size(720 / 480, 480 * 720) == (480, 720)
    assert size(480 / 720, 480 * 720) == (720, 480)
    assert size(16 / 9, 480 * 720) == (432, 768)
    assert size(1.0, 480 * 720) == (592, 592)
    assert size(10.0, 100) == (16, 32)  # No smaller than a patch.


@given(alloweds(), st.floats(0.25, 4))
def test_sizes_are_allowed_and_near(allowed: Allowed, aspect: float) -> None:
    height, width = allowed.size(aspect)
    assert takes(allowed, allowed.frames()[0], height, width)
    unit_h, unit_w = (s * p for s, p in zip(allowed.spec.strides[1:], allowed.patch[1:], strict=True))
    unit_h, unit_w = (s * p for s, p in zip(allowed.spec.strides[1:], allowed.patch[1:], strict=True))
    assert abs(height - (allowed.area / aspect) ** 0.5) <= unit_h
    assert abs(width - (allowed.area * aspect) ** 0.5) <= unit_w


clips_strategy = st.lists(
    st.tuples(st.integers(1, 300), st.integers(16, 2000), st.integers(16, 2000)), min_size=1, max_size=40
)


@settings(max_examples=150)
@given(alloweds(), clips_strategy, st.integers(1, 5))
def test_every_bucket_is_allowed_and_every_clip_in_one(
    allowed: Allowed, clips: list[tuple[int, int, int]], num: int
) -> None:
    frames = [n for n, _, _ in clips]
    shapes = choose_shapes(np.array(frames), np.array([w / h for _, h, w in clips]), allowed, num)
    assert len(shapes) == len(set(shapes)) <= num
    for shape in shapes:
        assert takes(allowed, *shape) and shape[0] <= allowed.max_frames
        assert shape[0] <= max(frames)
    if not shapes:
        least = allowed.frames()
        assert all(n < next((f for f in least if f > 1), n + 1) and not (n == 1 and least[0] == 1) for n in frames)
        return
    buckets = [Bucket(frames=f, height=h, width=w, batch_size=1) for f, h, w in shapes]
    suggestions, left = assess(frames, [(h, w) for _, h, w in clips], buckets)
    assert sum(s.clips for s in suggestions) + left == len(clips)
    moving = [b.frames for b in buckets if b.frames > 1]
    for n, height, width in clips:
        fits = any(f <= n for f in moving) or (min(b.frames for b in buckets) == 1 and (n == 1 or not moving))
        assert fits == isinstance(choose_bucket(n, height, width, buckets, "drop"), int)
    assert all(0 <= s.cropped < 1 and 0 <= s.used <= 1 and s.enlarged <= s.clips for s in suggestions)


def share(shapes: list[tuple[int, int, int]], frames: np.ndarray, aspects: np.ndarray, most: int) -> float:
    """The mean share of clips that is used, counted from scratch."""
    total = 0.0
    for n, aspect in zip(frames.tolist(), aspects.tolist(), strict=True):
        used = [f / min(n, most) * min(w / h / aspect, aspect * h / w) for f, h, w in shapes if f <= n]
        total += max(used, default=0)
    return total / len(frames)


def test_as_good_as_trying_all() -> None:
    rng = np.random.default_rng(0)
    allowed = Allowed(spec=COGVIDEOX, patch=(1, 2, 2), max_frames=49, area=256 * 256)
    for _ in range(5):
        aspects = rng.choice([16 / 9, 4 / 3, 1.0, 9 / 16], 60)
        frames = rng.choice([9, 17, 33, 49], 60)
        shapes = [(f, *allowed.size(a)) for f in (9, 17, 33, 49) for a in (16 / 9, 4 / 3, 1.0, 9 / 16)]
        best = max(share(list(some), frames, aspects, 49) for some in itertools.combinations(shapes, 3))
        found = share(choose_shapes(frames, aspects, allowed, 3), frames, aspects, 49)
        assert found > 0.98 * best


def test_no_more_buckets_than_are_worth_it() -> None:
    allowed = Allowed(spec=COGVIDEOX, patch=(1, 2, 2), max_frames=49, area=480 * 720)
    frames, aspects = np.full(1000, 49), np.full(1000, 1.5)
    assert choose_shapes(frames, aspects, allowed, 4) == [(49, 480, 720)]
    frames[:4], aspects[5:10] = 47, 1.49  # Few clips are too short for it, and few lose a line or two.
    assert choose_shapes(frames, aspects, allowed, 4) == [(49, 480, 720)]
    frames[:300] = 25
    assert choose_shapes(frames, aspects, allowed, 4) == [(25, 480, 720), (49, 480, 720)]
    frames[:100] = 1  # Images.
    assert choose_shapes(frames, aspects, allowed, 4) == [(1, 480, 720), (25, 480, 720), (49, 480, 720)]


def test_a_hundred_thousand_clips() -> None:
    rng = np.random.default_rng(0)
    frames, aspects = rng.integers(1, 2000, 100_000), np.exp(rng.uniform(-1, 1, 100_000))
    allowed = Allowed(spec=PIXELS, max_frames=500, area=256 * 256)
    shapes = choose_shapes(frames, aspects, allowed, 4)
    assert len(shapes) == 4 and share(shapes, frames[:2000], aspects[:2000], 500) > 0.5


def test_assessment_golden() -> None:
    bucket = lambda f, h, w: Bucket(frames=f, height=h, width=w, batch_size=2)
    sizes = [(100, 200), (50, 100), (100, 100), (64, 96), (99, 99)]
    (wide, square), left = assess([20, 10, 10, 8, 7], sizes, [bucket(10, 64, 128), bucket(8, 64, 64)])
    assert (wide.clips, square.clips, left) == (2, 2, 1)
    assert (wide.cropped, wide.used, wide.enlarged) == (0, 0.75, 1)
    assert (square.cropped, square.used, square.enlarged) == (pytest.approx((0 + 1 / 3) / 2), pytest.approx(0.9), 0)


def test_toml_can_be_pasted(tmp_path: Path) -> None:
    shapes = [(49, 480, 720, 1), (9, 64, 64, 8)]
    buckets = [Bucket(frames=f, height=h, width=w, batch_size=b) for f, h, w, b in shapes]
    suggestions, _ = assess([], [], buckets)
    (tmp_path / "r.toml").write_text(to_toml(suggestions))
    read = read_toml(tmp_path / "r.toml")["data"]["buckets"]
    assert [Bucket(**one) for one in read] == buckets
