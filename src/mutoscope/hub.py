"""The Hugging Face Hub: where ids of models and data sets become folders on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

INSTALL = 'pip install "mutoscope[cogvideox]"'
"""What brings huggingface_hub, and the libraries that pretrained models are loaded by."""
DATASETS = "hf://datasets/"
"""What the address of a data set begins with."""
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Whether this could be the id of something on the Hub: OWNER/NAME."""
    return _ID.fullmatch(text) is not None


def download(
    hub_id: str, *, kind: Literal["model", "dataset"], patterns: Sequence[str] | None, revision: str | None = None
) -> Path:
    """The folder of a model or data set: what is in the Hub's cache on this machine, completed from the Hub.

    patterns: which of its files; None takes all.

    Raises FileNotFoundError where there is no such thing, no permission, or neither a copy nor a way to the Hub;
    ValueError where huggingface_hub is not installed.
    """
    what, page, here = ("model", "", "no such folder here, ") if kind == "model" else ("data set", "datasets/", "")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise ValueError(f"{hub_id}: a {what} on the Hugging Face Hub takes huggingface_hub: {INSTALL}") from error
    try:
        return Path(
            snapshot_download(
                hub_id, repo_type=kind, revision=revision, allow_patterns=list(patterns) if patterns else None
            )
        )
    except GatedRepoError:
        reason = (f"its owner asks you to accept a licence: do so at https://huggingface.co/{page}{hub_id}, then "
                  "`hf auth login`")  # fmt: skip
    except RepositoryNotFoundError:
        reason = f"{here}no such {what} on the Hugging Face Hub (or it is private: `hf auth login`)"
    except RevisionNotFoundError:
        reason = f"this {what} has no revision {revision}"
    except Exception as error:  # of whichever HTTP library it has come to use
        told = (str(error) or type(error).__name__).splitlines()[0]
        reason = (f"{here}not in the cache of the Hugging Face Hub, and the Hub can't be reached ({told}); give the "
                  "path of a copy on this machine")  # fmt: skip
    raise FileNotFoundError(f"{hub_id}: {reason}")


def local_root(root: str) -> str:
    """Where on this machine the clips at `root` lie: of hf://datasets/OWNER/NAME, also with @REVISION or /FOLDER behind
    it, the copy in the Hub's cache, completed from the Hub; any other root as it is. So are globs and single files on
    the Hub: shards that may be more than fits here are read through fsspec, piece by piece.

    Raises FileNotFoundError and ValueError as `download`, and where the address is none.
    """
    if not root.startswith(DATASETS):
        return root
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*?))?/?", root.removeprefix(DATASETS))
    if match is None:
        raise ValueError(f"data.root={root}: a data set on the Hugging Face Hub is {DATASETS}OWNER/NAME")
    hub_id, revision, below = match.groups()
    if below and re.search(r"[*?\[{]|\.\w+$", below):
        return root
    try:
        folder = download(hub_id, kind="dataset", patterns=[f"{below}/*"] if below else None, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.root={DATASETS}{error}") from error
    return str(folder / below) if below else str(folder)
