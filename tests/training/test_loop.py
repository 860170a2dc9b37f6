"""The contracts of training: resumed runs are bit-identical, accumulation is a larger batch, bad steps are skipped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mutoscope.models.dit import DiT
from mutoscope.objectives.diffusion import Diffusion
from mutoscope.randomness import Draw
from mutoscope.recipe import Data, ObjectiveConfig, Optim, Recipe, Sampler
from mutoscope.run import Run
from mutoscope.training.loop import train
from mutoscope.training.signals import Stopped
from mutoscope.types import Batch, Loss
from mutoscope.weights import read_weights


def tiny(**changes: object) -> Recipe:
    """Seconds on a CPU; every part of the loop is used."""
    recipe = Recipe(
        data=Data(root="flying-mnist://tiny", frames=4, height=16, width=16, num_labels=10),
        model=DiT(depth=2, width=16, heads=2, patch=(2, 8, 8)),
        objective=Diffusion(),
        sampler=Sampler(steps=2, guidance_scale=2.0),
        optim=Optim(lr=1e-3, warmup_steps=3, schedule="cosine", weight_decay=0.01),
        steps=8,
        batch_size=4,
        ema=0.9,
        log_every=1,
        validate_every=4,
        sample_every=0,
        save_every=2,
        num_samples=2,
    )
    return replace(recipe, **changes)  # type: ignore[arg-type]


def weights(run: Run) -> dict[str, Tensor]:
    return read_weights(run.weights)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_training_lowers_the_loss_and_leaves_a_complete_run(tmp_path: Path) -> None:
    run = train(tiny(steps=40, sample_every=20), tmp_path / "run")
    losses = [line["val_loss"] for line in run.metrics() if "val_loss" in line]
    assert len(losses) == 11
    assert losses[-1] < 0.8 * losses[0]
    assert run.recipe == tiny(steps=40, sample_every=20)
    assert {"versions", "git", "cpu_count"} <= json.loads((run.folder / "environment.json").read_text()).keys()
    assert sorted(p.name for p in run.samples.iterdir()) == [
        f"{step:08d}{end}" for step in (0, 20, 40) for end in (".mp4", ".png")
    ]
    assert [p.name for p in sorted(run.checkpoints.iterdir())] == ["00000038", "00000040"]
    assert list((run.folder / "tensorboard").iterdir())


def test_the_same_recipe_gives_the_same_bits(tmp_path: Path) -> None:
    assert_equal(weights(train(tiny(), tmp_path / "a")), weights(train(tiny(), tmp_path / "b")))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    recipe = tiny(optim=replace(tiny().optim, name=optimizer), data=replace(tiny().data, window="random"))
    whole = train(recipe, tmp_path / "whole")
    part = tmp_path / "part"
    stopped_at(recipe, part, step=3)
    resumed = train(recipe, part)
    assert_equal(weights(whole), weights(resumed))
    steps = lambda run: [(line["step"], line["loss"]) for line in run.metrics() if "loss" in line]
    assert steps(whole) == steps(resumed)


def stopped_at(recipe: Recipe, out: Path, step: int) -> None:
    """Train until SIGTERM arrives in the middle of `step`."""
    with pytest.raises(Stopped) as stopped:
        train(replace(recipe, objective=TerminatingAt(step=step)), out)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    text = (out / "recipe.toml").read_text()
    assert "TerminatingAt" in text
    (out / "recipe.toml").unlink()  # it names the objective that stops, and another recipe would be refused


@dataclass(frozen=True, kw_only=True)
class TerminatingAt(Diffusion):
    """Diffusion that sends its own process SIGTERM in one step."""

    step: int = 0

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        if batch.samples[0] == (self.step - 1) * len(batch.samples):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch, draw)


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """kill −9, again and again, whatever the process is doing; then on to the end."""
    recipe = ["minisora.dit_tiny", "--steps", "30", "--save-every", "2", "--sample-every", "0", "--log-every", "1"]
    command = [sys.executable, "-m", "mutoscope", "train", *recipe, "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "whole"], check=True, env=environment, capture_output=True)
    part, seen = tmp_path / "part", []
    for kill_after in (3, 11, 20):
        process = subprocess.Popen([*command, part], env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and max(seen := [m["step"] for m in Run(part).metrics()] or [0]) < kill_after:
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert max(seen) < 30, "the run was over before it could be killed"
    subprocess.run([*command, part], check=True, env=environment, capture_output=True)
    assert_equal(weights(Run(tmp_path / "whole")), weights(Run(part)))


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    whole = weights(train(tiny(batch_size=8), tmp_path / "whole"))
    parts = weights(train(tiny(batch_size=4, accumulate=2), tmp_path / "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = weights(train(tiny(), tmp_path / "plain"))
    assert_equal(plain, weights(train(tiny(activation_checkpointing=True), tmp_path / "recomputed")))


def test_bf16_trains(tmp_path: Path) -> None:
    run = train(tiny(precision="bf16"), tmp_path / "run")
    assert all(v.dtype == torch.float32 for v in weights(run).values())


@dataclass(frozen=True, kw_only=True)
class NotFiniteAt(ObjectiveConfig):
    """Diffusion whose loss is NaN from one sample on, for a number of samples."""

    first: int
    count: int

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> Loss:
        loss = Diffusion().loss(model, batch, draw)
        bad = torch.tensor([self.first <= n < self.first + self.count for n in batch.samples])
        factor = torch.where(bad, math.nan, 1.0)
        return Loss(total=loss.total * factor.mean(), per_sample=loss.per_sample * factor, parts={})


def test_a_non_finite_step_is_skipped_and_names_the_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny(objective=NotFiniteAt(first=9, count=1), validate_every=0), tmp_path / "run")
    assert [line["skipped"] for line in run.metrics() if "skipped" in line] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert all(v.isfinite().all() for v in weights(run).values())
    message = capsys.readouterr().err
    assert "step 3" in message
    assert "Clips with a non-finite loss: train/" in message.replace("\n", " ")


def test_non_finite_steps_in_a_row_stop_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    recipe = tiny(objective=NotFiniteAt(first=8, count=99), validate_every=0, optim=Optim(lr=1e-3, max_bad_steps=3))
    with pytest.raises(RuntimeError, match="3 steps in a row were not finite"):
        train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "00000005").exists()
    assert not Run(tmp_path / "run").weights.exists()


def test_a_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(tiny(steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match=r"recipe\.optim\.lr: 0\.001 in the run, 0\.5 now"):
        train(tiny(optim=replace(tiny().optim, lr=0.5)), tmp_path / "run")


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    recipe = tiny(optim=Optim(lr=1e-3))  # a constant rate: a decay would hang on the number of steps
    train(replace(recipe, steps=4), tmp_path / "part")
    assert_equal(weights(train(recipe, tmp_path / "whole")), weights(train(recipe, tmp_path / "part")))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with Run(tmp_path / "run").locked(), pytest.raises(ValueError, match="another process is training in it"):
        train(tiny(), tmp_path / "run")


def test_init_from_starts_from_a_runs_weights_and_checks_them(tmp_path: Path) -> None:
    first = train(tiny(steps=2), tmp_path / "first")
    second = train(tiny(steps=1, init_from=str(first.folder), optim=Optim(lr=1e-30), ema=0.0), tmp_path / "second")
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=0, atol=1e-20)
    with pytest.raises(ValueError, match="these weights are not of this DiTModel"):
        train(
            tiny(init_from=str(first.folder), model=DiT(depth=2, width=32, heads=2, patch=(2, 8, 8))),
            tmp_path / "third",
        )


def test_a_start_that_failed_does_not_bind_the_folder(tmp_path: Path) -> None:
    nowhere = replace(tiny().data, root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no such folder"):
        train(tiny(data=nowhere), tmp_path / "run")
    assert train(tiny(steps=1), tmp_path / "run").weights.exists()


class RecordingWandb(ModuleType):
    """Stands in for the wandb package, which is optional."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: dict[str, object] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def init(self, project: str, name: str, dir: Path, resume: str) -> RecordingWandb:
        self.started = {"project": project, "name": name}
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_wandb_gets_what_metrics_jsonl_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = train(tiny(steps=2, wandb="digits"), tmp_path / "run")
    assert wandb.started == {"project": "digits", "name": "run"}
    assert wandb.exit_code == 0
    assert [step for step, _ in wandb.logged] == [line["step"] for line in run.metrics()]
    assert [v.get("loss") for _, v in wandb.logged] == [line.get("loss") for line in run.metrics()]


def test_wandb_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'pip install "mutoscope\[wandb\]"'):
        train(tiny(wandb="digits"), tmp_path / "run")


@pytest.mark.slow
def test_compiled_training_is_training(tmp_path: Path) -> None:
    """In processes of their own, without the checks of types and shapes, which torch.compile can't trace."""
    command = [sys.executable, "-m", "mutoscope", "train", "minisora.dit_tiny", "--steps", "4", "--out"]
    for flag in ("--no-compile", "--compile"):
        subprocess.run([*command, tmp_path / flag, flag], check=True, capture_output=True)
    plain, compiled = weights(Run(tmp_path / "--no-compile")), weights(Run(tmp_path / "--compile"))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)
