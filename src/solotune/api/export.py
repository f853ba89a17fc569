"""`solotune export`: an adapter as files for other programs, each compared with the model that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solotune.config.run_config import Choice
from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.errors import InputError
from solotune.run.run_dir import EXPORT
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.exporters.artifact import Export
    from solotune.exporters.source import ExportSource

KINDS = ("adapter", "merged")
DTYPES = ("bf16", "fp16")
BASES = ("original", "dequantized")


@quiet_libraries()
def export(
    target: str | Path,
    to: str | Sequence[str] = KINDS,
    *,
    out: str | Path | None = None,
    base: str | None = None,
    dataset: str | None = None,
    base_precision: str | None = None,
    dtype: str | None = None,
    merge_into: str | None = None,
    display: Display | None = None,
) -> Export:
    """Export the adapter of a run, or of another trainer, and compare each file with the model that was trained.

        result = solotune.export("runs/demo")
        print(result.ok, result.to_json()["merge"])
        solotune.export("their_adapter", base="org/name", dataset="chats.jsonl", base_precision="nf4")

    Args:
        target: a run, or a folder with adapter_config.json.
        to: what to write: `adapter`, `merged`; a list, or names with commas.
        out: the folder to write into; default: `export` in the run, `export` beside the adapter's files.
        base: the base model, a folder or hub id; of a run only if it has moved.
        dataset: rows to measure with, for an adapter that others trained; a run has its held-out rows.
        base_precision: `nf4` or `bf16`: how its trainer stored the base.
        dtype: of merged weights: `bf16`, `fp16`; default: the 16-bit dtype of the base.
        merge_into: `original` or `dequantized`; default: the one that is measured to be nearer to the trained model.

    Raises:
        InputError: no adapter there, one that does not fit the base, or a target that exists.
        CheckError: the disk is too small. Nothing is written.
        IntegrityError: a file of the run has changed, or the base is another one.
        DirectoryInUseError: another process exports into the folder.
        DeviceError: the GPU failed, or its memory is full.
        StorageError: a file cannot be written.
    """
    kinds = _kinds(to)
    _one_of("--dtype", dtype, DTYPES)
    _one_of("--merge-into", merge_into, BASES)
    _one_of("--base-precision", base_precision, ("nf4", "bf16"))
    with showing(display) as chosen:
        chosen.phase("reading the adapter")
        from solotune.exporters.source import open_source

        source = open_source(target, base=base, dataset=dataset, base_precision=base_precision)
        folder = Path(out).expanduser() if out is not None else _default_folder(source)
        return _export(source, folder, kinds, dtype, merge_into, chosen)


def _export(
    source: ExportSource, path: Path, kinds: list[str], dtype: str | None, merge_into: str | None, display: Display
) -> Export:
    """Check everything that can refuse the export, then write one artifact after the other."""
    from solotune.exporters import export_folder, merge, merge_choice, write_artifacts
    from solotune.exporters.base_tensors import BaseTensors

    export_folder.refuse_existing(path, kinds)
    tensors = BaseTensors.of(source.base, source.config)
    tensors.check(source.adapter, str(source.adapter_folder))
    merge_choice.check_wanted(source, tensors, merge_into)
    dtype, because = merge.output_dtype(tensors, dtype)
    display.note(export_folder.check_disk(path, write_artifacts.sizes(source, tensors, kinds, dtype)))
    own_run = source.run if source.run is not None and path == source.run.path / EXPORT else None
    with export_folder.opened(path, kinds, own_run) as folder:
        job = write_artifacts.ExportJob(
            source, tensors, folder, dtype, merge_into, display.phase, display.progress, list(source.choices)
        )
        if "merged" in kinds:
            job.choices.append(Choice("dtype", dtype, because))
            job.measure_bases()
        writers = {"adapter": write_artifacts.export_adapter, "merged": write_artifacts.export_merged}
        for kind in kinds:
            job.add(writers[kind](job))
        display.choices(job.choices)
        return job.result()


def _kinds(to: str | Sequence[str]) -> list[str]:
    """The kinds to write, in the order of `KINDS`.

    Raises:
        InputError: an unknown one, or none.
    """
    names = [name.strip() for name in (to.split(",") if isinstance(to, str) else to) if name.strip()]
    for name in names:
        _one_of("--to", name, KINDS)
    if not names:
        raise InputError("--to: nothing to export", allowed=", ".join(KINDS))
    return [kind for kind in KINDS if kind in names]


def _one_of(option: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise InputError(f"{option}: {value} is not known", allowed=", ".join(allowed))


def _default_folder(source: ExportSource) -> Path:
    return (source.run.path if source.run is not None else source.adapter_folder) / EXPORT
