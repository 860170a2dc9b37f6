"""Flying MNIST: digits that fly in straight lines and bounce off the borders, drawn from an index and nothing else.

The clips follow the data set of minisora (github.com/kungfuai/CVlization, after github.com/caganselim/flying_mnist):
canvas, sizes, colours, speeds, reflection and occlusion are theirs, the handwriting is our own (`digits.py`).
Presets "11k" and "110k" are faithful to it; the small ones are for demonstrations and tests.

Captions, in extended Backus-Naur form::

    caption   = [count, " digits: "], digit, {"; ", digit};        (* the count is left out for a single digit *)
    digit     = ("a " | "an "), colour, " ", ("0" | ... | "9"), " flies ", direction;
    colour    = a name in PALETTE;
    direction = a name in DIRECTIONS;

for instance "a red 3 flies up-left" and "2 digits: a red 3 flies up-left; an orange 7 flies right".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mutoscope.data.digits import draw_digit
from mutoscope.data.video import write_video
from mutoscope.files import replacing
from mutoscope.randomness import seed_of
from mutoscope.workers import follow_parent

VERSION = 1
"""Raised whenever a clip of the same preset, split and index would come out differently."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (255, 40, 40),
    "green": (40, 220, 60),
    "blue": (50, 90, 255),
    "yellow": (255, 230, 50),
    "cyan": (50, 225, 255),
    "magenta": (245, 60, 245),
    "white": (255, 255, 255),
    "orange": (255, 140, 20),
}
"""Colours by name, well separated."""

DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
"""Names of the eight sectors of 45°, clockwise on the screen."""

LEVELS = np.linspace(0, 1, 25)[4:]
"""Brightness of a channel where a preset has no palette: 21 levels from 1/6 to 1."""

FLYING_MNIST = "flying-mnist://"
"""How the root of clips that are drawn in memory begins; the preset's name follows."""
MANIFEST = "flying_mnist.json"
"""The file in a folder of clips that says how they were drawn."""
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that decides what the clips of a Flying MNIST look like."""

    name: str
    """What `flying-mnist://NAME` and `mutoscope data make` call it."""
    size: int
    """Height and width of a frame in pixels."""
    frames: int
    """Frames of a clip."""
    fps: int
    """Frames per second of the file."""
    digits: tuple[int, int] = (1, 1)
    """Fewest and most digits of a clip."""
    glyph: tuple[int, int]
    """Smallest and largest side of a digit's square in pixels."""
    margin: float = 0.0
    """Share of that square left blank on each side of the ink (MNIST: 4/28)."""
    speeds: tuple[float, ...]
    """Speeds in pixels per frame; each digit draws one."""
    directions: int | None = 8
    """Number of equally spaced directions; None for any angle."""
    palette: tuple[str, ...] | None = tuple(PALETTE)
    """Names of the colours; None for any colour, each channel on one of LEVELS, named by the nearest name."""
    variants: int | None = None
    """Handwritings per digit and split; None writes every digit anew."""
    hard_edges: bool = False
    """Cut the ink at 150 of 255 in place of blending it."""
    lossless: bool = True
    """Whether files keep every pixel (strokes of one to three pixels do not survive chroma subsampling)."""
    train: int
    """Clips to train on."""
    val: int
    """Clips held out, in handwriting held out as well."""

    def __post_init__(self) -> None:
        """Raises ValueError where a field is out of range or contradicts another."""
        fastest = self.limit / 2
        palette = self.palette is None or (self.palette and set(self.palette) <= set(PALETTE))
        for field, allowed, rule in (
            ("frames", self.frames >= 1, "at least 1"),
            ("digits", 1 <= self.digits[0] <= self.digits[1], "(fewest, most) with 1 <= fewest <= most"),
            ("glyph", 4 <= self.glyph[0] <= self.glyph[1] < self.size, "(smallest, largest), 4 or more, below size"),
            ("margin", 0 <= self.margin <= 0.4, "in [0, 0.4]"),
            ("speeds", self.speeds and min(self.speeds) > 0 and max(self.speeds) <= fastest,
             f"above 0 and at most {fastest}, half of the way between the borders (size - largest glyph - 1)"),
            ("directions", self.directions is None or self.directions >= 1, "at least 1, or None"),
            ("palette", palette, f"None or names out of {', '.join(PALETTE)}"),
            ("variants", self.variants is None or self.variants >= 1, "at least 1, or None"),
        ):  # fmt: skip
            if not allowed:
                raise ValueError(f"Flying MNIST preset {self.name!r}: {field}={getattr(self, field)} must be {rule}")

    @property
    def limit(self) -> int:
        """Largest coordinate of a digit's top left corner. It is that of the largest digit for all of them, so
        that small digits turn before they touch the right and the bottom border."""
        return self.size - self.glyph[1] - 1

    def count(self, split: Split) -> int:
        """Number of clips of a split."""
        return self.train if split == "train" else self.val


