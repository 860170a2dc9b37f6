"""PSNR, SSIM and codebook usage."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from mutoscope.autoencoders.conv import ConvAutoencoder
from mutoscope.autoencoders.presets import preset
from mutoscope.metrics.reconstruction import CodebookUsage, psnr, reconstruct_metrics, ssim
from mutoscope.types import ModelIO


def clips(batch: int = 2, frames: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_known_error():
    video = torch.zeros(2, 3, 4, 16, 16)
    off = video.clone()
    off[0] += 0.2  # a tenth of the range: 20 dB
    off[1] += 0.02
    torch.testing.assert_close(psnr(off, video), torch.tensor([20.0, 40.0]), rtol=1e-4, atol=1e-4)
    assert psnr(video, video).isinf().all()


def naive_ssim(x, y):
    """Wang et al. 2004 on one channel in [0, 1], its borders mirrored."""
    g = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = (g / g.sum()).outer(g / g.sum())[None, None]
    mirrored = lambda a: torch.nn.functional.pad(a[None, None], (5, 5, 5, 5), mode="reflect")
    blur = lambda a: torch.nn.functional.conv2d(mirrored(a), window)[0, 0]
    mx, my = blur(x), blur(y)
    vx, vy, cxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * cxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def test_ssim_equals_the_formula_on_pixels_of_0_to_1():
    a = clips(frames=2, size=24)
    b = (a + 0.3 * clips(frames=2, size=24, seed=1)).clamp(-1, 1)
    expected = [
        torch.stack([naive_ssim((a[i, c, t] + 1) / 2, (b[i, c, t] + 1) / 2) for c in range(3) for t in range(2)]).mean()
        for i in range(2)
    ]
    torch.testing.assert_close(ssim(b, a), torch.stack(expected), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))


def test_ssim_falls_with_noise_and_refuses_tiny_frames():
    a = clips(size=32)
    noisy = [ssim((a + s * clips(size=32, seed=1)).clamp(-1, 1), a).mean().item() for s in (0.1, 0.3, 0.9)]
    assert noisy == sorted(noisy, reverse=True)
    with pytest.raises(ValueError, match="8x8"):
        ssim(clips(size=8), clips(size=8))


def test_codebook_usage_accumulates():
    usage = CodebookUsage(8)
    usage.update(torch.tensor([[0, 0, 1]]))
    usage.update(torch.tensor([1, 2, 2]))
    assert usage.compute() == {"codebook_usage": 3 / 8, "perplexity": pytest.approx(3)}
    uniform = CodebookUsage(8)
    uniform.update(torch.arange(8))
    assert uniform.compute() == {"codebook_usage": 1, "perplexity": pytest.approx(8)}
    assert CodebookUsage(4).compute()["codebook_usage"] == 0


def test_metrics_of_a_model_are_over_all_clips_and_deterministic():
    torch.manual_seed(0)
    config = replace(preset("s4t4_b_vq"), num_codes=32)
    model = config.build(ModelIO(channels=3, grid=(4, 16, 16))).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = [clips(2), clips(1, seed=1)]
    metrics = reconstruct_metrics(model, data)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert metrics == reconstruct_metrics(model, iter(data))
    both = torch.cat(data)
    assert metrics["psnr"] == pytest.approx(psnr(model.decode(model.encode(both)), both).mean().item(), rel=1e-4)
    tokens = model.encode(both)
    assert metrics["codebook_usage"] == pytest.approx(len(tokens.unique()) / 32)
    assert 1 <= metrics["perplexity"] <= math.ceil(metrics["codebook_usage"] * 32)
    with pytest.raises(ValueError, match="no clips"):
        reconstruct_metrics(model, [])


def test_metrics_of_a_variational_model_are_of_the_mean():
    model = ConvAutoencoder(bottleneck="kl").build(ModelIO(channels=3, grid=(4, 16, 16)))
    metrics = reconstruct_metrics(model, [clips()])
    assert set(metrics) == {"psnr", "ssim"}
    mean = model.encode(clips())[:, :4]
    assert metrics["psnr"] == pytest.approx(psnr(model.decode(mean), clips()).mean().item(), rel=1e-5)


def test_torchvision_is_not_imported():
    assert "torchvision" not in sys.modules
