"""Which clips are held out to validate on, where the data set does not say so itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mutoscope.data.flying_mnist import Split
from mutoscope.randomness import seed_of

LEDGER = ".clips.jsonl"
"""What `mutoscope data clip` keeps beside the clips that it cuts."""


def split_by_hash(ids: Iterable[str], val_fraction: float, films: Mapping[str, str] | None = None) -> dict[str, Split]:
    """The split of each id: val where the hash of the id, as a number in [0, 1), lies below `val_fraction`.

    So a clip keeps its split whatever is added beside it. Where no clip would be in val, the one of the lowest hash
    is, if there are two or more; an added clip may send that one back to train. From two clips on, none ever goes from
    train to val.

    films: of clips that are cut from a film, the film, which is then what is hashed: all of them are in one split, for
    shots of a film show the same faces and places. Where that leaves nothing to train or to validate on, as with one
    film, clips are split by id.
    """
    unit = {i: films.get(i, i) if films else i for i in ids}
    place = {u: seed_of("split", u) / 2**63 for u in unit.values()}
    if films and len(unit) > 1 and (len(place) == 1 or max(place.values()) < val_fraction):
        return split_by_hash(unit, val_fraction)
    held_out = {u for u in place if place[u] < val_fraction}
    if not held_out and len(place) > 1 and val_fraction > 0:
        held_out = {min(place, key=lambda u: place[u])}
    return {i: "val" if u in held_out else "train" for i, u in unit.items()}


def cut_from(folder: str) -> dict[str, str]:
    """The film that each clip was cut from which `mutoscope data clip` has written into a folder, by id.

    Raises ValueError where its file is damaged.
    """
    path = Path(folder) / LEDGER
    if not path.is_file():
        return {}
    films: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):  # What has no end is torn by a kill.
        try:
            entry = json.loads(line)
            films[entry["id"]] = entry["file"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: damaged; it says of which film each clip is, so that a film's "
                             "clips are all in one split; remove it to split them one by one") from error  # fmt: skip
    return films
