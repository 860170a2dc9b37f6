"""The report of `mutoscope data check`, for people: a table on the terminal, and a page with a picture of each clip."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mutoscope.data.prepare.check import Checked
from mutoscope.files import replacing
from mutoscope.recipe import Bucket

MOST = 8
"""Rows for rates and sizes, those of most clips; the others are summed up."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bad: #c33; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; }
th, td { padding: .15rem 1.5rem .15rem 0; text-align: left; vertical-align: top; }
td:nth-child(3) { text-align: right; font-variant-numeric: tabular-nums; }
tr.first > * { border-top: 1px solid var(--soft); }
ol { padding-left: 3rem; } li { margin: .3rem 0; overflow-wrap: anywhere; }
.bad { color: var(--bad); }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem; }
.clips > div { border: 1px solid var(--soft); border-radius: 6px; padding: .5rem; font-size: 13px;
  overflow-wrap: anywhere; content-visibility: auto; contain-intrinsic-size: auto 15rem; }
.clips img { display: block; width: 100%; height: 8rem; object-fit: contain; background: var(--soft); }
.clips b { display: block; margin-top: .3rem; } .clips span { opacity: .7; display: block; }
.clips p { margin: .3rem 0 0; overflow: hidden;
  display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; }
"""

Row = tuple[str, str, str]
"""(what it is about, which, how many)."""


def print_report(report: dict[str, Any], console: Console) -> None:
    """The table, then every fault; in plain lines where that is no terminal."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    shown = ""
    for about, which, number in rows(report):
        table.add_row("" if about == shown else about, which, number)
        shown = about
    console.print(table)
    for kind, title in (("broken", "clips that can't be read"), ("unplaced", "clips that fall in no bucket")):
        if report[kind]:
            console.print(f"\n{title}: {len(report[kind]):,}", style="bold red", highlight=False)
            for fault in report[kind]:
                console.print(f"  {fault['reason']}", markup=False, highlight=False, soft_wrap=True)


def rows(report: dict[str, Any]) -> Iterator[Row]:
    """The report as a table."""
    yield "clips", "all", f"{report['clips']:,}"
    for split, number in report["splits"].items():
        yield "clips", split, f"{number:,}"
    if report["images"]:
        yield "clips", "images", f"{report['images']:,}"
    yield "clips", "broken", f"{len(report['broken']):,}"
    duration = report["duration"]
    if duration["max"] is not None:
        yield "duration", "all together", clock(duration["total"])
        for name, key in (("shortest", "min"), ("median", "median"), ("longest", "max")):
            yield "duration", name, clock(duration[key])
        for r in duration["ranges"]:
            yield (
                "duration",
                f"{r['from']:g} s and more" if r["to"] is None else f"{r['from']:g} to {r['to']:g} s",
                f"{r['clips']:,}",
            )
    yield from _most("fps", [(f"{r['fps']:g}", r["clips"]) for r in report["fps"]])
    yield from _most("size", [(f"{r['width']}×{r['height']}", r["clips"]) for r in report["sizes"]])
    for b in report["buckets"] or ():
        shape = Bucket(frames=b["frames"], height=b["height"], width=b["width"], batch_size=1)
        yield "bucket", _shape(shape), f"{b['clips']:,}"
    if report["buckets"] is not None:
        yield "bucket", "none", f"{len(report['unplaced']):,}"
    captions = report["captions"]
    for k in captions["kinds"]:
        words = k["words"]
        yield (
            "captions",
            f"{k['kind']}: {words['min']} to {words['max']} words, median {words['median']:g}",
            f"{k['captions']:,}",
        )
    yield "captions", "clips without", f"{captions['missing']:,}"
    if captions["shared"]:
        yield "captions", "clips that share theirs", f"{captions['shared']:,}"
    if classes := report["labels"]["classes"]:
        few, many = min(classes.values()), max(classes.values())
        yield "labels", f"classes, of {few:,} to {many:,} clips", f"{len(classes):,}"
        yield "labels", "clips without", f"{report['labels']['missing']:,}"


def _most(about: str, counts: Sequence[tuple[str, int]]) -> Iterator[Row]:
    for which, number in counts[:MOST]:
        yield about, which, f"{number:,}"
    if len(counts) > MOST:
        yield about, f"{len(counts) - MOST:,} others", f"{sum(n for _, n in counts[MOST:]):,}"


def clock(seconds: float) -> str:
    """3723.4 -> 1:02:03 h"""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def _shape(b: Bucket) -> str:
    return f"{b.frames} frames of {b.width}×{b.height}"


def write_page(path: Path, report: dict[str, Any], checked: Sequence[Checked], buckets: Sequence[Bucket] = ()) -> None:
    """The page, all in one file: the table, every fault, then the clips that have a thumbnail.

    Raises FileNotFoundError where the folder is missing.
    """
    title = f"{report['root']}: {report['clips']:,} clips"
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(
            "<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        )
        file.writelines(_table(report))
        for kind, heading in (("broken", "Broken"), ("unplaced", "In no bucket")):
            if faults := report[kind]:
                file.write(f"<h2 class='bad'>{heading}: {len(faults):,}</h2>\n<ol>\n")
                file.writelines(
                    f"<li><b>{html.escape(f['id'])}</b><br>{html.escape(f['reason'])}</li>\n" for f in faults
                )
                file.write("</ol>\n")
        shown = [c for c in checked if c.thumbnail is not None]
        sound = report["clips"] - len(report["broken"])
        number = f"{sound:,}" if len(shown) == sound else f"{len(shown):,} of {sound:,}, evenly spread"
        file.write(f"<h2>Clips: {number}</h2>\n<div class='clips'>\n")
        file.writelines(_card(c, buckets) for c in shown)
        file.write("</div>\n</html>\n")


def _table(report: dict[str, Any]) -> Iterator[str]:
    yield "<table>\n"
    shown = ""
    for about, which, number in rows(report):
        first = about != shown
        yield (
            f"<tr{' class=first' if first else ''}><th>{html.escape(about) if first else ''}</th>"
            f"<td>{html.escape(which)}</td><td>{html.escape(number)}</td></tr>\n"
        )
        shown = about
    yield "</table>\n"


def _card(c: Checked, buckets: Sequence[Bucket]) -> str:
    assert c.thumbnail is not None and c.info is not None
    facts = [f"{c.info.width}×{c.info.height}"]
    if not c.info.image:
        facts += [f"{c.info.fps:.4g} fps", clock(c.info.duration), f"{c.info.frames} frames"]
    if c.bucket is not None:
        facts.append(f"bucket: {_shape(buckets[c.bucket])}")
    elif c.unplaced is not None:
        facts.append("in no bucket")
    if c.clip.label is not None:
        facts.append(f"label {c.clip.label}")
    line = " · ".join(fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)
    kinds = c.clip.captions.items()
    captions = [(f"{kind}: " if len(kinds) > 1 else "") + text for kind, texts in kinds for text in texts]
    text = "".join(f"<p title='{html.escape(caption)}'>{html.escape(caption)}</p>" for caption in captions)
    picture = base64.b64encode(c.thumbnail).decode()
    return (
        f"<div><img loading='lazy' decoding='async' alt='' src='data:image/jpeg;base64,{picture}'>"
        f"<b>{html.escape(c.clip.id)}</b><span>{html.escape(line)}</span>{text}</div>\n"
    )
