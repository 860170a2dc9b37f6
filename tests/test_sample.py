"""From a trained run to videos: what is drawn hangs on the seed, the video's number and its condition alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutoscope.data.flying_mnist import make, preset_named
from mutoscope.data.video import probe, read_frames
from mutoscope.evaluate import evaluate_run
from mutoscope.loading import load_recipe
from mutoscope.report import Stage, write_report
from mutoscope.run import Run
from mutoscope.sample import conditions, load_generator, sample_run, sample_videos
from mutoscope.text.encoders import HashedWords
from mutoscope.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A transformer on pixels, conditioned on digits and captions."""
    recipe = replace(load_recipe("minisora.dit_tiny"), text=HashedWords(width=16, max_length=8), sample_every=0)
    return train(recipe, tmp_path_factory.mktemp("runs") / "dit")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = replace(load_recipe("minisora.vqvae_tiny"), sample_every=0)
    return train(recipe, tmp_path_factory.mktemp("runs") / "vqvae")


def test_a_video_hangs_on_its_seed_and_number_alone(run: Run) -> None:
    generator = load_generator(run.folder)
    cond = conditions(generator, 6, 3, "a red 3 flies up")
    many = list(sample_videos(generator, cond, 6, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(many, sample_videos(generator, cond, 6, seed=1), strict=True))
    alone = next(sample_videos(generator, cond.rows(slice(1)), 1, seed=1))
    assert (alone.int() - many[0].int()).abs().max() <= 1  # matrix products of another batch size, rounded to bytes
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many[0], next(sample_videos(generator, cond, 6, seed=2)))


def test_conditions_and_guidance_matter(run: Run) -> None:
    generator = load_generator(run.folder)
    draw = lambda cond: next(sample_videos(generator, cond, 1, seed=0)).int()
    three = draw(conditions(generator, 1, 3, None))
    assert (three - draw(conditions(generator, 1, 8, None))).abs().max() > 0
    sampler = replace(generator.recipe.sampler, guidance_scale=9.0)
    generator = replace(generator, recipe=replace(generator.recipe, sampler=sampler))
    assert (three - draw(conditions(generator, 1, 3, None))).abs().max() > 0


def test_sample_run_writes_mp4s(run: Run, tmp_path: Path) -> None:
    [path] = sample_run(run.folder, out=tmp_path / "a.mp4", label=3, prompt="a red 3 flies up")
    info = probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (4, 16, 16, 8)
    assert read_frames(path, range(4)).any()
    paths = sample_run(run.folder, num=2, label=3, steps=2)
    assert [p.name for p in paths] == ["label3-seed0-0.mp4", "label3-seed0-1.mp4"]
    assert paths[0].parent == run.folder / "drawn"


def test_what_a_model_cannot_do_is_said(run: Run, autoencoder: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--label 10: the model's labels are 0 to 9"):
        sample_run(run.folder, label=10)
    with pytest.raises(ValueError, match="does not generate"):
        sample_run(autoencoder.folder)
    with pytest.raises(FileNotFoundError, match="no run here"):
        sample_run(tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        sample_run(run.folder, num=0)
    with pytest.raises(ValueError, match=r"sampler\.steps"):
        sample_run(run.folder, steps=0)


def test_evaluation_of_a_generator(run: Run) -> None:
    figures = evaluate_run(run.folder, num=12)
    assert {"frechet_random_conv", "glyph_accuracy", "displacement", "seconds_per_clip"} <= figures.keys()
    assert 0 <= figures["glyph_accuracy"] < 0.9  # it was trained for seconds
    assert figures["frechet_random_conv"] > 0
    again = evaluate_run(run.folder, num=12)
    assert {k: v for k, v in figures.items() if k != "seconds_per_clip"} == {
        k: v for k, v in again.items() if k != "seconds_per_clip"
    }
    assert (run.folder / "evaluation.json").exists()
    assert probe(run.folder / "evaluation.mp4").frames == 4


def test_evaluation_of_an_autoencoder(autoencoder: Run) -> None:
    figures = evaluate_run(autoencoder.folder, num=12)
    assert {"psnr", "ssim", "codebook_usage", "perplexity"} == figures.keys()
    assert 5 < figures["psnr"] < 60


def test_the_report_is_whole_and_links_what_is_there(run: Run, autoencoder: Run, tmp_path: Path) -> None:
    evaluate_run(run.folder, num=4)
    page = run.folder.parent / "report.html"
    stages = [Stage(name="train <it>", seconds=61.5, peak_memory=3 << 29)]
    write_report(page, "A & B", {"Model": run, "Autoencoder": autoencoder}, stages, {"dit.glyph_accuracy": 0.975})
    text = page.read_text()
    assert "A &amp; B" in text
    assert "train &lt;it&gt;" in text
    assert "1.50 GiB" in text
    assert "0.975" in text
    assert text.count("<svg") == 2
    links = [part.split("'")[0] for part in text.replace("href='", "src='").split("src='")[1:]]
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_glyph_metric_keeps_silent_about_clips_without_labels(tmp_path: Path) -> None:
    make(tmp_path / "clips", preset_named("tiny"), workers=1, train=4, val=4, progress=False)
    for label in (tmp_path / "clips").glob("*/*.json"):
        label.unlink()
    recipe = load_recipe("quickstart.text_to_video_tiny")
    recipe = replace(recipe, steps=1, sample_every=0, data=replace(recipe.data, root=str(tmp_path / "clips")))
    figures = evaluate_run(train(recipe, tmp_path / "run").folder, num=4)
    assert "frechet_random_conv" in figures
    assert "glyph_accuracy" not in figures
