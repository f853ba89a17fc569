"""What an export will write: everything that can refuse it is checked here, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from solotune.config.run_config import Choice
from solotune.errors import InputError
from solotune.exporters import gguf
from solotune.exporters.base_tensors import BaseTensors
from solotune.exporters.export_folder import ExportFolder, is_intact, refuse_existing, sha256_of
from solotune.exporters.merge import OUTPUT_DTYPES, merged_bytes, output_dtype
from solotune.exporters.merge_choice import check_wanted
from solotune.exporters.source import ExportSource

NOTHING_WRITTEN = ("vllm",)
FROM_MERGED = ("gguf", "ollama")
ADAPTER_GGUF = "adapter-gguf"
WEIGHTS = ("merged", ADAPTER_GGUF)
"""Kinds that are written from the base's tensors."""


@dataclass(frozen=True)
class ExportPlan:
    """What will be written, in this order, and with what."""

    kinds: list[str]
    tensors: BaseTensors
    dtype: str
    merge_into: str | None
    quantizations: list[str]
    sizes: dict[str, int]
    """About how many bytes each kind takes on the disk."""
    choices: list[Choice]


def checked(
    source: ExportSource,
    path: Path,
    kinds: Sequence[str],
    dtype: str | None,
    merge_into: str | None,
    quantizations: list[str],
) -> ExportPlan:
    """Check adapter, base, targets and formats.

    Raises:
        InputError: the adapter does not fit the base, a target exists, or a format cannot be made of this model.
    """
    wanted, choices = _with_merged(path, list(kinds))
    refuse_existing(path, [kind for kind in wanted if kind not in NOTHING_WRITTEN])
    ExportFolder(path, None).check_adapter(sha256_of(source.adapter))
    tensors = BaseTensors.of(source.base, source.config)
    tensors.check(source.adapter, str(source.adapter_folder))
    check_wanted(source, tensors, merge_into)
    for quantization in quantizations:
        gguf.check_quantization(quantization)
    if any(kind in FROM_MERGED for kind in wanted):
        gguf.check_convertible(source.base.folder, source.adapter)
    if ADAPTER_GGUF in wanted:
        gguf.check_convertible(source.base.folder, source.adapter, is_merged=False)
    dtype, because = output_dtype(tensors, dtype)
    if any(kind in WEIGHTS for kind in wanted):
        choices.append(Choice("dtype", dtype, because))
    sizes = _sizes(source, tensors, wanted, dtype, quantizations)
    return ExportPlan(wanted, tensors, dtype, merge_into, quantizations, sizes, choices)


def _with_merged(path: Path, kinds: list[str]) -> tuple[list[str], list[Choice]]:
    """The kinds, with the merged model if another one is made of it and it is not there yet.

    Raises:
        InputError: one is there, and has been changed.
    """
    needs = [kind for kind in kinds if kind in FROM_MERGED]
    if not needs and "vllm" in kinds and not {"adapter", "merged"} & {*kinds, *_there(path)}:
        needs = ["vllm"]
    if not needs or "merged" in kinds:
        return kinds, []
    merged = path / "merged"
    if not merged.exists():
        return ["merged", *kinds], [Choice("merged", "written too", f"{needs[0]} is made of it")]
    if not is_intact(merged):
        raise InputError(f"{merged}: its files have changed since the export", change=f"remove it (rm -r {merged})")
    return kinds, [Choice("merged", "the one that is there", f"{needs[0]} is made of it")]


def _there(path: Path) -> list[str]:
    return [kind for kind in ("adapter", "merged") if (path / kind).is_dir()]


def _sizes(
    source: ExportSource, tensors: BaseTensors, kinds: Sequence[str], dtype: str, quantizations: Sequence[str]
) -> dict[str, int]:
    adapter = sum(tensor.numel() * tensor.element_size() for tensor in source.adapter.tensors.values())
    merged = merged_bytes(tensors, OUTPUT_DTYPES[dtype])
    files = [gguf.gguf_bytes(merged // 2, quantization) for quantization in quantizations]
    each = {"adapter": adapter, "merged": merged, "gguf": sum(files), "ollama": 0 if "gguf" in kinds else files[0]}
    each[ADAPTER_GGUF] = 2 * adapter + merged + files[0]  # the base is also written as it is, while it is converted
    beside = sum(len(content) for _, content in source.tokenizer_files())
    return {kind: each[kind] + beside for kind in kinds if kind in each}
