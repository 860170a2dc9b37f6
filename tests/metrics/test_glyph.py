"""The glyph metric recognises digits in other hands, blurred or noisy, and believes nothing that is not there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.data.flying_mnist import PRESETS, Preset, render
from mutoscope.metrics.glyph import NO_DIGIT, GlyphMetric

EASY = Preset(name="easy", size=32, frames=8, fps=8, glyph=(18, 18), speeds=(1.0, 1.5, 2.0), train=9, val=9)
COUNT = 120


def clips(preset, count):
    drawn = [render(preset, "val", i) for i in range(count)]
    labels = torch.tensor([c.digits[0].digit for c in drawn])
    steps = [np.linalg.norm(np.diff(c.digits[0].positions, axis=0), axis=1).mean() for c in drawn]
    return torch.from_numpy(np.stack([c.frames for c in drawn])), labels, torch.tensor(steps).float()


@pytest.fixture(scope="module")
def easy():
    return GlyphMetric(EASY), *clips(EASY, COUNT)


def filtered(videos: Tensor, kind: str) -> Tensor:
    b, t, h, w, c = videos.shape
    x = videos.float().div(255).permute(0, 1, 4, 2, 3).reshape(-1, 1, h, w)
    if kind == "halved":
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    else:
        kernel = torch.exp(-0.5 * (torch.arange(-4, 5) / 1.2) ** 2)
        kernel = kernel / kernel.sum()
        x = F.conv2d(x, (kernel[:, None] * kernel)[None, None], padding=4)
    return x.reshape(b, t, c, h, w).permute(0, 1, 3, 4, 2)


def test_held_out_clips_are_recognised_and_their_motion_measured(easy):
    metric, videos, labels, steps = easy
    figures = metric.accuracy(videos, labels)
    assert figures["glyph_accuracy"] >= 0.99 and figures["glyph_frame_accuracy"] >= 0.99
    assert figures["glyph_similarity"] > 0.93 and figures["foreground"] == 1
    assert figures["motion_error"] < 0.1
    seen = metric.classify(videos)
    torch.testing.assert_close(seen.displacement, steps, atol=1e-3, rtol=0)
    assert figures["displacement"] == pytest.approx(steps.mean().item(), abs=1e-3)


@pytest.mark.parametrize("name", ["demo", "small"])
def test_presets_are_recognised(name):
    preset = replace(PRESETS[name], digits=(1, 1))
    videos, labels, _ = clips(preset, 50)
    assert GlyphMetric(preset).accuracy(videos, labels)["glyph_accuracy"] == 1


@pytest.mark.parametrize("kind", ["halved", "gaussian"])
def test_blurred_clips_are_still_recognised(easy, kind):
    metric, videos, labels, _ = easy
    figures = metric.accuracy(filtered(videos, kind), labels)
    assert figures["glyph_accuracy"] >= 0.98 and figures["glyph_frame_accuracy"] >= 0.98
    assert figures["motion_error"] < 0.15


def test_noisy_clips_are_still_recognised(easy):
    metric, videos, labels, _ = easy
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    assert metric.accuracy(videos / 255 + 0.15 * noise, labels)["glyph_accuracy"] >= 0.98


def test_wrong_labels_score_nothing(easy):
    metric, videos, labels, _ = easy
    for shift in (1, 3, 5):
        assert metric.accuracy(videos, (labels + shift) % 10)["glyph_accuracy"] <= 0.01


def test_noise_scores_by_chance_and_looks_like_no_digit(easy):
    metric, videos, _, _ = easy
    noise = torch.randint(256, videos.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    figures = metric.accuracy(noise, torch.arange(COUNT) % 10)
    assert figures["glyph_accuracy"] < 0.2 and figures["glyph_similarity"] < 0.5
    assert figures["motion_error"] > 3


def test_blobs_look_like_no_digit(easy):
    metric = easy[0]
    blob = torch.zeros(1, 8, 32, 32, 3)
    blob[:, :, 8:24, 8:24] = 1
    assert metric.classify(blob).similarity < 0.6


def test_blank_frames_count_as_wrong_and_blank_clips_have_no_digit(easy):
    metric, videos, labels, _ = easy
    half = videos.clone()
    half[:, ::2] = 0
    seen = metric.classify(half)
    assert (seen.per_frame[:, ::2] == NO_DIGIT).all() and (seen.per_clip == labels).float().mean() >= 0.98
    assert (seen.displacement == 0).all()  # No two neighbours to measure between.
    figures = metric.accuracy(half, labels)
    assert figures["foreground"] == 0.5 and figures["glyph_frame_accuracy"] <= 0.5
    black = metric.classify(torch.zeros_like(videos[:2]))
    assert (black.per_clip == NO_DIGIT).all() and (black.similarity == 0).all() and not black.foreground.any()


def test_wrong_motion_shows(easy):
    metric, videos, labels, steps = easy
    still = metric.accuracy(videos[:, :1].expand_as(videos), labels)
    assert still["displacement"] == 0 and still["motion_error"] == pytest.approx(steps.mean().item(), abs=0.1)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    assert metric.accuracy(videos[:, order], labels)["motion_error"] > 0.5
    assert metric.accuracy(videos[:, order], labels)["glyph_accuracy"] >= 0.99


def test_colour_brightness_and_specks_do_not_matter(easy):
    metric, videos, labels, _ = easy
    dim = (videos.float() * 0.3).byte()
    dim[:, :, ::9, ::9] = torch.maximum(dim[:, :, ::9, ::9], torch.tensor(60, dtype=torch.uint8))
    assert metric.accuracy(dim, labels)["glyph_accuracy"] >= 0.98


def test_bytes_floats_and_batches_agree(easy):
    metric, videos, _, _ = easy
    a, b = metric.classify(videos[:20]), metric.classify(videos[:20].double() / 255)
    assert torch.equal(a.per_frame, b.per_frame)
    torch.testing.assert_close(a.similarity, b.similarity)
    alone = torch.cat([metric.classify(v[None]).similarity for v in videos[:20]])
    torch.testing.assert_close(a.similarity, alone)


def test_what_it_cannot_judge_is_refused(easy):
    metric, videos, _, _ = easy
    with pytest.raises(ValueError, match="needs frames of 32 × 32 pixels; got 16 × 32"):
        metric.classify(videos[:, :, :16])
    with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
        metric.classify(videos[:4] / 127.5 - 1)
    with pytest.raises(ValueError, match="clips of one digit"):
        GlyphMetric(PRESETS["small"])
