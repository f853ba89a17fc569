"""The adapter as a GGUF file of its own, beside its base: for llama-server's --lora and Ollama's ADAPTER, unmerged.

    adapter-gguf/  base-f16.gguf  adapter.gguf  Modelfile  README.md  provenance.json

An adapter fits the base that it was trained on, so that base is written beside it: the one that a merge would go into
(`merge_choice`), with the training's tokenizer, chat template and end tokens. Several adapters of one base can share
the file; Ollama keeps one copy of equal files by itself. What is compared in llama.cpp is the pair, with the same base
and the adapter unmerged in float32.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import torch

from solotune.exporters import parity
from solotune.exporters.artifact import Artifact, Compared
from solotune.exporters.card import write_card
from solotune.exporters.engine_lacks import texts_of
from solotune.exporters.engine_parity import Rows, gguf_parity
from solotune.exporters.export_folder import artifact_of
from solotune.exporters.export_plan import ADAPTER_GGUF
from solotune.exporters.gguf import LORA_FILE, write_gguf, write_lora_gguf
from solotune.exporters.merge import OUTPUT_DTYPES, Merge, merged_bytes, write_merged
from solotune.exporters.ollama import MODELFILE, write_modelfile
from solotune.exporters.probe_texts import probe_rows
from solotune.exporters.write_artifacts import ExportJob, prompts_of
from solotune.model.adapter import Adapter
from solotune.run.atomic_io import Folder, whole_folder
from solotune.training.resume import day_of

BASE = "base"


def export_adapter_gguf(job: ExportJob) -> Artifact:
    """The adapter and its base, each as GGUF, with a Modelfile that puts them together."""
    source, quantization = job.source, job.plan.quantizations[0]
    started, target = time.monotonic(), job.folder.path / ADAPTER_GGUF
    with whole_folder(target) as folder:
        compared = Compared()
        beside = folder.path / BASE
        try:
            _write_base(job, folder)
            job.phase(f"converting adapter and base to GGUF, {quantization}")
            base = write_gguf(beside, folder, quantization, prompt_format=source.prompt_format, name=BASE)
            lora = write_lora_gguf(source.adapter_folder, beside, folder)
            rows = _reference(job, folder, compared)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        job.phase("comparing the adapter beside its base in llama.cpp")
        found, problems, notes = gguf_parity(
            base,
            quantization,
            source.tokenizer,
            source.prompt_format,
            rows,
            lora=lora,
            prompts=prompts_of(source),
            texts=texts_of(source.data),
        )
        compared.parity.append(found)
        compared.problems.extend(problems)
        compared.notes.extend([*notes, f"the base beside the adapter is {_what(job)}"])
        day = day_of(source.run.path) if source.run is not None else None
        stops = [source.tokenizer.convert_ids_to_tokens(token) for token in source.stop_ids]
        compared.notes.extend(
            write_modelfile(
                folder, base.name, source.tokenizer, source.prompt_format, source.system_prompt, stops,
                adapter_name=LORA_FILE, rendered_on=day,
            )
        )  # fmt: skip
        write_card(folder, source, ADAPTER_GGUF, {"problems": compared.problems, "notes": compared.notes})
    model = job.folder.path.parent.name or "tuned"
    commands = [
        f"llama-server -m {target / base.name} --lora {target / LORA_FILE} --jinja",
        f"ollama create {model} -f {target / MODELFILE}",
    ]
    return artifact_of(ADAPTER_GGUF, target, time.monotonic() - started, compared, next_commands=commands)


def _what(job: ExportJob) -> str:
    return {"dequantized": "the one of the training: its codes, dequantised"}.get(
        job.choice.into, f"the {job.choice.into} one"
    )


def _write_base(job: ExportJob, folder: Folder) -> None:
    """The base as a merge would write it, with nothing added."""
    job.phase(f"writing the {job.choice.into} base")
    merge = Merge.of(job.source, job.choice.into, OUTPUT_DTYPES[job.plan.dtype])
    nothing = Adapter(job.source.adapter.config, {})
    with whole_folder(folder.path / BASE) as base:
        write_merged(job.source, job.plan.tensors, base, replace(merge, adapter=nothing), job.progress)


def _reference(job: ExportJob, folder: Folder, compared: Compared) -> Rows:
    """Rows with what base and adapter predict in float32; none, with a note, if that does not fit into memory."""
    num_bytes = merged_bytes(job.plan.tensors, OUTPUT_DTYPES[job.plan.dtype])
    if (why_not := parity.why_not_in_transformers(num_bytes, torch.float32, torch.device("cpu"))) is not None:
        compared.notes.append(f"no log-probabilities are compared: the model is {why_not}")
        return ()
    job.phase("loading base and adapter")
    rows = job.source.rows or probe_rows(job.source)
    return parity.row_logits(folder.path / BASE, rows, job.source.adapter)
