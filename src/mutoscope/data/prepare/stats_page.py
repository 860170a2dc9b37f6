"""`mutoscope data stats` for people: bars and suggested buckets on the terminal, and the same as a page."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mutoscope.data.prepare.shapes import Suggestion, to_toml
from mutoscope.data.prepare.stats import Histogram
from mutoscope.files import replacing

WIDTH = 40
"""Characters of the longest bar."""
HEAD = ("bucket", "batch", "clips", "enlarged", "cropped", "frames used")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; }
td, th { padding: .2rem 1.5rem .2rem 0; text-align: left; border-bottom: 1px solid var(--soft); }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
pre { background: var(--soft); padding: 1rem; border-radius: 4px; overflow-x: auto; }
"""


def print_histograms(console: Console, title: str, histograms: Sequence[Histogram]) -> None:
    """Bars for each histogram."""
    console.print(title, markup=False, highlight=False)
    for histogram in histograms:
        console.print(f"\n{histogram.name}", style="bold", markup=False, highlight=False)
        most = max(count for _, count in histogram.bars)
        wide = max(len(label) for label, _ in histogram.bars)
        for label, count in histogram.bars:
            console.print(f"  {label:>{wide}}  {_bar(count / most)} {count:,}", markup=False, highlight=False)


def print_suggestions(console: Console, suggestions: Sequence[Suggestion], too_short: int) -> None:
    """The buckets, as a table and as TOML."""
    console.print("\nsuggested buckets", style="bold", highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="")
    for n, name in enumerate(HEAD):
        table.add_column(name, justify="right" if n else "left", no_wrap=True)
    for row in _rows(suggestions, too_short):
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print(f"\n{to_toml(suggestions)}", markup=False, highlight=False, soft_wrap=True)


def _bar(share: float) -> str:
    """In eighths of a character; anything above 0 shows."""
    eighths = max(round(share * WIDTH * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def _rows(suggestions: Sequence[Suggestion], too_short: int) -> list[tuple[str, ...]]:
    rows = [
        (
            f"{s.bucket.frames} frames of {s.bucket.width}×{s.bucket.height}",
            str(s.bucket.batch_size),
            f"{s.clips:,}",
            f"{s.enlarged:,}",
            f"{s.cropped:.0%}",
            f"{s.used:.0%}",
        )
        for s in suggestions
    ]
    return [*rows, *([("none: too short", "", f"{too_short:,}", "", "", "")] if too_short else [])]


def write_page(
    path: Path, title: str, histograms: Sequence[Histogram], suggestions: Sequence[Suggestion], too_short: int
) -> None:
    """The page, all in one file. Raises FileNotFoundError where the folder is missing."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEAD)
    rows = _rows(suggestions, too_short)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    page = (
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        f"{_plots(histograms)}\n<h2>Suggested buckets</h2>\n<table><tr>{head}</tr>\n{body}</table>\n"
        f"<pre>{html.escape(to_toml(suggestions))}</pre>\n</html>\n"
    )
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8")


def _plots(histograms: Sequence[Histogram]) -> str:
    """All histograms as one SVG."""
    tall = -(-len(histograms) // 2)
    figure = Figure(figsize=(11, 2.9 * tall), layout="constrained")
    for axes, histogram in zip(figure.subplots(tall, 2, squeeze=False).flat, histograms, strict=False):
        labels, counts = zip(*histogram.bars, strict=True)
        places = range(len(labels))
        axes.barh(places, counts, color="#4477aa")
        axes.set_yticks(places, labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(histogram.name, fontsize=10, loc="left")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.xaxis.set_visible(False)
        axes.bar_label(axes.containers[0], fontsize=7, padding=2)
    for axes in figure.axes[len(histograms) :]:
        axes.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"
