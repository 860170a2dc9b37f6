"""report.html: what a run, or a chain of runs, did and made, on one page that needs nothing but its folder."""

from __future__ import annotations

import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from mutoscope.files import replacing
from mutoscope.run import Run

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } figcaption { opacity: .75; }
img, video, svg { max-width: 100%; height: auto; } img, video { image-rendering: pixelated; }
svg { background: #fff; border-radius: 4px; } code { background: var(--soft); padding: 0 .3em; border-radius: 3px; }
"""


@dataclass(frozen=True)
class Stage:
    """One stage of a chain of runs."""

    name: str
    seconds: float
    peak_memory: int
    """Bytes."""


def write_report(
    path: Path, title: str, runs: Mapping[str, Run], stages: Sequence[Stage] = (), figures: Mapping[str, float] = {}
) -> None:
    """Write the page.

    Args:
        path: of the HTML file; pictures and videos are linked relative to its folder.
        runs: by the heading of their part of the page.
        stages: time and memory of what was done, in order.
        figures: results to tell first.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if figures:
        parts.append(_table(("result", ""), [(name, _number(value)) for name, value in figures.items()]))
    if stages:
        rows = [(s.name, f"{s.seconds:.1f} s", f"{s.peak_memory / 2**30:.2f} GiB") for s in stages]
        rows.append(("total", f"{sum(s.seconds for s in stages):.1f} s", ""))
        parts.append(_table(("stage", "time", "peak memory"), rows))
    for heading, run in runs.items():
        parts += _run(heading, run, path.parent)
    page = (
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )
    with replacing(path) as aside:
        aside.write_text(page)


def _run(heading: str, run: Run, folder: Path) -> list[str]:
    environment = json.loads((run.folder / "environment.json").read_text())
    hardware = ", ".join(environment["gpus"]) or f"{environment['torch_threads']} CPU threads"
    recipe = os.path.relpath(run.recipe_file, folder)
    parts = [
        f"<h2>{html.escape(heading)}</h2>",
        f"<p><a href='{html.escape(recipe)}'>recipe.toml</a> · mutoscope {environment['versions']['mutoscope']}, "
        f"torch {html.escape(environment['versions']['torch'])}, {html.escape(hardware)}</p>",
        _curves(run.metrics()),
    ]
    evaluation = run.folder / "evaluation.json"
    if evaluation.exists():
        results = json.loads(evaluation.read_text())
        parts.append(_table(("metric", "value"), [(k, _number(v)) for k, v in results.items()]))
        parts.append(
            _film(run.folder / "evaluation", "Evaluation (docs/metrics.md says what each figure means)", folder)
        )
    previews = sorted(run.samples.glob("*.png"))
    if previews:
        parts.append(
            _film(
                previews[-1].with_suffix(""), f"Step {int(previews[-1].stem)}: val clips above, the model below", folder
            )
        )
    return parts


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The training and validation losses, as an SVG inside the page."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("val_loss", "validation")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "val_loss" else None, ms=3, lw=1.2)
    if any(line.get("loss", 0) > 0 for line in metrics):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _film(stem: Path, caption: str, folder: Path) -> str:
    video, image = (html.escape(os.path.relpath(stem.with_suffix(s), folder)) for s in (".mp4", ".png"))
    return (
        f"<figure><video src='{video}' autoplay loop muted playsinline controls></video>"
        f"<figcaption>{html.escape(caption)} · <a href='{image}'>a still</a></figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cell = lambda i, text: f"<td{' class=number' if i else ''}>{html.escape(text)}</td>"
    body = "".join("<tr>" + "".join(cell(i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + f"</tr>{body}</table>"


def _number(value: float) -> str:
    return f"{value:.4g}"
