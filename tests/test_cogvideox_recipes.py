"""Fine-tuning CogVideoX end to end on random tiny checkpoints in the real format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mutoscope.checkpoints import hash_part
from mutoscope.data.video import write_video
from mutoscope.encode import encode
from mutoscope.encoder import Encoder
from mutoscope.estimate.step import estimate
from mutoscope.models.cogvideox import CogVideoX
from mutoscope.recipe import Optim, Recipe
from mutoscope.recipes import cogvideox
from mutoscope.run import Run
from mutoscope.sample_cogvideox import sample_cogvideox
from mutoscope.training.loop import train
from mutoscope.weights import read_weights

TINY = [cogvideox.t2v_lora_tiny, cogvideox.i2v_lora_tiny, cogvideox.t2v_full_tiny, cogvideox.i2v_full_tiny]
VARIANTS = ["tiny://cogvideox-2b", "tiny://cogvideox-1.5-t2v", "tiny://cogvideox-1.5-i2v"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five clips with captions: the autoencoder is what takes time on a CPU."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(5):
        drawn = np.random.default_rng(i).integers(0, 256, (9, 32, 48, 3), np.uint8)
        write_video(folder / f"{i}.mp4", drawn, 8, lossless=True)
        (folder / f"{i}.txt").write_text(f"noise number {i}")
    return str(folder)


def short(recipe: Recipe, root: str) -> Recipe:
    data = replace(recipe.data, root=root)
    return replace(recipe, data=data, steps=2, validate_every=0, log_every=1, save_every=1)


def equal(a: Path, b: Path) -> bool:
    x, y = (read_weights(Run(folder).weights) for folder in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("recipe", TINY, ids=lambda f: f.__name__)
def test_every_recipe_trains_from_clips_and_from_a_store_alike_and_resumes(
    recipe: object, tmp_path: Path, root: str
) -> None:
    """The noise on the first frame included, which cogvideox-factory loses with --load_tensors."""
    ours = short(recipe(), root)  # type: ignore[operator]
    train(ours, tmp_path / "clips")
    encode(ours, tmp_path / "store", progress=False)
    stored = replace(ours, data=replace(ours.data, latents=str(tmp_path / "store"), cache=False))
    train(stored, tmp_path / "stored")
    assert equal(tmp_path / "clips", tmp_path / "stored")
    train(replace(stored, steps=1), tmp_path / "resumed")
    train(stored, tmp_path / "resumed")
    assert equal(tmp_path / "stored", tmp_path / "resumed")


@pytest.mark.parametrize("path", VARIANTS)
def test_every_variant_trains_by_its_own_schedule(path: str, tmp_path: Path, root: str) -> None:
    base = cogvideox.i2v_lora_tiny() if path.endswith("i2v") else cogvideox.t2v_lora_tiny()
    model = replace(base.model, path=path)  # type: ignore[call-arg]
    run = train(replace(short(base, root), model=model), tmp_path / "run")
    objective = run.recipe.objective
    assert objective.snr_shift_scale == (3.0 if "2b" in path else 1.0)  # type: ignore[attr-defined]
    assert objective.temporal_patch == (2 if "1.5" in path else 1)  # type: ignore[attr-defined]


def test_from_a_store_neither_text_encoder_nor_autoencoder_is_loaded(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = short(cogvideox.t2v_lora_tiny(), root)
    encode(ours, tmp_path / "store", progress=False)
    refuse = property(lambda self: pytest.fail("loaded"))
    monkeypatch.setattr(Encoder, "autoencoder", refuse)
    monkeypatch.setattr(Encoder, "embed", refuse)
    train(replace(ours, data=replace(ours.data, latents=str(tmp_path / "store"), cache=False)), tmp_path / "run")


def test_a_lora_trains_adapters_alone_in_fp32_over_a_bf16_base(tmp_path: Path, root: str) -> None:
    recipe = short(cogvideox.t2v_lora_tiny(), root)
    before = hash_part("tiny://cogvideox-t2v", "transformer")
    recipe = replace(recipe, model=CogVideoX(path="tiny://cogvideox-t2v", weights="bf16"))
    run = train(recipe, tmp_path / "run")
    state = read_weights(run.weights)
    assert len(state) == 2 * 4 * 2 and all("lora_" in key and t.dtype == torch.float32 for key, t in state.items())
    assert sum(f.stat().st_size for f in (tmp_path / "run/checkpoints/00000002").iterdir()) < 200_000
    assert hash_part("tiny://cogvideox-t2v", "transformer") == before


def test_another_checkpoints_store_is_refused(tmp_path: Path, root: str) -> None:
    ours = short(cogvideox.t2v_lora_tiny(), root)
    encode(ours, tmp_path / "store", progress=False)
    other = replace(ours, model=CogVideoX(path="tiny://cogvideox-2b", weights="fp32"),
                    data=replace(ours.data, latents=str(tmp_path / "store"), cache=False))  # fmt: skip
    with pytest.raises(ValueError, match="this store was made otherwise"):
        train(other, tmp_path / "run")


def test_frames_that_do_not_fit_are_told_with_the_nearest_that_do(tmp_path: Path, root: str) -> None:
    ours = short(cogvideox.t2v_lora_tiny(), root)
    with pytest.raises(ValueError, match=r"nearest: .*9.*17"):
        train(replace(ours, data=replace(ours.data, frames=13)), tmp_path / "run")


def test_a_validation_file_is_drawn_before_step_1_and_as_sample_draws_it(tmp_path: Path, root: str) -> None:
    """Bit for bit: inference that differs from validation is what users of every trainer report."""
    (tmp_path / "val.jsonl").write_text(
        '{"prompt": "a red 3", "seed": 1, "steps": 2}\n{"prompt": "another", "height": 64}\n'
    )
    recipe = replace(short(cogvideox.t2v_lora_tiny(), root), validation_file=str(tmp_path / "val.jsonl"))
    run = train(replace(recipe, sample_every=2), tmp_path / "run")
    assert len(list((run.samples / "00000000").glob("*.mp4"))) == 2
    (drawn,) = sample_cogvideox(str(run.folder), out=tmp_path / "a.mp4", wishes={"prompt": "a red 3", "seed": 1})
    trained, fresh = (run.samples / f"0000000{step}/0-a-red-3.mp4" for step in (2, 0))
    assert drawn.read_bytes() == trained.read_bytes() != fresh.read_bytes()


def test_a_validation_file_with_faults_stops_the_start(tmp_path: Path, root: str) -> None:
    (tmp_path / "val.jsonl").write_text('{"prompt": "a red 3", "frmes": 9}\n')
    recipe = replace(short(cogvideox.t2v_lora_tiny(), root), validation_file=str(tmp_path / "val.jsonl"))
    with pytest.raises(ValueError, match=r"frmes; did you mean frames\?"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    "levers",
    [
        {"quantize": "int8", "optim": Optim(name="adamw8bit", lr=1e-3)},
        {"quantize": "nf4", "optim": Optim(name="came", lr=1e-3)},
        {"lora": None, "weights": "bf16",
         "optim": Optim(name="adamw4bit", lr=1e-3, max_grad_norm=0.0, release_gradients=True)},
    ],
    ids=["int8-8bit", "nf4-came", "bf16-4bit-release"],
)  # fmt: skip
def test_levers_train_resume_exactly_and_are_estimated(levers: dict[str, object], tmp_path: Path, root: str) -> None:
    recipe = replace(short(cogvideox.t2v_lora_tiny(), root), **levers)  # type: ignore[arg-type]
    train(recipe, tmp_path / "whole")
    train(replace(recipe, steps=1), tmp_path / "resumed")
    train(recipe, tmp_path / "resumed")
    assert equal(tmp_path / "whole", tmp_path / "resumed")
    assert estimate(recipe).peak_bytes > 0


def test_offloading_without_a_gpu_is_refused_before_anything_is_made(tmp_path: Path, root: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="offload_blocks: moves memory from a GPU"):
        train(replace(short(cogvideox.t2v_lora_tiny(), root), offload_blocks=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
