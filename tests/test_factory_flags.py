"""Whoever types cogvideox-factory's flags is told what they are called here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mutoscope.cli import main
from mutoscope.config import to_dict
from mutoscope.factory_flags import FIELDS
from mutoscope.recipes.cogvideox import i2v_lora

DOCUMENT = Path(__file__).parent.parent / "docs" / "cogvideox.md"


def test_every_field_is_one() -> None:
    tree = to_dict(i2v_lora())
    for fields in FIELDS.values():
        for field in fields:
            part = tree
            for step in field.split("."):
                assert field == "out" or step in part, field
                part = part.get(step, {})


def test_the_document_has_the_same_table() -> None:
    table = DOCUMENT.read_text().partition("## cogvideox-factory's flags")[2]
    rows = re.findall(r"^\| (`--\w+`(?:, `--\w+`)*) \|(.*?)\|(.*)\|$", table, re.MULTILINE)
    documented = {
        flag: tuple(re.findall(r"`([\w.]+)`", fields))
        for flags, fields, _ in rows
        for flag in re.findall(r"\w+", flags)
    }
    assert documented == FIELDS | {"seed": ("seed",), "batch_size": ("batch_size",)}
    assert all(why.strip() for _, fields, why in rows if "`" not in fields), "where there is no field, the reason"


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--data_root", "x"], "--data_root: a flag of cogvideox-factory's; here it is --data.root"),
        (["--caption_column", "prompts.txt"], r"prompts.txt\) or --data.caption_columns \(columns of a table\)"),
        (["--video-column=videos.txt"], r"--data.video_file \(a file with a video in each line, as videos.txt\) or"),
        (["--push_to_hub"], "--push_to_hub: .* nothing that is set here; docs/cogvideox.md says why"),
        (["--rank", "4", "--lora_alpha", "4"], "(?s)here it is --lora.rank.*here it is --lora.alpha"),
    ],
)
def test_a_flag_is_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["show", "cogvideox.t2v_lora_tiny", *flags])
    assert refused.value.code == 2
    assert re.search(told, capsys.readouterr().err)
