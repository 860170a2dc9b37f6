"""The demo's chain from clips to report, with training cut to seconds; what it reaches in full is in the README."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mutoscope.data.video import probe
from mutoscope.demo import demo
from mutoscope.recipe import Sampler
from mutoscope.recipes import quickstart


def test_the_whole_chain_and_again(tmp_path: Path) -> None:
    autoencoder = replace(quickstart.autoencoder(), steps=20, validate_every=0, sample_every=20)
    transformer = replace(quickstart.dit(), steps=5, validate_every=0, sample_every=5, sampler=Sampler(steps=2))
    chain = lambda: demo(tmp_path, autoencoder=autoencoder, transformer=transformer, clips=64, num=20)
    figures = chain()
    assert figures["dit.glyph_accuracy_of_real_clips"] > 0.99
    assert 0 <= figures["dit.glyph_accuracy"] < 0.6
    assert figures["autoencoder.psnr"] > 10
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert probe(tmp_path / "videos" / "digit-7.mp4").frames == 8
    assert {"report.html", "digits.png"} <= {p.name for p in tmp_path.iterdir()}
    weights = tmp_path / "dit" / "final" / "model.safetensors"
    before = weights.read_bytes()
    again = chain()
    assert weights.read_bytes() == before
    del again["dit.seconds_per_clip"], figures["dit.seconds_per_clip"]
    assert again == figures
