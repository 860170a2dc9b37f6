from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutoscope.data.captions import check_captions, choose, kinds_of, variants
from mutoscope.data.media import Media
from mutoscope.data.sources.layouts import Clip
from mutoscope.recipe import ClipSet, Data

DATA = Data(root="there", frames=8, height=16, width=16)


def clip(set: int = 0, **captions: tuple[str, ...]) -> Clip:
    return Clip(id="a", media=Media("a.mp4"), split="train", captions=captions, set=set)


def shares(of: Clip, data: Data, draws: int = 4000) -> dict[str, float]:
    counts = Counter(choose(variants(of, data), 5, n) for n in range(draws))
    return {caption: count / draws for caption, count in counts.items()}


def test_the_plain_kind_is_taken_where_there_is_one_else_all_kinds_alike() -> None:
    assert shares(clip(caption=("x",), long=("y",)), DATA) == {"x": 1.0}
    found = shares(clip(short=("x",), long=("y", "z")), DATA)
    assert found["x"] == pytest.approx(0.5, abs=0.03) and found["y"] == pytest.approx(0.25, abs=0.03)
    assert shares(clip(), DATA) == {"": 1.0}


def test_templates_are_drawn_by_weight_among_those_whose_kinds_there_are() -> None:
    data = replace(DATA, templates=("{short}", "{who} {what}!"), template_weights=(3.0, 1.0))
    found = shares(clip(short=("s",), who=("a", "b"), what=("runs",)), data)
    assert found["s"] == pytest.approx(0.75, abs=0.03)
    assert found["a runs!"] == pytest.approx(0.125, abs=0.03) and set(found) == {"s", "a runs!", "b runs!"}
    assert shares(clip(who=("a",), what=("runs",)), data) == {"a runs!": 1.0}


def test_the_id_token_stands_before_what_a_template_made_and_is_the_sets_own() -> None:
    data = replace(DATA, id_token="TOK", templates=("{who} {what}",), mix=(ClipSet(root="other", id_token="DOG"),))
    assert shares(clip(who=("a",), what=("b",)), data) == {"TOK a b": 1.0}
    assert shares(clip(set=1, who=("a",), what=("b",)), data) == {"DOG a b": 1.0}


def test_the_choice_hangs_on_seed_and_sample_alone() -> None:
    among = variants(clip(caption=tuple("abcdefgh")), DATA)
    once = [choose(among, 1, n) for n in range(50)]
    assert once == [choose(among, 1, n) for n in range(50)] != [choose(among, 2, n) for n in range(50)]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.integers(0, 1000))
def test_captions_come_out_as_they_are_braces_and_all(captions: list[str], sample: int) -> None:
    data = replace(DATA, templates=("{caption}",))
    assert choose(variants(clip(caption=tuple(captions)), data), 0, sample) in captions


@pytest.mark.parametrize("template", ["", "no kind", "{", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{ }"])
def test_what_is_no_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.templates: "):
        kinds_of(template)


def test_faults_of_templates_are_found_before_training() -> None:
    clips = [clip(short=("x",)), clip(long=("y",)), clip()]
    with pytest.raises(ValueError, match=r"no clip has a caption of kind shrt; there is \['long', 'short'\]"):
        check_captions(clips, replace(DATA, templates=("{shrt}",)))
    with pytest.raises(ValueError, match=r"1 clips have captions, but not the kinds of any template, such as a"):
        check_captions(clips, replace(DATA, templates=("{short}",)))
    check_captions(clips, replace(DATA, templates=("{short}", "{long}")))
    many = clip(a=tuple("abcdefghijkl"), b=tuple("abcdefghijkl"), c=tuple("abcdefghijkl"))
    with pytest.raises(ValueError, match=r"they make 1728 captions for a, 1000 at most"):
        check_captions([many], replace(DATA, templates=("{a}{b}{c}",)))
