"""The Fréchet distance: of a set to itself 0, of Gaussians the closed form, of noisier videos larger."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mutoscope.data.flying_mnist import preset_named, render
from mutoscope.metrics.frechet import FrechetDistance, frechet_distance, i3d_features, random_conv_features


def clips(first: int, count: int) -> Tensor:
    preset = preset_named("tiny")
    return torch.stack([torch.from_numpy(render(preset, "train", first + i).frames) for i in range(count)])


def distance(real: Tensor, drawn: Tensor) -> float:
    metric = FrechetDistance(random_conv_features(width=16))
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return metric.compute()


def test_a_set_is_at_distance_zero_from_itself_in_any_order_and_grouping() -> None:
    videos = clips(0, 40)  # fewer than features, so that the covariance is singular
    assert distance(videos, videos) < 1e-6
    metric = FrechetDistance(random_conv_features(width=16))
    for part in videos.flip(0).split([1, 7, 32]):
        metric.update(part, real=False)
    metric.update(videos, real=True)
    assert metric.compute() < 1e-6


def test_it_is_symmetric_and_grows_with_noise() -> None:
    real, other = clips(0, 40), clips(40, 40)
    assert distance(real, other) == pytest.approx(distance(other, real), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(other.shape, generator=generator)
    noisy = [distance(real, (other + level * noise).clamp(0, 255).byte()) for level in (0, 10, 30, 60, 120)]
    assert noisy == sorted(noisy)
    assert noisy[-1] > 3 * noisy[0]


def test_gaussians_closed_form() -> None:
    """Diagonal covariances commute: Σ (μ₁ − μ₂)² + (σ₁ − σ₂)². And a rotation of both changes nothing."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    mean1, mean2, std1, std2 = random(8), random(8), random(8).abs(), random(8).abs()
    std1[3] = 0  # singular
    expected = float((mean1 - mean2).square().sum() + (std1 - std2).square().sum())
    for turn in (torch.eye(8, dtype=torch.float64), torch.linalg.qr(random(8, 8))[0]):
        cov1, cov2 = (turn @ std.square().diag() @ turn.T for std in (std1, std2))
        assert frechet_distance(turn @ mean1, cov1, turn @ mean2, cov2) == pytest.approx(expected, rel=1e-6)


def test_covariances_that_do_not_commute() -> None:
    """Of 2 × 2 matrices, tr (Σ₁Σ₂)^½ = √(tr Σ₁Σ₂ + 2 √(det Σ₁ det Σ₂))."""
    one = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    two = torch.tensor([[5.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    cross = ((one @ two).trace() + 2 * (one.det() * two.det()).sqrt()).sqrt()
    expected = float(one.trace() + two.trace() - 2 * cross)
    assert frechet_distance(zero, one, zero, two) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zero, two, zero, one) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances_keep_their_digits() -> None:
    """Two sets that vary along different axes of very many: nothing cancels, and rounding must not seem to."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    one, two = (100 * part @ part.T for part in (axes[:, :30], axes[:, 30:60]))
    zero = torch.zeros(300, dtype=torch.float64)
    assert frechet_distance(zero, one, zero, two) == pytest.approx(6000, rel=1e-12)


def test_features_far_from_zero_keep_their_covariance() -> None:
    """Features of any network are welcome, also those that hardly vary about a large mean."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randint(0, 256, (30, 1, 2, 2, 3), generator=generator, dtype=torch.uint8) for _ in "ab")
    distances = []
    for offset in (0.0, 1e8):
        metric = FrechetDistance(lambda videos, offset=offset: videos.flatten(1).double() / 255 + offset)  # type: ignore[misc]
        metric.update(one, real=True)
        metric.update(two, real=False)
        distances.append(metric.compute())
    assert distances[1] == pytest.approx(distances[0], rel=1e-5)


def test_too_few_videos_are_refused() -> None:
    metric = FrechetDistance(random_conv_features(width=16))
    metric.update(clips(0, 2), real=True)
    metric.update(clips(0, 1), real=False)
    with pytest.raises(ValueError, match="at least two real and two drawn"):
        metric.compute()


class StandIn(torch.nn.Module):
    """What i3d_torchscript.pt looks like from outside."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale and not resize and return_features
        assert x.shape[1] == 3 and x.shape[3] == 224 and x.shape[4] == 224
        return torch.stack([x.mean((1, 2, 3, 4)), x.amax((1, 2, 3, 4))], dim=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_i3d_is_fed_what_it_expects(tmp_path: Path) -> None:
    torch.jit.script(StandIn()).save(str(tmp_path / "i3d.pt"))
    features = i3d_features(tmp_path / "i3d.pt")
    white = torch.full((2, 4, 16, 24, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(features(white), torch.ones(2, 2))
    with pytest.raises(FileNotFoundError, match="i3d_torchscript"):
        i3d_features(tmp_path / "nowhere.pt")
    (tmp_path / "other.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"other\.pt: not a TorchScript file"):
        i3d_features(tmp_path / "other.pt")
