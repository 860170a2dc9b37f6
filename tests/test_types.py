"""Shapes of latents over clips, and conditions that are joined, dropped and cut."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mutoscope.types import NO_LABEL, PIXELS, Cond, LatentSpec

SIZES = st.tuples(*[st.integers(1, 40)] * 3)
SPECS = st.builds(
    LatentSpec,
    strides=st.tuples(*[st.integers(1, 16)] * 3),
    channels=st.just(4),
    first_frame_alone=st.booleans(),
)


def captions(*lengths: int, width: int = 3) -> Cond:
    """One row for each length, padded to the longest; token k of row i is filled with 100·i + k + 1."""
    longest = max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    tokens = 100.0 * torch.arange(len(lengths))[:, None] + torch.arange(longest) + 1
    return Cond(text=(tokens * mask)[..., None].expand(-1, -1, width), text_mask=mask)


def same(a: Cond, b: Cond) -> bool:
    """Whether two conditions hold the same bits."""
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(Cond))
    )


@given(SPECS, SIZES)
def test_a_latent_grid_comes_back_from_its_clip(spec: LatentSpec, grid: tuple[int, int, int]) -> None:
    assert spec.latent_shape(*spec.pixel_shape(*grid)) == grid


@given(SPECS, st.integers(-3, 200), st.integers(0, 2))
def test_a_size_is_taken_whole_or_refused_with_the_nearest_that_are_taken(
    spec: LatentSpec, size: int, axis: int
) -> None:
    clip = list(spec.pixel_shape(2, 2, 2))
    clip[axis] = size
    try:
        grid = spec.latent_shape(*clip)
    except ValueError as error:
        name, below, above = re.fullmatch(r"(\w+)=.*\(nearest: (\d+) or (\d+)\)", str(error)).groups()  # type: ignore[union-attr]
        assert name == ("frames", "height", "width")[axis]
        assert int(below) < size < int(above) or size < int(below) < int(above)
        for near in (int(below), int(above)):
            clip[axis] = near
            spec.latent_shape(*clip)
    else:
        assert spec.pixel_shape(*grid) == tuple(clip)


def test_shapes_of_known_autoencoders() -> None:
    cogvideox = LatentSpec(strides=(4, 8, 8), channels=16, first_frame_alone=True)
    assert cogvideox.latent_shape(49, 480, 720) == (13, 60, 90)
    videogpt = LatentSpec(strides=(4, 4, 4), channels=256, vocab=2048)
    assert videogpt.latent_shape(16, 128, 128) == (4, 32, 32)
    assert PIXELS.latent_shape(5, 7, 3) == (5, 7, 3)


def test_errors_say_what_is_allowed() -> None:
    causal = LatentSpec(strides=(4, 8, 8), channels=16, first_frame_alone=True)
    with pytest.raises(ValueError, match=r"frames=48 .* must be 4·n \+ 1 \(nearest: 45 or 49\)"):
        causal.latent_shape(48, 480, 720)
    with pytest.raises(ValueError, match=r"height=100 .* must be a multiple of 8 \(nearest: 96 or 104\)"):
        causal.latent_shape(49, 100, 720)


def test_joined_captions_are_padded_with_masked_zeros() -> None:
    short, long = captions(1, 2), captions(4)
    joined = Cond.stack([short, long])
    assert joined.text is not None and joined.text_mask is not None
    assert joined.text_mask.tolist() == [[k < n for k in range(4)] for n in (1, 2, 4)]
    assert joined.text.shape == (3, 4, 3)
    assert torch.equal(joined.text[joined.text_mask], torch.cat([c.text[c.text_mask] for c in (short, long)]))
    assert joined.text[~joined.text_mask].eq(0).all()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_rows_undo_stack(lengths: list[int], data: st.DataObject) -> None:
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, 9), min_size=len(lengths), max_size=len(lengths))))
    longest = max(lengths)
    parts = [
        replace(captions(longest, length).rows(slice(1, 2)), label=labels[i : i + 1])  # padded to the longest
        for i, length in enumerate(lengths)
    ]
    joined = Cond.stack(parts)
    assert all(same(joined.rows(slice(i, i + 1)), part) for i, part in enumerate(parts))


def test_conditions_that_only_some_samples_have_are_refused() -> None:
    with pytest.raises(ValueError, match="that others lack"):
        Cond.stack([Cond(label=torch.tensor([1])), Cond()])
    assert same(Cond.stack([Cond(), Cond()]), Cond())


def test_text_without_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="text_mask"):
        Cond(text=torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="text_mask"):
        replace(captions(2), text=None)


@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_dropped_samples_lose_all_and_the_others_nothing(drop: list[bool]) -> None:
    assume(any(drop))
    cond = replace(captions(*range(1, len(drop) + 1)), label=torch.arange(len(drop)))
    after = cond.dropped(torch.tensor(drop))
    for i, gone in enumerate(drop):
        row, before = after.rows(slice(i, i + 1)), cond.rows(slice(i, i + 1))
        if gone:
            assert row.text is not None and row.text.eq(0).all()
            assert row.text_mask is not None and not row.text_mask.any()
            assert row.label is not None and row.label.tolist() == [NO_LABEL]
        else:
            assert same(row, before)


def test_dropping_is_done_once_and_for_all() -> None:
    everything = torch.ones(2, dtype=torch.bool)
    cond = replace(captions(2, 3), label=torch.tensor([4, NO_LABEL]))
    assert same(cond.dropped(everything).dropped(everything), cond.dropped(everything))
    assert same(cond.dropped(~everything), cond)
    assert same(Cond().dropped(everything), Cond())


def test_conditions_move_whole() -> None:
    cond = replace(captions(2, 3), label=torch.tensor([4, 1])).to(torch.device("meta"))
    assert cond.text is not None and cond.text_mask is not None and cond.label is not None
    assert {t.device.type for t in (cond.text, cond.text_mask, cond.label)} == {"meta"}


def test_a_dropped_caption_can_be_an_empty_one_and_known_frames_stay() -> None:
    text = captions(2, 3)
    assert text.text is not None
    cond = replace(text, null_text=torch.full_like(text.text, 0.5), known=torch.ones(2, 4, 3, 2, 2))
    after = cond.dropped(torch.tensor([True, False]))
    assert after.text is not None and after.text[0].eq(0.5).all() and torch.equal(after.text[1], text.text[1])
    assert same(replace(after, text=cond.text), cond), "also the mask: the empty caption is there to be seen"
    assert same(after.dropped(torch.tensor([True, False])), after)
    with pytest.raises(ValueError, match="null_text needs text"):
        Cond(null_text=cond.null_text)


def test_known_frames_are_left_out_by_themselves() -> None:
    cond = replace(captions(2, 3), known=torch.ones(2, 4, 3, 2, 2))
    after = cond.without_known(torch.tensor([True, False]))
    assert after.known is not None and after.known[0].eq(0).all() and after.known[1].eq(1).all()
    assert same(replace(after, known=cond.known), cond)
    assert same(Cond().without_known(torch.tensor([True])), Cond())


def test_known_frames_and_empty_captions_go_with_their_samples() -> None:
    filled = lambda value: {"null_text": torch.full((1, 2, 3), value), "known": torch.full((1, 4, 3, 2, 2), value)}
    parts = [replace(captions(2), **filled(value)) for value in (0.0, 1.0, 2.0)]
    joined = Cond.stack(parts)
    assert all(same(joined.rows(slice(i, i + 1)), part) for i, part in enumerate(parts))
