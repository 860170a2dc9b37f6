"""Handwritten digits: deterministic, in their box, the same hand at every size, and as varied as promised."""

import numpy as np
import pytest

from mutoscope.data.digits import WAYS, draw_digit


@pytest.mark.parametrize("digit", range(10))
def test_a_digit_fills_its_box_but_for_the_margin(digit):
    for seed in range(8):
        ink = draw_digit(digit, 56, seed, margin=4 / 28) > 127
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        assert min(rows[0], columns[0]) >= 8 - 1 and max(rows[-1], columns[-1]) <= 56 - 8
        extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert extent == pytest.approx(40, abs=2)
        assert rows[0] + rows[-1] == pytest.approx(55, abs=2)  # Centred.


def test_the_seed_is_the_hand():
    assert np.array_equal(draw_digit(3, 28, seed=5), draw_digit(3, 28, seed=5))
    hands = {draw_digit(3, 28, seed=s).tobytes() for s in range(100)}
    assert len(hands) == 100


def test_the_same_hand_at_another_size_is_the_same_shape():
    for digit in range(10):
        large = draw_digit(digit, 80, seed=7).reshape(20, 4, 20, 4).mean((1, 3))
        small = draw_digit(digit, 20, seed=7)
        assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.98


def test_edges_are_antialiased_and_strokes_solid():
    glyph = draw_digit(8, 64, seed=1)
    assert glyph.max() == 255 and (glyph == 0).mean() > 0.5
    assert 0.02 < ((glyph > 0) & (glyph < 255)).mean() < 0.2


def test_every_way_of_writing_is_used():
    crossed = [draw_digit(7, 40, seed=s)[15:26].sum() for s in range(60)]  # The bar of a 7 lies half-way down.
    assert len(WAYS[7]) == 2
    assert max(crossed) > 1.5 * min(crossed)
