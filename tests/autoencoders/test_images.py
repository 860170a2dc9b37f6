"""Stable Diffusion's autoencoder, frame by frame: diffusers' own latents, with the checkpoint's scaling factor."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mutoscope.autoencoders.pretrained import load_autoencoder, pretrained_spec, pretrained_stats
from mutoscope.build import build_encoder, model_io
from mutoscope.checkpoints import hash_part, part_folder
from mutoscope.encode import encode
from mutoscope.loading import load_recipe
from mutoscope.models.dit import DiT
from mutoscope.recipe import Autoencoder, Recipe
from mutoscope.sample import sample_run
from mutoscope.training.loop import train

PATH = "tiny://sd-vae"
CONFIG = Autoencoder(path=PATH, recipe=None)


def diffusers_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(part_folder(PATH, "vae"))


def a_video(frames: int = 11) -> Tensor:
    return torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def recipe() -> Recipe:
    tiny = load_recipe("minisora.latte_tiny")
    return replace(
        tiny, autoencoder=CONFIG, model=DiT(depth=2, width=16, heads=2), steps=2, batch_size=2, sample_every=0,
        validate_every=0,
    )  # fmt: skip


def test_every_frame_is_encoded_and_decoded_by_itself() -> None:
    ours, theirs, video = load_autoencoder(CONFIG), diffusers_vae(), a_video()
    with torch.no_grad():
        moments = ours.encode(video)  # type: ignore[operator]
        assert moments.shape == (2, 8, 11, 2, 3)
        decoded = ours.decode(moments[:, :4])  # type: ignore[operator]
        for b, t in ((0, 0), (1, 7), (1, 10)):
            posterior = theirs.encode(video[b : b + 1, :, t]).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], 1)
            torch.testing.assert_close(moments[b : b + 1, :, t], expected, atol=1e-5, rtol=1e-5)
            frame = theirs.decode(posterior.mean).sample
            torch.testing.assert_close(decoded[b : b + 1, :, t], frame, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="height=20 does not fit"):
        ours.encode(torch.zeros(1, 3, 2, 20, 24))  # type: ignore[operator]


def test_latents_are_scaled_by_the_checkpoints_own_factor(tmp_path: Path) -> None:
    assert pretrained_spec(PATH).strides == (1, 8, 8) and pretrained_spec(PATH).channels == 4
    assert pretrained_stats(PATH).std == (pytest.approx(1 / 0.18215),) * 4
    encoder = build_encoder(recipe(), torch.device("cpu"))
    moments = encoder.moments(a_video(2))
    torch.testing.assert_close(encoder.latents(moments), moments[:, :4] * 0.18215)
    folder = tmp_path / "flux"
    shutil.copytree(part_folder(PATH, "vae"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5, "shift_factor": 0.25}))
    stats = pretrained_stats(str(folder))
    assert (stats.mean, stats.std) == ((0.25,) * 4, (2.0,) * 4)


def test_a_pipelines_autoencoder_is_found_in_its_folder(tmp_path: Path) -> None:
    shutil.copytree(part_folder(PATH, "vae"), tmp_path / "pipeline" / "vae")
    assert hash_part(str(tmp_path / "pipeline"), "vae") == hash_part(PATH, "vae")
    inside = load_autoencoder(replace(CONFIG, path=str(tmp_path / "pipeline")))
    alone = load_autoencoder(CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(inside.parameters(), alone.parameters(), strict=True))


def test_files_of_old_versions_of_diffusers_load(tmp_path: Path) -> None:
    """stabilityai/sd-vae-ft-mse calls attention's layers query, key, value and proj_attn."""
    folder = tmp_path / "old"
    shutil.copytree(part_folder(PATH, "vae"), folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights, renamed = load_file(file), 0
    for new, old in names.items():
        renamed += sum(new in key for key in weights)
        weights = {key.replace(new, old): value for key, value in weights.items()}
    assert renamed == 16
    save_file(weights, file)
    old, present = load_autoencoder(replace(CONFIG, path=str(folder))), load_autoencoder(CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), present.parameters(), strict=True))
    weights["decoder.stranger"] = torch.zeros(1)
    save_file(weights, file)
    with pytest.raises(ValueError, match="1 unexpected"):
        load_autoencoder(replace(CONFIG, path=str(folder)))


def test_latte_learns_its_latents(tmp_path: Path) -> None:
    """Encode once, train on windows of what is stored, draw."""
    encode(recipe(), tmp_path / "store", progress=False)
    stored = replace(recipe(), data=replace(recipe().data, latents=str(tmp_path / "store"), cache=False))
    assert model_io(stored).grid == (2, 2, 2) and model_io(stored).channels == 4
    run = train(stored, tmp_path / "run")
    [path] = sample_run(run.folder, out=tmp_path / "a.mp4")
    assert path.exists()
