"""What the documents show is true: their commands run, and their code is code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mutoscope.cli import main

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of a document in a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if name == language]


def test_the_model_of_add_a_model_trains_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [code] = blocks("docs/add-a-model.md", "python")
    Path("my_model.py").write_text(code)
    lines = [line for block in blocks("docs/add-a-model.md", "") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("mutoscope")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run([sys.executable, "-m", *command.split()], check=True)
    assert Path("out.mp4").exists()
    with pytest.raises(SystemExit) as refused:
        main(["sample", "runs/tiny"])
    assert refused.value.code == 2


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/concepts.md", "docs/metrics.md"])
def test_files_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("http")]
    paths = re.findall(r"`((?:src|docs|tests|benchmarks)/[\w/.-]+)`", text)
    missing = [p for p in links + paths if not ((ROOT / document).parent / p).exists() and not (ROOT / p).exists()]
    assert missing == []
