"""HashedWords: the same word is the same vector anywhere, word order is seen, an empty caption is no caption."""

import pytest
import torch

from mutoscope.text.encoders import HashedWords, sinusoids, split_words, word_vector


def test_words_and_punctuation() -> None:
    assert split_words("2 digits: a Red 3 flies up-left; naïve_x") == [
        "2", "digits", ":", "a", "red", "3", "flies", "up", "-", "left", ";", "naïve_x",
    ]  # fmt: skip
    assert split_words(" \n\t") == []


def test_shapes_mask_and_padding() -> None:
    config = HashedWords(width=16, max_length=6)
    cond = config.build()(["a red 3", "", "one two three four five six seven"])
    assert cond.text is not None and cond.text_mask is not None and cond.label is None
    assert cond.text.shape == (3, 6, 16) and cond.text.dtype == torch.float32
    assert cond.text_mask.sum(1).tolist() == [3, 0, 6]
    assert (cond.text[~cond.text_mask] == 0).all() and (cond.text[cond.text_mask] != 0).any(1).all()
    assert config.dim == 16


def test_a_word_is_its_vector_plus_its_position() -> None:
    text = HashedWords(width=16).build()(["Red fish red"]).text
    assert text is not None
    positions = sinusoids(3, 16)
    assert torch.equal(
        text[0, 0] - text[0, 2], (word_vector("red", 16) + positions[0]) - (word_vector("red", 16) + positions[2])
    )
    assert not torch.equal(text[0, 0], text[0, 2])
    assert torch.equal(positions[0], torch.cat([torch.zeros(8), torch.ones(8)]))
    assert positions[2, 0] == torch.tensor(2.0).sin() and positions[2, 8] == torch.tensor(2.0).cos()


def test_a_caption_is_embedded_alike_in_any_company() -> None:
    encode = HashedWords().build()
    together, alone = encode(["a blue 7", "x", "", "a blue 7"]), encode(["a blue 7"])
    assert together.text is not None and alone.text is not None
    assert torch.equal(together.text[0], alone.text[0]) and torch.equal(together.text[3], alone.text[0])


def test_words_are_kept_apart() -> None:
    words = [f"{colour} {i}" for colour in ("red", "blue") for i in range(100)]
    vectors = torch.stack([word_vector(word, 64) for word in words])
    assert torch.allclose(vectors.norm(dim=1), torch.tensor(8.0))
    cosines = vectors @ vectors.T / 64 - torch.eye(len(words))
    assert cosines.abs().max() < 0.6 and cosines.mean().abs() < 0.01


def test_vectors_do_not_hang_on_the_global_generator() -> None:
    word_vector.cache_clear()
    torch.manual_seed(7)
    golden = torch.tensor([-0.9494737, 0.3318054, -1.6605868, 0.4804750])
    assert torch.allclose(word_vector("red", 4), golden, atol=1e-6)
    assert torch.initial_seed() == 7


def test_identity_tells_encoders_apart() -> None:
    assert HashedWords().identity == "HashedWords(width=64, max_length=32)"
    assert HashedWords().identity != HashedWords(width=32).identity


@pytest.mark.parametrize("fields", [{"width": 15}, {"width": 0}, {"max_length": 0}])
def test_impossible_fields_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        HashedWords(**fields)
