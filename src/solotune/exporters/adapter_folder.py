"""The adapter as a folder to pass on: PEFT's two files, the tokenizer and chat template of the training.

Its base is named by its hub id. A base that is a local folder is named `./<its name>`: that works where the folder lies
in the working directory, says which base it is, and is neither a path of this machine nor a hub id, under which PEFT
could find somebody else's model. (`RUN/adapter`, which stays here, names the path.)
"""

from __future__ import annotations

from typing import Any

from solotune.exporters.merge import generation_config
from solotune.exporters.source import ExportSource
from solotune.model.adapter import Adapter
from solotune.run.atomic_io import Folder, json_text


def write_adapter(source: ExportSource, folder: Folder) -> None:
    """Write an adapter folder that PEFT, vLLM and other tools read."""
    Adapter(_config(source), source.adapter.tensors).write(folder)
    folder.write("generation_config.json", json_text(generation_config(source)))  # vLLM's serve line names it
    for name, content in source.tokenizer_files():
        folder.write(name, content)


def base_name(source: ExportSource) -> str:
    """The base as a file that is passed on names it."""
    return source.base.hub_id or f"./{source.base.folder.resolve().name}"


def note_on_base(source: ExportSource) -> str | None:
    """What a reader elsewhere must do to load the adapter; None if the base is on the hub."""
    if source.base.hub_id is not None:
        return None
    return (
        f"adapter_config.json names the base as {base_name(source)}: start from the folder that has it, or set "
        "base_model_name_or_path to where it is, before you pass the adapter on"
    )


def _config(source: ExportSource) -> dict[str, Any]:
    revision = source.base.revision if source.base.hub_id else None
    return {**source.adapter.config, "base_model_name_or_path": base_name(source), "revision": revision}
