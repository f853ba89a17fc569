"""Names of models and datasets, and the hub's side of them: is it a path or a hub id, and how its files get here.

Tokens, caches, revisions and the offline switch are huggingface_hub's (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`). Only
the files that are read are fetched: safetensors, JSON, the tokenizer and its templates; never Python, never pickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from solotune.errors import InputError
from solotune.runtime import watchdog

CONNECT_SECONDS = 5
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def is_local_path(name: str) -> bool:
    """Whether the name of a model or dataset is a path on this machine, there or not, and no name on the hub.

    A path is whatever exists under this name, and whatever cannot be a hub id: those are `name` or `owner/name` of
    letters, digits, `_`, `-` and `.`, and begin with none of the last two.
    """
    return HUB_ID.fullmatch(name) is None or os.path.lexists(name)


def local_path(name: str) -> Path | None:
    """The path that a name is, with `~` written out; None for a hub id."""
    return Path(os.path.expanduser(name)) if is_local_path(name) else None


def hub_id(name: str) -> str | None:
    """What may be said of a base to others: its id on the hub; None for a path, which only this machine knows.

    A folder's name alone would be worse than nothing: PEFT takes it for a hub id, and may find another model there.
    """
    return None if is_local_path(name) else name


@cache
def offline_if_unreachable() -> None:
    """Asks the hub once, and has huggingface_hub work from its cache where it does not answer within CONNECT_SECONDS.

    Left alone, each library retries each file six times: without a network 56 s until a misspelled model is refused,
    and as long until a cached one is found.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        is_reachable = get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS).status_code < 500
    # whatever keeps us from it (names, proxies, certificates, an endpoint that is no URL) has the same consequence
    except Exception:
        is_reachable = False
    constants.HF_HUB_OFFLINE = not is_reachable


def download(name: str, revision: str, where: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    """The snapshot folder of a hub model, with those of its files that match `wanted` and not `unwanted`.

    Files that are in the cache are not downloaded again.

    Args:
        where: where the name was written, for messages.

    Raises:
        InputError: no such model, no access to it, or neither in the cache nor within reach.
    """
    offline_if_unreachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with watchdog.paused():
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=[*wanted], ignore_patterns=[*unwanted])
            )
    except GatedRepoError:
        change = "ask for access on the model's page, then `hf auth login` or set HF_TOKEN"
        raise InputError(f"{where}: access to {name} must be granted first: it is gated", change=change) from None
    except (RepositoryNotFoundError, HFValidationError):
        allowed = "a model id such as meta-llama/Llama-3.1-8B-Instruct, or a local folder"
        change = "check the spelling; for a private model `hf auth login` or set HF_TOKEN"
        raise InputError(f"{where}: no such model or folder: {name}", allowed=allowed, change=change) from None
    # the client, its HTTP library and the file system raise errors of many classes for one and the same cause
    except Exception as error:
        unreachable = isinstance(error, LocalEntryNotFoundError)
        reason = "the hub cannot be reached" if unreachable else str(error).strip().split("\n")[0]
        raise InputError(
            f"{where}: {name} is not in the cache and cannot be downloaded",
            seen=reason or type(error).__name__,
            change="check model_revision and the connection (HF_HUB_OFFLINE is off?), or name a local folder",
        ) from None


def cached(name: str, revision: str) -> Path | None:
    """The snapshot folder of a hub model, with as much of it as is on this machine; None where its config is not.

    Asks no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        # a pattern, because a snapshot without its weights would count as incomplete
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"], local_files_only=True))
    except (HFValidationError, OSError):  # no id, or LocalEntryNotFoundError
        return None
