"""T5 against the pipeline's encode_prompt; what takes the place of a caption that is dropped; real tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import sentencepiece
import torch

from mutoscope.checkpoints import hash_part, open_checkpoint
from mutoscope.encoder import Encoder
from mutoscope.text.t5 import T5
from mutoscope.tiny_checkpoints import make_tiny
from mutoscope.types import Cond

PATH = "tiny://cogvideox-t2v"
CAPTIONS = ["A red dog.", "", "Eine lange Geschichte von einem Hund, der gar nicht mehr aufhören will zu laufen."]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_tiny("cogvideox-t2v"), tmp_path / "checkpoint"))


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_embeddings_are_the_pipelines(weights: Any) -> None:
    pipe = diffusers.CogVideoXPipeline.from_pretrained(open_checkpoint(PATH))
    pipe.to(dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[weights])
    with torch.no_grad():
        expected, empty = pipe.encode_prompt(CAPTIONS, "", max_sequence_length=32)
    config = T5(path=PATH, weights=weights)
    cond = config.build()(CAPTIONS)
    assert cond.text is not None and cond.text_mask is not None and cond.null_text is not None
    assert cond.text.shape == (3, config.length, config.dim) == (3, 32, 32)
    assert cond.text.dtype == torch.float32
    torch.testing.assert_close(cond.text, expected.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(cond.null_text, empty.float(), rtol=0, atol=1e-6 if weights == "fp32" else 0.05)
    assert cond.text_mask.all(), "CogVideoX sees the padding"


def test_a_dropped_caption_is_an_empty_one() -> None:
    cond = T5(path=PATH, weights="fp32").build()(CAPTIONS)
    dropped = cond.dropped(torch.tensor([True, False, False]))
    assert dropped.text is not None and cond.text is not None and dropped.text_mask is not None
    torch.testing.assert_close(dropped.text[0], cond.text[1])
    assert torch.equal(dropped.text[1:], cond.text[1:])
    assert dropped.text_mask.all()


def test_encoders_take_it_as_any_text() -> None:
    encoder = Encoder(text=T5(path=PATH).build())
    cond = encoder.text(CAPTIONS)
    assert cond.text is not None and cond.null_text is not None
    assert cond.null_text.shape == cond.text.shape
    part = Cond.stack([cond.rows(slice(2, 3)), cond.rows(slice(0, 1))])
    assert part.text is not None and torch.equal(part.text[0], cond.text[2])
    assert part.null_text is not None and torch.equal(part.null_text[1], cond.null_text[0])


def test_the_length_is_the_transformers() -> None:
    assert (T5(path="THUDM/CogVideoX-5b").length, T5(path="THUDM/CogVideoX-5b").dim) == (226, 4096)
    long = T5(path=PATH, weights="fp32").build()(["x" * 31, "x" * 500])
    assert long.text is not None
    torch.testing.assert_close(long.text[0], long.text[1])  # cut off, with the end marked


def test_embeddings_are_known_by_what_makes_them(copy: Path) -> None:
    here, there = T5(path=PATH), T5(path=str(copy))
    assert here.identity == there.identity
    assert T5(path=PATH, weights="fp32").identity != here.identity
    assert T5(path="tiny://cogvideox-2b").identity != here.identity
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_text_seq_length": 24}))
    assert there.identity != here.identity
    assert hash_part(str(copy), "text_encoder") in there.identity


def test_a_sentencepiece_tokenizer_is_read_as_transformers_reads_it(copy: Path) -> None:
    """As the published checkpoints have it: spiece.model and tokenizer_config.json."""
    import transformers

    folder = copy / "tokenizer"
    shutil.rmtree(folder)
    folder.mkdir()
    words = copy / "words.txt"
    words.write_text("\n".join(f"a {c} {s} moves {d} over the {g}" for c in ("red", "blue", "green")
                               for s in ("dog", "ball", "house") for d in ("left", "right", "up")
                               for g in ("grass", "sea")))  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(folder / "spiece"), vocab_size=27, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    cond = T5(path=str(copy), weights="fp32").build()(["a red dog moves up"])
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    tokens = tokenizer("a red dog moves up", padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert tokens.max() < 384 and (tokens != 0).sum() > 5
    encoder = transformers.T5EncoderModel.from_pretrained(copy / "text_encoder")
    with torch.no_grad():
        torch.testing.assert_close(cond.text, encoder(tokens)[0])


def test_other_tokenizers_are_refused(copy: Path) -> None:
    file = copy / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": "evil.Evil"}}))
    with pytest.raises(ValueError, match="its tokenizer is a EvilTokenizer; known here: T5Tokenizer"):
        T5(path=str(copy)).build()
