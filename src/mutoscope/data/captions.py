"""Which caption a sample gets, where a clip has several: kinds, alternatives of a kind, and templates over kinds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, product
from string import Formatter

from mutoscope.data.sources.layouts import Clip
from mutoscope.randomness import seed_of
from mutoscope.recipe import Data

Variants = Sequence[tuple[float, Sequence[str]]]
"""What a clip may be called: groups of captions that are drawn alike within, and each group's weight."""
PLAIN = "caption"
"""The kind of a caption that nobody named."""
MAX_VARIANTS = 1000
"""Captions that one clip's templates may make: each is embedded and stored."""


def variants(clip: Clip, data: Data) -> Variants:
    """The captions that a clip may get: a group for each template whose kinds it has.

    Without templates: the plain kind, or a group for each kind where there is no plain one. Nothing where the clip has
    no caption, or none for any template.
    """
    token = data.sets[clip.set].id_token
    before = f"{token} " if token else ""
    if not data.templates:
        kinds = [PLAIN] if PLAIN in clip.captions else sorted(clip.captions)
        return [(1.0, tuple(before + caption for caption in clip.captions[kind])) for kind in kinds]
    found = []
    weights = data.template_weights or (1.0,) * len(data.templates)
    for template, weight in zip(data.templates, weights, strict=True):
        kinds = kinds_of(template)
        if all(kind in clip.captions for kind in kinds):
            rows = product(*(clip.captions[kind] for kind in kinds))
            made = (template.format_map(dict(zip(kinds, row, strict=True))) for row in rows)
            found.append((weight, tuple(before + caption for caption in made)))
    return found


def choose(among: Variants, seed: int, sample: int) -> str:
    """The caption of a sample; empty where there is none to choose from."""
    if not among:
        return ""
    weights = list(accumulate(weight for weight, _ in among))
    point = seed_of(seed, "caption", sample) / 2**63 * weights[-1]
    _, group = among[min(bisect_right(weights, point), len(among) - 1)]
    return group[seed_of(seed, "variant", sample) % len(group)]


def kinds_of(template: str) -> list[str]:
    """The kinds of captions that a template is made of, each once. Raises ValueError for what is no template."""
    kinds = []
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            if name is None:
                continue
            if not name.strip() or name.isdigit() or set(name) & set(".[]") or spec or conversion:
                raise ValueError(f"{{{name}}} is no kind of caption")
            kinds.append(name)
    except ValueError as error:
        raise ValueError(f'data.templates: {template!r}: {error}; write kinds in braces, as in "{{short}}"') from None
    if not kinds:
        raise ValueError(f"data.templates: {template!r} names no kind of caption; write one in braces")
    return list(dict.fromkeys(kinds))


def check_captions(clips: Iterable[Clip], data: Data) -> None:
    """Raises ValueError where templates are none, name kinds that no clip has, leave clips that have captions without
    one, or make too many of them."""
    if not data.templates:
        return
    needed = [kinds_of(template) for template in data.templates]
    clips = [clip for clip in clips if clip.captions]
    known = sorted({kind for clip in clips for kind in clip.captions})
    if strange := sorted({kind for kinds in needed for kind in kinds} - set(known)):
        raise ValueError(f"data.templates: no clip has a caption of kind {', '.join(strange)}; there is {known}")
    without = [clip.id for clip in clips if not any(all(k in clip.captions for k in kinds) for kinds in needed)]
    if without:
        raise ValueError(f"data.templates: {len(without)} clips have captions, but not the kinds of any template, such "
                         f"as {', '.join(without[:10])}; add a template for them")  # fmt: skip
    for clip in clips:
        count = sum(_count(clip, kinds) for kinds in needed)
        if count > MAX_VARIANTS:
            raise ValueError(f"data.templates: they make {count} captions for {clip.id}, {MAX_VARIANTS} at most can be "
                             "kept apart; put fewer kinds with many captions into one template")  # fmt: skip


def _count(clip: Clip, kinds: list[str]) -> int:
    count = 1
    for kind in kinds:
        count *= len(clip.captions.get(kind, ()))
    return count