_FAITHFUL = Preset(
    name="11k", size=512, frames=100, fps=10, digits=(1, 8), glyph=(50, 119), margin=4 / 28,
    speeds=tuple(map(float, range(10, 40))), directions=None, palette=None, hard_edges=True, lossless=False,
    train=10_000, val=1_000,
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        _FAITHFUL,
        replace(_FAITHFUL, name="110k", train=100_000, val=10_000),
        Preset(name="small", size=64, frames=16, fps=10, digits=(1, 2), glyph=(20, 28),
               speeds=(1.0, 1.5, 2.0, 2.5, 3.0), train=10_000, val=500),
        Preset(name="demo", size=32, frames=8, fps=8, glyph=(22, 22), speeds=(1.0, 1.5, 2.0), variants=4,
               train=8_000, val=400),
        Preset(name="tiny", size=16, frames=4, fps=4, glyph=(9, 11), speeds=(1.0, 1.5), variants=2,
               train=48, val=16),
    )
}  # fmt: skip
"""The presets by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FlyingDigit:
    """One digit of a clip: what it is, how it is written, and where it goes."""

    digit: int
    """0 to 9."""
    variant: int
    """Which handwriting of that digit in that split."""
    colour: str
    """A name in PALETTE."""
    rgb: tuple[int, int, int]
    """The colour drawn."""
    size: int
    """Side of its square in pixels."""
    direction: str
    """A name in DIRECTIONS: that of the motion from the first frame to the second."""
    positions: Int[np.ndarray, "t 2"]
    """Top left corner of its square in every frame: x to the right, y down, in whole pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FlyingClip:
    """A clip and all that is known about it."""

    frames: UInt8[np.ndarray, "t h w 3"]
    """RGB."""
    caption: str
    """In the grammar above."""
    digits: tuple[FlyingDigit, ...]
    """In the order of drawing: later ones hide earlier ones."""


