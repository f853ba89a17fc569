"""Hub downloads: decide whether a name is a path or a hub id, and get the files of an id.

Tokens, caches, revisions and the offline switch are those of huggingface_hub (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`).
Only the files that are read are downloaded: safetensors, JSON, the tokenizer and its templates; no Python, no pickles.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from solotune.errors import InputError
from solotune.hub import download_progress
from solotune.runtime import watchdog
from solotune.units import first_line

CONNECT_SECONDS = 5
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def is_local_path(name: str) -> bool:
    """Whether the name of a model or dataset is a path on this machine (existing or not) and not a hub id.

    It is a path if a file or folder of this name exists, or if it cannot be a hub id. A hub id is `name` or
    `owner/name` of letters, digits, `_`, `-` and `.`; neither part begins with `-` or `.`.
    """
    return HUB_ID.fullmatch(name) is None or os.path.lexists(name)


def local_path(name: str) -> Path | None:
    """The name as a path, with `~` expanded; None for a hub id."""
    return Path(os.path.expanduser(name)) if is_local_path(name) else None


def hub_id(name: str) -> str | None:
    """The hub id that may be written into an adapter; None for a path, which is valid only on this machine.

    A folder's name alone would do harm: PEFT would treat it as a hub id, and may find another model there.
    """
    return None if is_local_path(name) else name


def loadable_name(name: str) -> str:
    """The name under which a library on this machine finds the model from any working directory: hub id, or path."""
    path = local_path(name)
    return name if path is None else str(path.absolute())


def offline_switch() -> str:
    """The value of HF_HUB_OFFLINE, if it keeps huggingface_hub off the network; else empty."""
    value = os.environ.get("HF_HUB_OFFLINE", "")
    return value if value.upper() in ("1", "ON", "YES", "TRUE") else ""


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No network in this block: what is not in the cache is missing. For names that a folder gives and no user."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@cache
def offline_if_unreachable() -> None:
    """Contact the hub once; if it does not answer within CONNECT_SECONDS, set huggingface_hub offline (cache only).

    Otherwise each library tries each file six times: without a network it takes 56 s to refuse a misspelled model, and
    as long to find a cached one.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        is_reachable = get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS).status_code < 500
    # any failure (names, proxies, certificates, an endpoint that is not a URL) has the same consequence
    except Exception:
        is_reachable = False
    constants.HF_HUB_OFFLINE = not is_reachable


def download(name: str, revision: str, where: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    """Download the files of a hub model that match `wanted` and not `unwanted`; returns the snapshot folder.

    Files in the cache are not downloaded again.

    Args:
        where: where the name was given, for messages.

    Raises:
        InputError: no such model, no access to it, or neither in the cache nor reachable.
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
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=[*wanted],
                    ignore_patterns=[*unwanted],
                    tqdm_class=download_progress.bars(name),
                )
            )
    except GatedRepoError:
        change = "request access on the model's page, then run `hf auth login` or set HF_TOKEN"
        raise InputError(f"{where}: {name} is gated, and you have no access yet", change=change) from None
    except (RepositoryNotFoundError, HFValidationError):
        allowed = "a model id such as meta-llama/Llama-3.1-8B-Instruct, or a local folder"
        change = "check the spelling; for a private model run `hf auth login` or set HF_TOKEN"
        raise InputError(f"{where}: no such model or folder: {name}", allowed=allowed, change=change) from None
    # the client, its HTTP library and the file system raise errors of many classes for the same cause
    except Exception as error:
        unreachable = isinstance(error, LocalEntryNotFoundError)
        reason = "the hub cannot be reached" if unreachable else first_line(error)
        change = "check model_revision and the network connection, or use a local folder"
        if value := offline_switch():
            reason = f"HF_HUB_OFFLINE={value} is set, so nothing is downloaded"
            change = "unset HF_HUB_OFFLINE to download it once, or use a local folder"
        raise InputError(
            f"{where}: {name} is not in the cache and cannot be downloaded", seen=reason, change=change
        ) from None


def cached(name: str, revision: str) -> Path | None:
    """Snapshot folder of a hub model in the cache, complete or not; None if its config.json is not there.

    Does not use the network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        # with a pattern, because a snapshot without weights would count as incomplete
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"], local_files_only=True))
    except (HFValidationError, OSError):  # not an id, or LocalEntryNotFoundError
        return None
