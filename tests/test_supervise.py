"""A job that crashes or hangs costs itself and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mutoscope.supervise import Alive, Lost, in_threads, slot, supervise


def work(job: str, alive: Alive) -> str:
    kind, _, number = job.partition(" ")
    if kind == "die":
        os.kill(os.getpid(), int(number))
    if kind == "exit":
        os._exit(int(number))
    if kind == "hang":
        time.sleep(5)
    if kind == "slow":
        for _ in range(8):
            time.sleep(0.2)
            alive()
    if kind == "raise":
        raise KeyError(number)
    return f"{job} done"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_all_jobs_are_done_once(workers: int) -> None:
    jobs = [f"job {n}" for n in range(25)]
    assert sorted(supervise(work, jobs, workers, 10)) == sorted((job, f"{job} done") for job in jobs)
    assert list(supervise(work, [], workers, 10)) == []


def test_crashes_and_hangs_are_lost_alone() -> None:
    jobs = ["job 1", "die 11", "hang", "job 2", "die 9", "exit 3", "slow", *(f"job {n}" for n in range(3, 9))]
    found = dict(supervise(work, jobs, 2, 0.7))
    assert sorted(found) == sorted(jobs)
    assert found["die 11"] == Lost("the process that worked on it died: Segmentation fault (signal 11)")
    assert found["die 9"] == Lost("the process that worked on it died: Killed (signal 9); out of memory?")
    assert found["exit 3"] == Lost("the process that worked on it died: exit code 3")
    assert found["hang"] == Lost("given up after 0.7 seconds without a sign of life")
    assert found["slow"] == "slow done"  # Longer than that in all, but never silent.
    assert all(found[job] == f"{job} done" for job in jobs if job.startswith("job"))


def report(job: str, alive: Alive) -> int:
    alive(f"{job} begun")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return slot()


def test_jobs_tell_news_and_know_their_slot() -> None:
    news: list[str] = []
    jobs = ["a", "die", "b", "c", "d"]
    found = dict(supervise(report, jobs, 2, 10, on_news=news.append))
    assert sorted(news) == [f"{job} begun" for job in sorted(jobs)]
    assert isinstance(found.pop("die"), Lost) and set(found.values()) <= {0, 1}  # the successor has the dead one's


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*KeyError: 'why'"):
        list(supervise(work, ["job 1", "raise why", "hang"], 2, 10))


def test_a_caller_that_has_enough_leaves_no_process() -> None:
    results = supervise(work, ["job 1", "hang", "hang"], 2, 60)
    assert next(results) == ("job 1", "job 1 done")
    begin = time.monotonic()
    results.close()
    assert time.monotonic() - begin < 5


def test_threads() -> None:
    jobs = ["job 1", "hang", *(f"job {n}" for n in range(2, 40))]
    found = list(in_threads(lambda job: work(job, lambda: None), jobs, 3, 0.3))
    assert sorted(job for job, _ in found) == sorted(jobs)
    assert dict(found)["hang"] == Lost("given up after 0.3 seconds")
    assert all(result == f"{job} done" for job, result in found if job != "hang")
    assert list(in_threads(str, [], 3, 1)) == []
    with pytest.raises(KeyError, match="why"):
        list(in_threads(lambda job: work(job, lambda: None), ["job 1", "raise why"], 2, 10))


SCRIPT = """
import os, sys, time
from functools import partial
from pathlib import Path
from mutoscope.supervise import supervise

def hang():
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(60)

def work(job, alive):
    hang()

if __name__ != "__main__" and sys.argv[2] == "importing":
    hang()

if __name__ == "__main__":
    for _ in supervise(work, [1, 2, 3], 2, 60):
        pass
"""


def runs(pid: Path) -> bool:
    """Whether there is such a process, and it is not one that has ended and whose parent has not noticed yet."""
    try:
        return Path("/proc", pid.name, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("how", "when"), [(signal.SIGINT, "importing"), (signal.SIGINT, "working"), (signal.SIGKILL, "working")]
)
def test_ctrl_c_ends_at_once(how: signal.Signals, when: str, tmp_path: Path) -> None:
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    pids.mkdir()
    command = [sys.executable, str(script), str(pids), when]
    # A suite that was started in the background ignores Ctrl-C, and would hand that down
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    while len(list(pids.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # As a terminal does: to all of them.
    else:
        os.kill(process.pid, how)
    process.wait(timeout=15)
    until = time.monotonic() + 5
    while any(map(runs, pids.iterdir())) and time.monotonic() < until:
        time.sleep(0.02)
    assert not [pid.name for pid in pids.iterdir() if runs(pid)]
    _, told = process.communicate(timeout=60)  # The server from which they are forked takes its leave of torch.
    assert told.count("KeyboardInterrupt") == (how == signal.SIGINT)