def preset_named(name: str) -> Preset:
    """The preset of that name. Raises ValueError if there is none."""
    if name not in PRESETS:
        raise ValueError(f"no Flying MNIST preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_of(root: str | Path) -> Preset | None:
    """The preset of the clips at a data root: in memory (``flying-mnist://NAME``), or in a folder that `make` filled.
    None for any other data set."""
    if str(root).startswith(FLYING_MNIST):
        return preset_named(str(root).removeprefix(FLYING_MNIST))
    manifest = Path(root) / MANIFEST
    if not manifest.exists():
        return None
    fields = json.loads(manifest.read_text())
    del fields["version"]
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return Preset(**values)


def render(preset: Preset, split: Split, index: int) -> FlyingClip:
    """Clip `index` of a split: a pure function of its arguments, in every process and on every machine."""
    digits = plan(preset, split, index)
    frames = np.zeros((preset.frames, preset.size, preset.size, 3), np.uint8)
    for d in digits:
        glyph = _glyph if preset.variants is None else _banked_glyph
        _stamp(frames, glyph(split, d.digit, d.variant, d.size, preset.margin), d, preset.hard_edges)
    return FlyingClip(frames=frames, caption=caption_of(digits), digits=digits)


def plan(preset: Preset, split: Split, index: int) -> tuple[FlyingDigit, ...]:
    """The digits of clip `index` without drawing them: for lists of captions and labels."""
    rng = np.random.Generator(np.random.PCG64(seed_of("flying-mnist", split, index)))
    return tuple(_plan_digit(preset, rng) for _ in range(rng.integers(preset.digits[0], preset.digits[1] + 1)))


def caption_of(digits: tuple[FlyingDigit, ...]) -> str:
    """The caption of these digits, in the grammar above."""
    parts = [f"{'an' if d.colour[0] in 'aeiou' else 'a'} {d.colour} {d.digit} flies {d.direction}" for d in digits]
    return (f"{len(parts)} digits: " if len(parts) > 1 else "") + "; ".join(parts)


def label_of(digits: tuple[FlyingDigit, ...]) -> int | None:
    """The class of a clip: its digit if there is exactly one."""
    return digits[0].digit if len(digits) == 1 else None


def colour_name(rgb: tuple[int, int, int]) -> str:
    """The nearest name in PALETTE, brightness aside."""

    def distance(name: str) -> float:
        other = PALETTE[name]
        return sum((a / max(rgb) - b / max(other)) ** 2 for a, b in zip(rgb, other, strict=True))

    return min(PALETTE, key=distance)


def make(
    directory: str | Path,
    preset: Preset,
    *,
    workers: int,
    train: int | None = None,
    val: int | None = None,
    progress: bool = True,
) -> int:
    """Write a preset's clips as files, and return how many were written.

    DIR/{train,val}/00000.mp4, its caption in 00000.txt, its label in 00000.json (``label``: the digit if there is
    exactly one, else null; ``digits``: all fields of each `FlyingDigit`; ``preset``; ``index``), and the preset in
    DIR/flying_mnist.json. Clips that are there already are left alone, so that an interrupted run goes on where it
    stopped, and larger numbers for `train` and `val` (the preset's own by default) add clips. `workers` processes
    draw; 0 or 1 draws in this one.

    Raises ValueError where the folder holds anything other than this preset's clips.
    """
    root = Path(directory)
    train, val = preset.train if train is None else train, preset.val if val is None else val
    preset = replace(preset, train=train, val=val)
    _claim(root, preset)
    jobs = [(root, preset, split, i) for split in SPLITS for i in _missing(root / split, preset.count(split))]
    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"Flying MNIST {preset.name}", total=len(jobs))
        for _ in _write_clips(jobs, min(workers, len(jobs))):
            bar.advance(task)
    return len(jobs)


def _plan_digit(preset: Preset, rng: np.random.Generator) -> FlyingDigit:
    digit = int(rng.integers(10))
    variant = int(rng.integers(2**31 if preset.variants is None else preset.variants))
    size = int(rng.integers(preset.glyph[0], preset.glyph[1] + 1))
    if preset.palette is None:
        r, g, b = (round(255 * LEVELS[i]) for i in rng.integers(len(LEVELS), size=3))
        rgb, colour = (r, g, b), colour_name((r, g, b))
    else:
        colour = preset.palette[rng.integers(len(preset.palette))]
        rgb = PALETTE[colour]
    speed = preset.speeds[rng.integers(len(preset.speeds))]
    turn = rng.random() if preset.directions is None else rng.integers(preset.directions) / preset.directions
    x, y = (math.floor(preset.limit * u) for u in rng.random(2))
    # Rounded, because the sine of 180° is not quite 0 and floor would turn that into a step of a whole pixel.
    vx, vy = round(speed * math.cos(2 * math.pi * turn), 9), round(speed * math.sin(2 * math.pi * turn), 9)
    path = _bounce(x, vx, preset.limit, preset.frames + 1), _bounce(y, vy, preset.limit, preset.frames + 1)
    (x0, x1), (y0, y1) = path[0][:2], path[1][:2]
    sector = round(math.atan2(y1 - y0, x1 - x0) / (math.pi / 4)) % 8
    return FlyingDigit(
        digit=digit, variant=variant, colour=colour, rgb=rgb, size=size, direction=DIRECTIONS[sector],
        positions=np.floor(np.array(path).T[: preset.frames]).astype(np.int64),
    )  # fmt: skip


