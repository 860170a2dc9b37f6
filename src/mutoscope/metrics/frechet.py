"""Fréchet distance between two sets of videos, in the features of any network.

With I3D features this is FVD (arXiv:1812.01717); the distance is that of two Gaussians fitted to the features
(arXiv:1706.08500 eq. 6): |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from mutoscope.randomness import seed_of

Features = Callable[[UInt8[Tensor, "b t h w 3"]], Float[Tensor, "b d"]]
"""Videos at rest -> a vector for each."""
BATCH = 16
"""Videos that go through the features at a time."""


class FrechetDistance:
    """Collects features of real and of drawn videos; the distance of the two sets so far.

    All of it is double precision, so that neither the order nor the grouping of videos matters to the digits one reads.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self._sums: dict[bool, _Moments] = {}

    def update(self, videos: UInt8[Tensor, "b t h w 3"], real: bool) -> None:
        """Take in videos of either set."""
        for part in videos.split(BATCH):
            values = self.features(part).double().cpu()
            self._sums.setdefault(real, _Moments(values.shape[1])).add(values)

    def compute(self) -> float:
        """The distance. Raises ValueError before there are two videos of each set."""
        if {real for real, m in self._sums.items() if m.count >= 2} != {True, False}:
            raise ValueError("the Fréchet distance needs at least two real and two drawn videos")
        return frechet_distance(*self._sums[True].mean_and_covariance(), *self._sums[False].mean_and_covariance())


class _Moments:
    """Mean and covariance of vectors that come in parts (Chan, Golub and LeVeque 1979), each centred before it is
    squared: sums of squares would lose the covariance of features that lie far from zero."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, values: Float64[Tensor, "b d"]) -> None:
        total, mean = self.count + len(values), values.mean(0)
        centred, apart = values - mean, mean - self.mean
        self.scatter += centred.T @ centred + self.count * len(values) / total * apart.outer(apart)
        self.mean += len(values) / total * apart
        self.count = total

    def mean_and_covariance(self) -> tuple[Float64[Tensor, "d"], Float64[Tensor, "d d"]]:
        return self.mean, self.scatter / (self.count - 1)


def frechet_distance(
    mean1: Float64[Tensor, "d"],
    covariance1: Float64[Tensor, "d d"],
    mean2: Float64[Tensor, "d"],
    covariance2: Float64[Tensor, "d d"],
) -> float:
    """The distance of two Gaussians; covariances may be singular, as those of fewer videos than features are.

    With Σ = R·Rᵀ, tr (Σ₁Σ₂)^½ is the sum of the singular values of R₁ᵀR₂. (Or of the roots of the eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½; but the root of an eigenvalue that should be 0 is 1e-8, and singular covariances have hundreds.)
    """
    cross = torch.linalg.svdvals(_root(covariance1).T @ _root(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _root(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """R with R·Rᵀ = Σ; eigenvalues that are rounding errors are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().amax()
    return vectors * torch.where(values > rounding, values, 0.0).sqrt()


def random_conv_features(seed: int = 0, width: int = 64) -> Features:
    """The features of a fixed random 3D convolutional network: nothing to download, and cheap.

    For comparing models on one data set. The numbers mean nothing across data sets, seeds or papers.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "random_conv_features"))
    channels = (3, width // 4, width // 2, width)
    weights = []
    for fan_in, fan_out in itertools.pairwise(channels):
        weight = torch.randn(fan_out, fan_in, 3, 3, 3, generator=generator)
        weights.append(weight * (2 / weight[0].numel()) ** 0.5)  # keeps the variance through a ReLU

    @torch.no_grad()
    def features(videos: UInt8[Tensor, "b t h w 3"]) -> Float[Tensor, "b d"]:
        x = videos.movedim(-1, 1).float() / 127.5 - 1
        levels = []
        for i, weight in enumerate(weights):
            stride = (1, 1, 1) if i == 0 else (min(2, x.shape[2]), 2, 2)
            x = F.relu(F.conv3d(x, weight.to(x.device), stride=stride, padding=1))
            levels += [x.mean((2, 3, 4)), x.std((2, 3, 4), correction=0)]
        return torch.cat(levels, dim=1)

    return features


def i3d_features(path: str | Path, device: torch.device | str = "cpu") -> Features:
    """The 400 features of I3D that published FVDs are computed from, from the usual TorchScript file.

    Frames are squashed to 224 × 224 without antialiasing, as published numbers have them.

    path: of ``i3d_torchscript.pt`` (as StyleGAN-V and others use it). Its program is run, by TorchScript, which knows
        no Python.
    Raises FileNotFoundError where there is no such file, ValueError where it is none of TorchScript's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; FVD needs i3d_torchscript.pt there")
    try:
        network: nn.Module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path}: not a TorchScript file: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def features(videos: UInt8[Tensor, "b t h w 3"]) -> Float[Tensor, "b d"]:
        frames = videos.to(device).movedim(-1, 2).float() / 127.5 - 1  # (b, t, 3, h, w)
        b, t = frames.shape[:2]
        frames = F.interpolate(frames.flatten(0, 1), size=(224, 224), mode="bilinear")
        clips = frames.unflatten(0, (b, t)).transpose(1, 2)
        found: Tensor = network(clips, rescale=False, resize=False, return_features=True)
        return found

    return features
