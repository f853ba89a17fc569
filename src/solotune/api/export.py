"""`solotune export`: an adapter as files for other programs, each compared with the model that was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from solotune.api.report import rewrite_page
from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.errors import InputError
from solotune.run.run_dir import EXPORT
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.exporters.artifact import Export
    from solotune.exporters.source import ExportSource

KINDS = ("adapter", "merged", "gguf", "ollama", "adapter-gguf", "vllm")
DEFAULT = ("adapter", "merged")
DTYPES = ("bf16", "fp16")
BASES = ("original", "dequantized")


@quiet_libraries()
def export(
    target: str | Path,
    to: str | Sequence[str] = DEFAULT,
    *,
    out: str | Path | None = None,
    base: str | None = None,
    dataset: str | None = None,
    base_precision: str | None = None,
    dtype: str | None = None,
    merge_into: str | None = None,
    quantization: str | Sequence[str] = "f16",
    push: str | None = None,
    public: bool = False,
    display: Display | None = None,
) -> Export:
    """Export the adapter of a run, or of another trainer, and compare each file with the model that was trained.
    The report.html of a run shows the comparison.

        result = solotune.export("runs/demo")
        print(result.ok, result.to_json()["merge"])

    Args:
        target: a run, or a folder with adapter_config.json.
        to: what to write: `adapter`, `merged`, `gguf`, `ollama`, `adapter-gguf` (unmerged, beside its base),
            `vllm` (checks files, and says how to serve them); a list, or names with commas. What GGUF files are made
            of, the merged model, is written too.
        out: the folder to write into; default: `export` in the run, `export` beside the adapter's files.
        base: the base model, a folder or hub id; of a run only if it has moved.
        dataset: rows to measure with, for an adapter that others trained; a run has its held-out rows.
        base_precision: `nf4` or `bf16`: how its trainer stored the base.
        dtype: of merged weights: `bf16`, `fp16`; default: the 16-bit dtype of the base.
        merge_into: `original` or `dequantized`; default: the one that is measured to be nearer to the trained model.
        quantization: of GGUF files: `f16`, `q8_0`, `q4_k_m`, ...; several with commas. Ollama gets the first, the base
            of `adapter-gguf` too.
        push: `owner/name`: upload the one kind of `to` to this repository of the hub, new or empty. What is
            exported already is uploaded as it is; what differs from the trained model is not uploaded.
        public: everybody may read the new repository; default: only its owner.

    Raises:
        InputError: no adapter there, one that does not fit the base, or a target that exists.
        CheckError: the disk is too small. Nothing is written.
        IntegrityError: a file of the run has changed, or the base is another one.
        DirectoryInUseError: another process exports into the folder.
        DeviceError: the GPU failed, or its memory is full.
        StorageError: a file cannot be written.
    """
    kinds, quantizations = _names("--to", to, KINDS), _names("--quantization", quantization)
    _one_of("--dtype", dtype, DTYPES)
    _one_of("--merge-into", merge_into, BASES)
    _one_of("--base-precision", base_precision, ("nf4", "bf16"))
    with showing(display) as chosen:
        chosen.phase("reading the adapter")
        from solotune.exporters.source import open_source

        source = open_source(target, base=base, dataset=dataset, base_precision=base_precision)
        folder = Path(out).expanduser() if out is not None else _default_folder(source)
        make = partial(_export, source, folder, kinds, dtype, merge_into, quantizations, chosen)
        return make() if push is None else _pushed(make, folder, kinds, push, public, chosen)


def _pushed(
    make: Callable[[], Export], folder: Path, kinds: list[str], repo: str, public: bool, display: Display
) -> Export:
    """Export unless it is there already, and upload what is as it was trained."""
    from solotune.exporters import push

    made = push.exported(folder, kinds, repo) or make()
    if made.ok:
        display.phase(f"uploading to {repo}")
        display.note(f"uploaded: {push.push(folder / kinds[0], repo, private=not public)}")
    return made


def _export(
    source: ExportSource,
    path: Path,
    kinds: list[str],
    dtype: str | None,
    merge_into: str | None,
    quantizations: list[str],
    display: Display,
) -> Export:
    """Check everything that can refuse the export, then write one artifact after the other."""
    from solotune.exporters import export_folder, export_plan
    from solotune.exporters.adapter_gguf import export_adapter_gguf
    from solotune.exporters.gguf_artifacts import export_gguf, export_ollama
    from solotune.exporters.write_artifacts import ExportJob, check_for_vllm, export_adapter, export_merged

    plan = export_plan.checked(source, path, kinds, dtype, merge_into, quantizations)
    display.note(export_folder.check_disk(path, plan.sizes))
    own_run = source.run if source.run is not None and path == source.run.path / EXPORT else None
    with export_folder.opened(path, plan.kinds, own_run) as folder:
        job = ExportJob(source, plan, folder, display.phase, display.progress, [*source.choices, *plan.choices])
        job.prepare()
        writers = {
            "adapter": export_adapter,
            "merged": export_merged,
            "gguf": export_gguf,
            "ollama": export_ollama,
            "adapter-gguf": export_adapter_gguf,
            "vllm": check_for_vllm,
        }
        for kind in plan.kinds:
            job.add(writers[kind](job))
        display.choices(job.choices)
        result = job.result()
    if own_run is not None:
        rewrite_page(own_run, display)
    return result


def _names(option: str, given: str | Sequence[str], allowed: Sequence[str] | None = None) -> list[str]:
    """The names of an option, without repetition; with `allowed` in its order.

    Raises:
        InputError: an unknown one, or none.
    """
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given) if name.strip()]
    if not names:
        raise InputError(f"{option}: nothing is named", allowed=", ".join(allowed or ["f16, q8_0, q4_k_m, ..."]))
    for name in names if allowed else ():
        _one_of(option, name, allowed or ())
    return [name for name in allowed if name in names] if allowed else list(dict.fromkeys(names))


def _one_of(option: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise InputError(f"{option}: {value} is not known", allowed=", ".join(allowed))


def _default_folder(source: ExportSource) -> Path:
    return (source.run.path if source.run is not None else source.adapter_folder) / EXPORT
