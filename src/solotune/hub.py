"""The hub, and where a model's files are: a local folder as it is, a hub id through huggingface_hub's own cache.

Tokens, caches, revisions and the offline switch are huggingface_hub's (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`). Only
the files that are read are fetched: safetensors, JSON, the tokenizer and its templates; never Python, never pickles.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from solotune import watchdog
from solotune.config import RunConfig
from solotune.errors import InputError

FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
TEMPLATES = "additional_chat_templates/*.jinja"
CONNECT_SECONDS = 5
NOT_FILES = ["*/*", "consolidated*"]  # other formats of the same weights beside Mistral's and Meta's


def looks_local(name: str) -> bool:
    """Whether a model or dataset name can only mean a path."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or os.path.exists(os.path.expanduser(name))


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


def tokenizer_folder(name: str, revision: str) -> Path:
    """The folder with the tokenizer's files of a hub model, downloaded where they are not in the cache.

    Raises:
        OSError: with a line that says why not.
    """
    offline_if_unreachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = [*(pattern for pattern in FILES if pattern != "*.safetensors"), TEMPLATES]
    unwanted = ["*.safetensors.index.json", "original/*", "consolidated*"]
    try:
        with watchdog.paused():
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except GatedRepoError:
        raise OSError("the model is gated: access must be granted first") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise OSError("the hub has no such model, or it is private") from None
    except LocalEntryNotFoundError:
        raise OSError("the hub cannot be reached, and the model is not in the cache") from None


def model_folder(config: RunConfig) -> Path:
    """The folder with the files of `model_name_or_path`, downloaded where it is a hub id.

    Raises:
        InputError: no such folder or model, no access to it, or no connection.
    """
    name = config.model_name_or_path
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    where = f"{config.source_of('model_name_or_path')}, model_name_or_path"
    if path.is_file():
        raise InputError(f"{where}: this is a file", seen=name, allowed="a model folder, or a model id on the hub")
    if looks_local(name):
        raise InputError(f"{where}: no such folder", seen=f"{name} (from {Path.cwd()})", change="check the path")
    offline_if_unreachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        with watchdog.paused():
            return Path(
                snapshot_download(name, revision=config.model_revision, allow_patterns=FILES, ignore_patterns=NOT_FILES)
            )
    except GatedRepoError:
        change = "ask for access on the model's page, then `hf auth login` or set HF_TOKEN"
        raise InputError(f"{where}: access to this model must be granted first", seen=name, change=change) from None
    except (RepositoryNotFoundError, HFValidationError):
        allowed = "a model id such as meta-llama/Llama-3.1-8B-Instruct, or a local folder"
        change = "check the spelling; for a private model set HF_TOKEN"
        raise InputError(f"{where}: no such model or folder", seen=name, allowed=allowed, change=change) from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{where}: the model is not in the cache and cannot be downloaded",
            seen=f"{name}: {str(error).strip().split(chr(10))[0]}",
            change="check the connection (HF_HUB_OFFLINE is off?), or name a local folder",
        ) from None
