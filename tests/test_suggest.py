"""Suggested buckets fit the recipe's model and the memory that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutoscope import suggest as suggest_module
from mutoscope.build import model_io
from mutoscope.contradictions import validate
from mutoscope.data.index import ClipInfo
from mutoscope.data.media import Media
from mutoscope.data.prepare.shapes import to_toml
from mutoscope.data.prepare.stats import Stats
from mutoscope.data.sources.layouts import Clip
from mutoscope.estimate.step import estimate
from mutoscope.loading import load_recipe
from mutoscope.recipe import Bucket, Recipe
from mutoscope.suggest import constraints, largest_batch, parse_area, parse_memory, parse_rule, suggest
from mutoscope.types import PIXELS, LatentSpec


def stats_of(*kinds: tuple[int, int, int, int]) -> Stats:
    """(how many, frames, height, width) of each kind, at 10 frames per second."""
    infos = [
        ClipInfo(frames=f, fps=10, height=h, width=w, duration=f / 10, rotation=0, image=False)
        for number, f, h, w in kinds
        for _ in range(number)
    ]
    clips = [Clip(id=str(n), media=Media(f"{n}.mp4"), split="train") for n in range(len(infos))]
    return Stats(root="clips", clips=clips, infos=infos, broken=[], motion={})


MANY = stats_of((50, 16, 64, 64), (30, 9, 48, 64), (20, 40, 64, 48), (5, 1, 64, 64))


def test_without_a_recipe() -> None:
    advice = suggest(MANY, spec=parse_rule("4n+1", 16), progress=False)
    shapes = [(s.bucket.frames, s.bucket.height, s.bucket.width, s.bucket.batch_size) for s in advice.suggestions]
    assert shapes == [(1, 64, 64, 1), (9, 48, 64, 1), (13, 64, 48, 1), (13, 64, 64, 1)]
    assert [s.clips for s in advice.suggestions] == [5, 30, 20, 50] and advice.too_short == 0 and advice.clips == 105
    assert advice.allowed.max_frames == 16 and advice.allowed.area == 64 * 64  # Those of the median clip.
    longer = suggest(MANY, spec=parse_rule("4n+1", 16), max_frames=40, area=32 * 32, num_buckets=3, progress=False)
    assert [(s.bucket.frames, s.bucket.height) for s in longer.suggestions] == [(9, 32), (13, 32), (37, 32)]
    assert longer.too_short == 5


@pytest.mark.parametrize("name", ["minisora.dit_tiny", "quickstart.dit_tiny", "minisora.vae_tiny"])
def test_shapes_fit_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    advice = suggest(MANY, recipe, progress=False)
    assert 1 <= len(advice.suggestions) <= 4
    buckets = tuple(s.bucket for s in advice.suggestions)
    assert all(b.batch_size == recipe.batch_size and b.frames <= recipe.data.frames for b in buckets)
    for b in buckets:
        data = replace(recipe.data, frames=b.frames, height=b.height, width=b.width)
        recipe.model.build(model_io(replace(recipe, data=data)))  # Raises where it does not fit.
    validate(replace(recipe, data=replace(recipe.data, buckets=buckets)))
    assert to_toml(advice.suggestions).startswith("[data]\nbuckets = [")


def test_frames_are_counted_as_the_recipe_takes_them() -> None:
    recipe = load_recipe("quickstart.dit_tiny")
    assert (recipe.data.fps, recipe.data.frames) == (8, 4)
    clips = stats_of((10, 2, 64, 64), (10, 5, 64, 64))  # 2 and 4 frames at 8 per second
    advice = suggest(clips, recipe, progress=False)
    assert [(s.bucket.frames, s.clips, s.used) for s in advice.suggestions] == [(2, 10, 1.0), (4, 10, 1.0)]
    sparse = replace(recipe, data=replace(recipe.data, frame_interval=2))
    advice = suggest(clips, sparse, progress=False)
    assert [(s.bucket.frames, s.clips, s.used) for s in advice.suggestions] == [(2, 10, 1.0)] and advice.too_short == 10
    with pytest.raises(ValueError, match=r"clips: no buckets .* at least 2 frames .* longest of 3 clips has 1"):
        suggest(stats_of((3, 1, 64, 64)), recipe, progress=False)


def test_constraints() -> None:
    assert constraints(load_recipe("minisora.dit")) == (LatentSpec(strides=(4, 4, 4), channels=4), (1, 2, 2))
    # An autoencoder's own strides, though nothing comes before it; and a model of pixels.
    assert constraints(load_recipe("minisora.vae"))[0].strides == (4, 4, 4)
    assert constraints(load_recipe("minisora.dit_tiny")) == (PIXELS, (2, 4, 4))


def test_the_batch_is_the_largest_that_fits() -> None:
    recipe = load_recipe("minisora.dit_tiny")
    memory = estimate(replace(recipe, batch_size=20)).peak_bytes
    (only,) = suggest(stats_of((50, 4, 16, 16)), recipe, memory=memory, progress=False).suggestions
    assert only.bucket == Bucket(frames=4, height=16, width=16, batch_size=20)


def test_batches_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(recipe: Recipe) -> SimpleNamespace:
        data = recipe.data
        return SimpleNamespace(peak_bytes=1000 + data.frames * data.height * data.width * recipe.batch_size)

    monkeypatch.setattr(suggest_module, "estimate", peak)
    recipe, clips = load_recipe("minisora.dit_tiny"), stats_of((50, 4, 16, 16), (50, 2, 16, 32))
    buckets = [s.bucket for s in suggest(clips, recipe, memory=1000 + 20 * 4 * 16 * 16, progress=False).suggestions]
    assert [(b.frames, b.height, b.width, b.batch_size) for b in buckets] == [(2, 12, 24, 35), (4, 16, 16, 20)]
    # Where the memory holds no clip of four frames, the buckets are shorter.
    clips = stats_of((50, 4, 16, 16))
    (only,) = suggest(clips, recipe, memory=1000 + 3 * 64 * 64, area=64 * 64, progress=False).suggestions
    assert (only.bucket.frames, only.bucket.height, only.bucket.batch_size) == (2, 64, 1)
    told = r"--memory: one clip of 2 frames of 16×16 pixels needs 0\.0 GB, 0\.0 GB are given; lower --area"
    with pytest.raises(ValueError, match=told):
        suggest(clips, recipe, memory=1000, progress=False)
    with pytest.raises(ValueError, match="name a --recipe"):
        suggest(clips, memory=10**9, progress=False)
    with pytest.raises(ValueError, match="--num-buckets 0: must be at least 1"):
        suggest(clips, num_buckets=0, progress=False)


def test_a_model_that_takes_none_of_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("minisora.dit_tiny")
    monkeypatch.setattr(suggest_module, "constraints", lambda recipe: (PIXELS, (1, 1, 1)))
    with pytest.raises(ValueError, match=r"model.patch \(2, 4, 4\) does not divide the latent grid \(3, "):
        suggest(stats_of((5, 3, 15, 15)), recipe, max_frames=3, area=15 * 15, progress=False)


@given(st.integers(1, 1000), st.integers(1, 100), st.integers(0, 50), st.integers(0, 5000), st.integers(1, 70))
def test_largest_batch(fixed: int, each: int, bend: int, memory: int, most: int) -> None:
    asked = []

    def peak(size: int) -> int:
        asked.append(size)
        return fixed + each * size + bend * size * size // 10

    fitting = [n for n in range(1, most + 1) if fixed + each * n + bend * n * n // 10 <= memory]
    assert largest_batch(peak, memory, most) == max(fitting, default=0)
    if not bend:
        assert len(asked) <= 4


def test_what_the_command_line_says() -> None:
    told = ["24GB", "24 GiB", "1.5g", "80000mb", "100"]
    assert [parse_memory(t) for t in told] == [24 * 10**9, 24 * 2**30, 1_500_000_000, 80 * 10**9, 100]
    assert (parse_area("480x720"), parse_area("64 × 64")) == (345600, 4096)
    assert parse_rule("4n+1", 16) == LatentSpec(strides=(4, 16, 16), channels=3, first_frame_alone=True)
    assert parse_rule("8N", 8).strides == (8, 8, 8) and not parse_rule("n", 1).first_frame_alone
    assert parse_rule("4n + 1", 16) == parse_rule("4n+1", 16)


@pytest.mark.parametrize(
    ("parse", "text"),
    [(parse_memory, "lots"), (parse_memory, "12 i"), (parse_memory, "-1GB"), (parse_area, "480"), (parse_area, "0x16"),
     (lambda text: parse_rule(text, 16), "4n+2"), (lambda text: parse_rule(text, 16), "0n"),
     (lambda text: parse_rule("4n", int(text)), "0")],
)  # fmt: skip
def test_what_it_may_not_say(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError, match=r"^--(memory|area|frames-rule|multiple) "):
        parse(text)
