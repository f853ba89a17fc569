"""GGUF files of a merged folder, and a folder for Ollama, each compared in llama.cpp with the merged model.

export_gguf(job), export_ollama(job)      -> Artifact
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch

from solotune.exporters import parity
from solotune.exporters.artifact import Artifact, Compared
from solotune.exporters.card import write_card
from solotune.exporters.engine_lacks import texts_of
from solotune.exporters.engine_parity import Rows, gguf_parity, ollama_parity
from solotune.exporters.export_folder import artifact_of
from solotune.exporters.gguf import write_gguf
from solotune.exporters.merge import OUTPUT_DTYPES, merged_bytes
from solotune.exporters.ollama import MODELFILE, write_modelfile
from solotune.exporters.probe_texts import probe_rows
from solotune.exporters.write_artifacts import ExportJob, prompts_of
from solotune.run.atomic_io import Folder, whole_folder
from solotune.training.resume import day_of


def export_gguf(job: ExportJob) -> Artifact:
    """One GGUF file for each quantisation."""
    started, target = time.monotonic(), job.folder.path / "gguf"
    with whole_folder(target) as folder:
        compared = Compared()
        rows = _reference(job, compared)
        for quantization in job.plan.quantizations:
            _write_and_compare(job, folder, quantization, rows, compared)
        write_card(folder, job.source, "gguf", {"problems": compared.problems, "notes": compared.notes})
    command = f"llama-server -m {target / f'model-{job.plan.quantizations[0]}.gguf'} --jinja"
    return artifact_of("gguf", target, time.monotonic() - started, compared, next_commands=[command])


def export_ollama(job: ExportJob) -> Artifact:
    """A folder for `ollama create`: a GGUF file and its Modelfile."""
    source, quantization = job.source, job.plan.quantizations[0]
    started, target = time.monotonic(), job.folder.path / "ollama"
    name = f"model-{quantization}.gguf"
    made = job.folder.path / "gguf" / name
    with whole_folder(target) as folder:
        compared = Compared()
        if made.is_file():
            _share(made, folder, name)
        else:
            _write_and_compare(job, folder, quantization, _reference(job, compared), compared)
        day = day_of(source.run.path) if source.run is not None else None
        stops = [source.tokenizer.convert_ids_to_tokens(token) for token in source.stop_ids]
        compared.notes.extend(
            write_modelfile(
                folder, name, source.tokenizer, source.prompt_format, source.system_prompt, stops, rendered_on=day
            )
        )
        if source.prompt_format == "chat":
            found, problems, notes = ollama_parity(source.tokenizer, texts_of(source.data))
            compared.parity.append(found)
            compared.problems.extend(problems)
            compared.notes.extend(notes)
        write_card(folder, source, "ollama", {"problems": compared.problems, "notes": compared.notes})
    model = job.folder.path.parent.name or "tuned"
    command = f"ollama create {model} -f {target / MODELFILE}"
    return artifact_of("ollama", target, time.monotonic() - started, compared, next_commands=[command])


def _write_and_compare(job: ExportJob, folder: Folder, quantization: str, rows: Rows, compared: Compared) -> None:
    source = job.source
    job.phase(f"converting to GGUF, {quantization}")
    path = write_gguf(job.folder.path / "merged", folder, quantization, prompt_format=source.prompt_format)
    job.phase(f"comparing {quantization} in llama.cpp")
    found, problems, notes = gguf_parity(
        path,
        quantization,
        source.tokenizer,
        source.prompt_format,
        rows,
        prompts=prompts_of(source),
        texts=texts_of(source.data),
    )
    compared.parity.append(found)
    compared.problems.extend(f"{quantization}: {problem}" for problem in problems)
    compared.notes.extend(f"{quantization}: {note}" for note in notes)


def _reference(job: ExportJob, compared: Compared) -> Rows:
    """Rows with what the merged model predicts; none, with a note, if it does not fit into memory."""
    num_bytes = merged_bytes(job.plan.tensors, OUTPUT_DTYPES[job.plan.dtype])
    if (why_not := parity.why_not_in_transformers(num_bytes, torch.float32, torch.device("cpu"))) is not None:
        compared.notes.append(f"no log-probabilities are compared: the merged model is {why_not}")
        return ()
    job.phase("loading the merged model")
    return parity.row_logits(job.folder.path / "merged", job.source.rows or probe_rows(job.source))


def _share(file: Path, folder: Folder, name: str) -> None:
    """Put an exported file into a second folder: as a hard link, which takes no room, or else as a copy."""
    try:
        os.link(file, folder.path / name)
    except OSError:
        shutil.copyfile(file, folder.path / name)
    folder.adopt(name)