def _bounce(at: float, velocity: float, limit: float, frames: int) -> list[float]:
    """One coordinate in every frame. A step that would leave [0, limit] is taken the other way round instead (the
    digit turns before the border rather than on it), as the original does."""
    path = [at]
    for _ in range(frames - 1):
        if not 0 <= at + velocity <= limit:
            velocity = -velocity
        at += velocity
        path.append(at)
    return path


def _glyph(split: str, digit: int, variant: int, size: int, margin: float) -> UInt8[np.ndarray, "size size"]:
    return draw_digit(digit, size, seed_of("handwriting", split, digit, variant), margin)


_banked_glyph = lru_cache(maxsize=2**16)(_glyph)


def _stamp(frames: UInt8[np.ndarray, "t h w 3"], glyph: UInt8[np.ndarray, "s s"], d: FlyingDigit, hard: bool) -> None:
    """Draw a digit over every frame, in place."""
    rgb = np.array(d.rgb, np.uint16)
    ink = np.rint(glyph[..., None] / 255 * rgb).astype(np.uint16) if hard else rgb
    alpha = (np.where(glyph > 150, 255, 0) if hard else glyph)[..., None].astype(np.uint16)
    over, under = ink * alpha + 127, 255 - alpha
    for frame, (x, y) in zip(frames, d.positions.tolist(), strict=True):
        patch = frame[y : y + d.size, x : x + d.size]
        patch[:] = (over + under * patch) // 255


_Job = tuple[Path, Preset, Split, int]


def _claim(root: Path, preset: Preset) -> None:
    """Make the folders and write the manifest, or make sure that the one there says the same."""
    manifest = root / MANIFEST
    new = json.loads(json.dumps({"version": VERSION, **asdict(preset)}))
    if manifest.exists():
        try:
            old: dict[str, Any] = json.loads(manifest.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{manifest}: not JSON ({error}); choose another folder") from error
        differ = [k for k in old | new if k not in SPLITS and old.get(k) != new.get(k)]
        if differ:
            pairs = ", ".join(f"{k} is {old.get(k)} there and {new.get(k)} here" for k in differ)
            raise ValueError(f"{root}: holds another Flying MNIST ({pairs}); choose another folder")
        new |= {split: max(old[split], new[split]) for split in SPLITS}
    elif any((root / split).exists() for split in SPLITS):
        raise ValueError(f"{root}: holds a train or val folder that Flying MNIST did not make; choose another folder")
    else:
        root.mkdir(parents=True, exist_ok=True)
    with replacing(manifest) as aside:
        aside.write_text(json.dumps(new, indent=1) + "\n")
    for split in SPLITS:
        (root / split).mkdir(exist_ok=True)


def _missing(folder: Path, count: int) -> list[int]:
    """The clips below `count` of which any file is missing."""
    there = {path.name for path in folder.iterdir()}
    return [i for i in range(count) if not there.issuperset(f"{i:05d}{end}" for end in (".mp4", ".txt", ".json"))]


def _write_clips(jobs: list[_Job], workers: int) -> Iterator[None]:
    if workers <= 1:
        yield from map(_write_clip, jobs)
        return
    # Spawned, because a fork of a process with threads may hang. On Ctrl-C the workers finish the clips in hand.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=follow_parent) as pool:
        try:
            for at in range(0, len(jobs), 1024):  # A future for each of 110,000 clips at once would take memory.
                yield from pool.map(_write_clip, jobs[at : at + 1024])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_clip(job: _Job) -> None:
    root, preset, split, index = job
    clip = render(preset, split, index)
    stem = root / split / f"{index:05d}"
    digits = [asdict(d) | {"positions": d.positions.tolist()} for d in clip.digits]
    label = {"label": label_of(clip.digits), "digits": digits, "preset": preset.name, "index": index}
    write_video(stem.with_suffix(".mp4"), clip.frames, preset.fps, lossless=preset.lossless)
    for end, text in ((".txt", clip.caption), (".json", json.dumps(label))):
        with replacing(stem.with_suffix(end)) as aside:
            aside.write_text(text + "\n")
