"""The verbs about clips and stores, `mutoscope data ...`. As in `verbs.py`, imports wait until they are needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mutoscope.errors import ConfigError
from mutoscope.on_recipe import OnRecipe

if TYPE_CHECKING:
    from rich.console import Console

    from mutoscope.recipe import ClipSet, Recipe


@dataclass(frozen=True, kw_only=True)
class MakeFlyingMNIST:
    """Write clips of flying digits with their captions and labels."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Where to. Clips that are there already are left alone."""
    preset: str = "11k"
    """How many, how large and how many digits each: 11k, 110k, small, demo or tiny."""
    workers: int = os.cpu_count() or 1
    """Processes that draw."""
    train: int | None = None
    """Clips to train on, in place of the preset's."""
    val: int | None = None
    """Clips held out, in place of the preset's."""

    def run(self) -> None:
        from mutoscope.data.flying_mnist import make, preset_named

        written = make(self.directory, preset_named(self.preset), workers=self.workers, train=self.train, val=self.val)
        print(f"{written} clips written to {self.directory}")


@dataclass(frozen=True, kw_only=True)
class OnClips:
    """What the verbs share that look at clips. Most options are those of `data` in a recipe."""

    root: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder of clips, a table that names them, tar or Parquet shards (a glob, a URL), or flying-mnist://PRESET."""
    layout: str = "auto"
    """How the clips are laid out; auto looks."""
    dataset_file: str | None = None
    """Of layout table: the CSV, TSV, JSONL or Parquet file, below the root; none looks for one."""
    caption_file: str | None = None
    """Of layout line_paired: the file with a caption in each line; none means prompts.txt (or captions.txt)."""
    video_file: str | None = None
    """Of layout line_paired: the file with a video in each line; none means videos.txt."""
    caption_columns: tuple[str, ...] = ()
    """Columns with captions, each a kind of its own; empty looks for caption, text or prompt."""
    video_column: str | None = None
    """Column with videos (paths, or bytes); none looks for video, path or file_name."""
    recipe: str | None = None
    """The recipe that is to train on the clips. Its options of `data` hold where none are given here."""
    trust_code: bool = False
    """Import the Python files that a recipe.toml or a run directory names. They can do whatever you can."""
    workers: int = os.cpu_count() or 1
    """Processes that decode clips."""
    timeout: float = 60.0
    """Seconds without a new frame after which a clip counts as broken."""

    def load(self) -> tuple[ClipSet, Recipe | None]:
        """The clips, and the recipe with its data being those."""
        from dataclasses import replace

        from mutoscope.config import check
        from mutoscope.loading import load_recipe
        from mutoscope.recipe import ClipSet

        names = [f.name for f in fields(ClipSet) if f.name in {f.name for f in fields(self)}]
        defaults = ClipSet(root="")
        given = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(defaults, name)}
        if self.recipe is None:
            clip_set = ClipSet(**given)
            check(clip_set)
            return clip_set, None
        trusts = self.trust_code or ".py:" in self.recipe or self.recipe.endswith(".py")
        recipe = load_recipe(self.recipe, trust_code=trusts)
        recipe = replace(recipe, data=replace(recipe.data, mix=(), **given))
        check(recipe)
        recipe = recipe.model.complete(recipe)
        return ClipSet(**{f.name: getattr(recipe.data, f.name) for f in fields(ClipSet)}), recipe


@dataclass(frozen=True, kw_only=True)
class Check(OnClips):
    """Decode every frame of every clip, and tell what there is and what is broken. Exits 1 where something is."""

    out: Path = Path("check.html")
    """The page with a picture of each clip (of 10,000 at most)."""
    json: bool = False
    """Print the report as JSON, as `mutoscope.data.prepare.check` describes it."""

    def run(self) -> None:
        from mutoscope.data.prepare.check import check
        from mutoscope.data.prepare.check_page import print_report, write_page

        _has_folder(self.out)
        clip_set, recipe = self.load()
        data = recipe.data if recipe else None
        report, checked = check(clip_set, data, workers=self.workers, timeout=self.timeout)
        write_page(self.out, report, checked, data.shapes(1) if data else ())
        if self.json:
            print(json.dumps(report, indent=2, ensure_ascii=False))
        else:
            print_report(report, _console())
            print(f"\n{self.out} shows them")
        if report["faulty"]:
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Stats(OnClips):
    """Show how long, fast, large, lively and wordy clips are, and suggest buckets to train on them in."""

    memory: str | None = None
    """Memory for a training step of the recipe, as in 24GB or 80GiB: batches become the largest that fit."""
    num_buckets: int = 4
    """Buckets at most; fewer where more would not be worth it."""
    area: str | None = None
    """HEIGHTxWIDTH whose area buckets come near to; none takes the recipe's, or the median clip's."""
    max_frames: int | None = None
    """Frames of a bucket at most; none takes the recipe's, or the median clip's."""
    multiple: int = 16
    """Without a recipe: what heights and widths are multiples of."""
    frames_rule: str = "4n+1"
    """Without a recipe: numbers of frames that a model takes: Kn or Kn+1."""
    motion_clips: int = 200
    """Clips to measure the motion of; 0 leaves it out."""
    out: Path | None = None
    """Write an HTML page as well."""

    def run(self) -> None:
        from mutoscope.data.prepare.stats import collect, histograms
        from mutoscope.data.prepare.stats_page import print_histograms, print_suggestions, write_page
        from mutoscope.suggest import parse_area, parse_memory, parse_rule, suggest

        if self.out:
            _has_folder(self.out)
        spec = parse_rule(self.frames_rule, self.multiple)
        area = parse_area(self.area) if self.area else None
        memory = parse_memory(self.memory) if self.memory else None
        clip_set, recipe = self.load()
        stats = collect(clip_set, motion_clips=self.motion_clips, workers=self.workers, timeout=self.timeout)
        console, shown = _console(), (stats.title, histograms(stats))
        print_histograms(console, *shown)
        advice = suggest(
            stats, recipe, num_buckets=self.num_buckets, memory=memory, max_frames=self.max_frames, area=area, spec=spec
        )
        print_suggestions(console, advice.suggestions, advice.too_short)
        if self.out:
            write_page(self.out, *shown, advice.suggestions, advice.too_short)
            print(f"\n{self.out} shows the same")


