"""The model of a run, resolved once: where its files are, and what its configs say.

    files = resolve_model(config)      a local folder; for a hub id, config and tokenizer files are downloaded
    files.with_weights()               the same with the weights, which are downloaded only now
    files.config["vocab_size"]         config.json, checked
    model_here(name, revision)         what is already on this machine; does not use the network

Functions that need the model take a `ModelFiles`, so that a run resolves it, and contacts the hub, only once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from solotune.config.run_config import RunConfig
from solotune.errors import InputError
from solotune.hub import download
from solotune.hub.safe_files import check_regular, contained, json_object

WEIGHTS = "*.safetensors"
FILES = [WEIGHTS, "README.md", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
NOT_FILES = ["*/*", "consolidated*"]  # Mistral's and Meta's copies of the weights in other formats
SMALL_FILES = [*(pattern for pattern in FILES if pattern != WEIGHTS), "additional_chat_templates/*.jinja"]
NOT_SMALL_FILES = ["*.safetensors.index.json", "original/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFiles:
    """A model's files on this machine.

    `revision` is the requested branch, tag or commit of a hub id; `where` is where the name was given, for messages.
    """

    name: str
    revision: str
    folder: Path
    is_local: bool
    where: str = "model_name_or_path"
    has_weights: bool = False  # whether the weights of a hub id were already requested

    @property
    def hub_id(self) -> str | None:
        """The model's id on the hub; None for a local folder."""
        return None if self.is_local else self.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, checked: no code, not quantised, known to transformers, possible sizes.

        Raises:
            InputError: a check failed, or there is no config.json.
        """
        from solotune.hub.hf_config import read_config  # imports transformers

        return read_config(self.folder)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty if there is none.

        Raises:
            InputError: not a JSON object, or a link out of the folder.
        """
        path = self.folder / "generation_config.json"
        if not path.exists():
            return {}
        check_regular(self.folder, path)
        return json_object(path)

    def json_or_empty(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, unchecked; empty if it cannot be read (loading reports what is wrong)."""
        try:
            return json_object(contained(self.folder, name))
        except InputError:
            return {}

    def with_weights(self) -> ModelFiles:
        """The same model with its weights on this machine; those of a hub id are downloaded now.

        Raises:
            InputError: no access to it, or neither in the cache nor reachable.
        """
        if self.is_local or self.has_weights:
            return self
        folder = download.download(self.name, self.revision, self.where, FILES, NOT_FILES)
        return replace(self, folder=folder, has_weights=True)


def resolve_model(config: RunConfig) -> ModelFiles:
    """Files of `model_name_or_path`; the weights of a hub id are not downloaded.

    Raises:
        InputError: no such folder or model, no access to it, or neither in the cache nor reachable.
    """
    name, revision = config.model_name_or_path, config.model_revision
    where = f"{config.source_of('model_name_or_path')}, model_name_or_path"
    path = download.local_path(name)
    if path is None:
        folder = download.download(name, revision, where, SMALL_FILES, NOT_SMALL_FILES)
        return ModelFiles(name, revision, folder, False, where)
    if os.path.isdir(path):  # Path.is_dir raises if the name is too long
        return ModelFiles(name, revision, path, True, where)
    if os.path.lexists(path):
        raise InputError(f"{where}: {name} is a file", allowed="a model folder, or a model id on the hub")
    seen = None if path.is_absolute() else f"looked in {Path.cwd()}"
    change = "check the path; a hub model is named owner/name"
    raise InputError(f"{where}: no such folder: {name}", seen=seen, change=change)


def model_here(name: str, revision: str) -> ModelFiles | None:
    """Files of a model that are already on this machine; None if there are none. Does not use the network."""
    path = download.local_path(name)
    folder = download.cached(name, revision) if path is None else path if os.path.isdir(path) else None
    return None if folder is None else ModelFiles(name, revision, folder, path is not None)
