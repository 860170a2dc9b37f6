"""Flying MNIST: the motion of the original, captions that can be read back, and files that survive interruption."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mutoscope.data import flying_mnist
from mutoscope.data.digits import draw_digit
from mutoscope.data.flying_mnist import (
    DIRECTIONS,
    LEVELS,
    PALETTE,
    PRESETS,
    Preset,
    caption_of,
    colour_name,
    label_of,
    make,
    plan,
    preset_named,
    preset_of,
    render,
)
from mutoscope.data.video import read_frames
from mutoscope.randomness import seed_of

FAITHFUL, TINY = PRESETS["11k"], PRESETS["tiny"]
EASY = Preset(name="easy", size=32, frames=8, fps=8, glyph=(18, 18), speeds=(1.0, 1.5, 2.0), variants=8, train=9, val=9)


def test_faithful_presets_have_the_numbers_of_the_original():
    for name, train, val in (("11k", 10_000, 1_000), ("110k", 100_000, 10_000)):
        p = preset_named(name)
        assert (p.size, p.frames, p.fps, p.digits, p.glyph) == (512, 100, 10, (1, 8), (50, 119))
        assert p.speeds == tuple(range(10, 40)) and p.limit == 512 - 119 - 1
        assert (p.count("train"), p.count("val")) == (train, val)
    assert LEVELS[0] == pytest.approx(1 / 6) and LEVELS[-1] == 1 and len(LEVELS) == 21
    clips = [plan(FAITHFUL, "train", i) for i in range(150)]
    digits = [d for clip in clips for d in clip]
    assert {len(clip) for clip in clips} == set(range(1, 9))
    assert {d.digit for d in digits} == set(range(10))
    assert {d.size for d in digits} == set(range(50, 120))
    assert {c for d in digits for c in d.rgb} == {round(255 * v) for v in LEVELS}
    assert {d.direction for d in digits} == set(DIRECTIONS)


def test_the_larger_set_begins_with_the_smaller_one():
    a, b = plan(FAITHFUL, "train", 9), plan(PRESETS["110k"], "train", 9)
    assert caption_of(a) == caption_of(b)
    assert all(np.array_equal(x.positions, y.positions) for x, y in zip(a, b, strict=True))


def test_golden_clip():
    clip = render(EASY, "train", 0)
    assert clip.caption == "a white 6 flies up-left"
    assert clip.frames.shape == (8, 32, 32, 3) and clip.frames.dtype == np.uint8
    path = [[2, 12], [1, 11], [0, 10], [1, 9], [2, 9], [2, 8], [3, 7], [4, 7]]
    assert clip.digits[0].positions.tolist() == path


def test_a_digit_turns_before_the_border():
    """The check looks at where the old velocity leads; the step is then taken with the new one."""
    p = replace(EASY, glyph=(10, 18), speeds=(5.0,), directions=1, frames=40)
    for i in range(30):
        x, y = plan(p, "train", i)[0].positions.T.tolist()
        assert set(y) == {y[0]}  # The one direction is to the right.
        at, velocity = x[0], 5
        for seen in x[1:]:
            velocity = velocity if 0 <= at + velocity <= 32 - 18 - 1 else -velocity
            at += velocity
            assert seen == at


def test_compass_directions_are_exact():
    """Floor must not make a pixel out of the 16th decimal of a sine."""
    p = replace(EASY, speeds=(2.0,), directions=4)
    for i in range(60):
        steps = np.abs(np.diff(plan(p, "train", i)[0].positions, axis=0))
        assert (steps.sum(1) == 2).all() and (steps.max(1) == 2).all()


def test_faithful_motion_is_straight_but_for_reflections():
    for i in range(20):
        for d in plan(FAITHFUL, "train", i):
            assert d.positions.min() >= 0 and d.positions.max() <= FAITHFUL.limit
            for path in d.positions.T:
                step = np.diff(path)
                speed = np.abs(step)
                assert speed.max() - speed.min() <= 1  # Floored.
                for t in np.flatnonzero(np.sign(step[1:]) * np.sign(step[:-1]) < 0):
                    beyond = path[t + 1] + step[t]
                    assert beyond < 2 or beyond > FAITHFUL.limit - 2


def test_the_direction_is_that_of_the_first_step():
    for i in range(100):
        for d in plan(FAITHFUL, "val", i):
            dx, dy = d.positions[1] - d.positions[0]
            turn = math.degrees(math.atan2(dy, dx)) - 45 * DIRECTIONS.index(d.direction)
            assert abs((turn + 180) % 360 - 180) < 22.5 + 8  # 8°: floor at 10 pixels per frame.


def test_captions_read_back():
    grammar = re.compile(r"an? (\w+) (\d) flies ([a-z-]+)")
    for preset in PRESETS.values():
        for i in range(50):
            digits = plan(preset, "train", i)
            caption = caption_of(digits)
            count, rest = re.fullmatch(r"(?:(\d+) digits: )?(.+)", caption).groups()
            assert (count is None and len(digits) == 1) or int(count) == len(digits)
            parts = [grammar.fullmatch(part).groups() for part in rest.split("; ")]
            assert parts == [(d.colour, str(d.digit), d.direction) for d in digits]
            assert all(d.colour in PALETTE for d in digits)
            assert label_of(digits) == (digits[0].digit if len(digits) == 1 else None)
    assert any(" an orange " in f" {caption_of(plan(EASY, 'train', i))}" for i in range(50))


def test_colours_are_named_whatever_their_brightness():
    for name, (r, g, b) in PALETTE.items():
        assert colour_name((r, g, b)) == colour_name((r // 3, g // 3, b // 3)) == name


def test_pixels_follow_the_plan():
    white = replace(EASY, palette=("white",))
    clip = render(white, "train", 3)
    (d,) = clip.digits
    glyph = draw_digit(d.digit, d.size, seed_of("handwriting", "train", d.digit, d.variant))
    for frame, (x, y) in zip(clip.frames, d.positions, strict=True):
        assert np.array_equal(frame[y : y + d.size, x : x + d.size, 0], glyph)
        assert frame.sum() == 3 * glyph.astype(int).sum()


def test_later_digits_hide_earlier_ones_with_hard_edges():
    p = replace(FAITHFUL, size=140, frames=2, digits=(8, 8), speeds=(5,))
    clip = render(p, "train", 1)
    last = clip.digits[-1]
    glyph = draw_digit(last.digit, last.size, seed_of("handwriting", "train", last.digit, last.variant), p.margin)
    mask = glyph > 150
    x, y = last.positions[1]
    seen = clip.frames[1, y : y + last.size, x : x + last.size]
    assert np.array_equal(seen[mask], np.rint(glyph[mask][:, None] / 255 * np.array(last.rgb)).astype(np.uint8))
    first, around = clip.frames[0], seen[~mask]
    assert around.any() and first.any()  # The others show through where the last one is not.


def test_handwriting_of_val_is_held_out():
    hands = {}
    for split in ("train", "val"):
        hands[split] = set()
        for i in range(200):
            clip = render(replace(EASY, palette=("white",), variants=3), split, i)
            (x, y), size = clip.digits[0].positions[0], clip.digits[0].size
            hands[split].add(clip.frames[0, y : y + size, x : x + size].tobytes())
        assert len(hands[split]) == 30
    assert not hands["train"] & hands["val"]


def test_rendering_the_demo_takes_less_than_a_millisecond():
    def per_clip():
        start = time.process_time()
        for i in range(100):
            render(PRESETS["demo"], "train", i)
        return (time.process_time() - start) / 100

    assert min(per_clip() for _ in range(5)) < 1e-3


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"speeds": (8.0,)}, "speeds"),
        ({"speeds": (0.0, 1.0)}, "speeds"),
        ({"digits": (2, 1)}, "digits"),
        ({"glyph": (18, 32)}, "glyph"),
        ({"palette": ("red", "mauve")}, "palette"),
        ({"palette": ()}, "palette"),
        ({"variants": 0}, "variants"),
        ({"directions": 0}, "directions"),
        ({"margin": 0.5}, "margin"),
        ({"frames": 0}, "frames"),
    ],
)
def test_impossible_presets_are_refused(change, names):
    with pytest.raises(ValueError, match=f"'easy': {names}="):
        replace(EASY, **change)


def test_unknown_preset():
    with pytest.raises(ValueError, match="no Flying MNIST preset '12k'; there are 11k, 110k"):
        preset_named("12k")


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def make_tiny(root, preset: Preset = TINY, *, workers=1, train=5, val=2):
    return make(root, preset, workers=workers, train=train, val=val, progress=False)


def test_files_hold_what_is_rendered(tmp_path):
    assert make_tiny(tmp_path) == 7
    assert len(files(tmp_path)) == 3 * 7 + 1
    clip = render(TINY, "val", 1)
    stem = tmp_path / "val" / "00001"
    assert np.array_equal(read_frames(stem.with_suffix(".mp4"), range(TINY.frames)), clip.frames)  # Lossless.
    assert stem.with_suffix(".txt").read_text().strip() == clip.caption
    label = json.loads(stem.with_suffix(".json").read_text())
    assert (label["label"], label["preset"], label["index"]) == (clip.digits[0].digit, "tiny", 1)
    (digit,) = label["digits"]
    assert digit["positions"] == clip.digits[0].positions.tolist()
    assert {k: digit[k] for k in ("digit", "colour", "rgb", "size", "direction")} == {
        "digit": clip.digits[0].digit, "colour": clip.digits[0].colour, "rgb": list(clip.digits[0].rgb),
        "size": clip.digits[0].size, "direction": clip.digits[0].direction,
    }  # fmt: skip


def test_clips_of_several_digits_have_no_label(tmp_path):
    make_tiny(tmp_path, replace(TINY, digits=(2, 2)), train=1, val=0)
    label = json.loads((tmp_path / "train" / "00000.json").read_text())
    assert label["label"] is None and len(label["digits"]) == 2


def test_processes_draw_the_same_bytes(tmp_path):
    make_tiny(tmp_path / "one", workers=1)
    make_tiny(tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_second_run_writes_what_is_missing_and_nothing_else(tmp_path):
    make_tiny(tmp_path)
    whole = files(tmp_path)
    for name in ("train/00001.mp4", "train/00003.txt", "val/00000.json"):
        (tmp_path / name).unlink()
    kept = {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.stem in ("00000", "00002") and p.parts[-2] == "train"
    }
    assert make_tiny(tmp_path) == 3
    assert files(tmp_path) == whole
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert make_tiny(tmp_path) == 0


def test_interruption_leaves_whole_files_and_the_next_run_goes_on(tmp_path, monkeypatch):
    write, calls = flying_mnist.write_video, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(flying_mnist, "write_video", interrupted)
        make_tiny(tmp_path / "a")
    assert len(files(tmp_path / "a")) == 3 * 3 + 1
    assert make_tiny(tmp_path / "a") == 4
    make_tiny(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_more_clips_may_be_added_and_none_are_forgotten(tmp_path):
    make_tiny(tmp_path, train=2, val=1)
    assert make_tiny(tmp_path, train=4, val=0) == 2
    manifest = json.loads((tmp_path / "flying_mnist.json").read_text())
    assert (manifest["train"], manifest["val"], manifest["name"]) == (4, 1, "tiny")


def test_a_folder_of_other_clips_is_refused(tmp_path):
    make_tiny(tmp_path / "a", train=1, val=0)
    before = files(tmp_path / "a")
    with pytest.raises(ValueError, match="fps is 4 there and 5 here"):
        make_tiny(tmp_path / "a", replace(TINY, fps=5))
    assert files(tmp_path / "a") == before
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="did not make"):
        make_tiny(tmp_path / "b")
    (tmp_path / "a" / "flying_mnist.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        make_tiny(tmp_path / "a")


def test_the_preset_of_a_data_root(tmp_path):
    made = replace(TINY, digits=(1, 2))
    make_tiny(tmp_path / "made", made, train=1, val=0)
    assert preset_of(tmp_path / "made") == replace(made, train=1, val=0)
    assert preset_of("flying-mnist://11k") == FAITHFUL
    assert preset_of(tmp_path) is None


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "clips")])
    wait_for = time.monotonic() + 60
    while len(list((tmp_path / "clips").glob("train/*.json"))) < 4 and time.monotonic() < wait_for:
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(2)  # at most the clip in hand, a second's work, is finished
    left = len(list((tmp_path / "clips" / "train").iterdir()))
    time.sleep(2)
    assert len(list((tmp_path / "clips" / "train").iterdir())) == left


KILLED = """
import sys
from mutoscope.data.flying_mnist import make, preset_named
if __name__ == "__main__":
    make(sys.argv[1], preset_named("11k"), workers=2, progress=False)
"""