@dataclass(frozen=True, kw_only=True)
class MakeClips:
    """Cut clips out of longer videos by a list, exact to the frame, in a folder to train on."""

    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LIST")]
    """CSV, TSV, JSONL or Parquet with the columns file, start, end (seconds, or hh:mm:ss.mmm) and, if there are any,
    caption and id."""
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Where to: ID.mp4, and ID.txt with its caption. Clips of the same rows that are there already are left alone."""
    root: str | None = None
    """Folder below which the list's files lie; its own unless you say otherwise."""
    fps: float | None = None
    """Frames per second to resample to; without it, every frame and its time is kept."""
    height: int | None = None
    """Height to scale to, with --width."""
    width: int | None = None
    """Width to scale to, with --height."""
    resize: Literal["crop", "pad", "squash"] = "crop"
    """How another aspect ratio is met."""
    gop: int = 24
    """Frames from one keyframe to the next at most: fewer are read faster at random places, and larger on disk."""
    workers: int = os.cpu_count() or 1
    """Processes; 0 works in this one."""
    timeout: float = 60.0
    """Seconds without a new frame after which a clip is given up."""
    keep_going: bool = False
    """Make the clips of the other rows where some rows of the list have faults."""

    def run(self) -> None:
        from mutoscope.data.prepare.clipping import FAILURES, ClipFormat, clip
        from mutoscope.errors import listed

        form = ClipFormat(fps=self.fps, height=self.height, width=self.width, resize=self.resize, gop=self.gop)
        done = clip(
            self.table,
            self.directory,
            form,
            root=self.root,
            workers=self.workers,
            timeout=self.timeout,
            keep_going=self.keep_going,
        )
        print(f"{done.made} clips made, {done.kept} there already, in {self.directory}")
        if done.others:
            print(f"{done.others} clips there are not in this list")
        if done.failures:
            faults = listed(map(str, done.failures))
            print(f"{len(done.failures)} rows failed, see {self.directory / FAILURES}:{faults}", file=sys.stderr)
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class FindCuts:
    """Write a list of the scenes of videos, for `mutoscope data clip`, by PySceneDetect."""

    places: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR_OR_FILE")]
    """Videos, and folders below which all videos are taken."""
    out: Path
    """The list: a CSV with the columns file, start and end."""
    min_seconds: float = 2.0
    """Shorter scenes are left out."""
    max_seconds: float = 10.0
    """Longer scenes are split into equal parts."""
    threshold: float = 27.0
    """Mean change from one frame to the next (0 to 255) from which on it is a cut; lower finds more."""
    workers: int = os.cpu_count() or 1
    """Processes; 0 works in this one."""
    timeout: float = 60.0
    """Seconds without a new frame after which a video is given up."""

    def run(self) -> None:
        from mutoscope.data.prepare.cuts import find_clips
        from mutoscope.errors import listed

        found = find_clips(
            self.places,
            self.out,
            min_seconds=self.min_seconds,
            max_seconds=self.max_seconds,
            threshold=self.threshold,
            workers=self.workers,
            timeout=self.timeout,
        )
        print(f"{self.out}: {found.clips} clips of {found.videos} videos, {found.seconds:.0f} s in all")
        if found.short:
            print(f"left out as shorter than {self.min_seconds:g} s: {found.short}, {found.short_seconds:.1f} s in all")
        if found.failures:
            print(f"{len(found.failures)} videos failed:{listed(found.failures)}", file=sys.stderr)
            sys.exit(1)


def _console() -> Console:
    """Of stdout: as wide as a terminal, and as tables need where it is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 240)


def _has_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")


@dataclass(frozen=True, kw_only=True)
class ImportNpy(OnRecipe):
    """Make a store of the latents (N, C, T, H, W) or tokens (N, T, H, W) in minisora's .npy files."""

    file: Path
    """The .npy file, made by the recipe's autoencoder from clips of the recipe's size."""
    out: str
    """The store."""

    def run(self, flags: Sequence[str]) -> None:
        from mutoscope.autoencoders.pretrained import load_autoencoder
        from mutoscope.build import latent_spec
        from mutoscope.data.npy import import_npy
        from mutoscope.data.store import transform_of
        from mutoscope.weights import hash_weights

        recipe = self.load(flags)
        if recipe.autoencoder is None:
            raise ConfigError(
                "recipe.autoencoder: none; latents and tokens mean nothing without the one that made them"
            )
        store = import_npy(
            self.file,
            self.out,
            spec=latent_spec(recipe.autoencoder),
            autoencoder_hash=hash_weights(load_autoencoder(recipe.autoencoder, trust_code=self.trusts)),
            transform=transform_of(recipe.data),
        )
        print(f"{len(store)} clips; to train on them: mutoscope train {self.recipe} --data.latents {self.out}")


@dataclass(frozen=True, kw_only=True)
class ExportNpy:
    """Write a store's latents or tokens as a .npy file, as minisora's scripts read them."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """The store."""
    file: Path
    """The .npy file."""
    split: str = "train"
    """train or val."""

    def run(self) -> None:
        from mutoscope.data.npy import export_npy
        from mutoscope.data.store import LatentStore

        export_npy(LatentStore(self.store), self.file, self.split)
        print(self.file)
