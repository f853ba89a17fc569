"""Write each artifact, load it with the library that users load it with, and compare it with the trained model.

job = ExportJob(...)
export_adapter(job), export_merged(job)      -> Artifact
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solotune.config.run_config import Choice
from solotune.dataset.chat.tokenizer import saved_files
from solotune.exporters import parity
from solotune.exporters.adapter_folder import note_on_base, write_adapter
from solotune.exporters.artifact import Artifact, Compared, Export
from solotune.exporters.base_tensors import BaseTensors
from solotune.exporters.export_folder import ExportFolder, artifact_of
from solotune.exporters.merge import OUTPUT_DTYPES, Merge, Progress, merged_bytes, write_merged
from solotune.exporters.merge_choice import MergeChoice, Trained, beyond, choose, measure_trained
from solotune.exporters.parity import parity_of
from solotune.exporters.source import ExportSource
from solotune.hardware.gpu_errors import device_errors
from solotune.run.atomic_io import whole_folder


@dataclass
class ExportJob:
    """An export while it is made."""

    source: ExportSource
    tensors: BaseTensors
    folder: ExportFolder
    dtype: str
    merge_into: str | None
    phase: Any
    progress: Progress
    choices: list[Choice] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    _trained: Trained | None = None
    _choice: MergeChoice | None = None

    @property
    def trained(self) -> Trained:
        """What the trained model predicts; it is loaded at the first use, and dropped by `choice`."""
        if self._trained is None:
            self.phase("loading the trained model")
            with device_errors(self.source.config.memory):
                self._trained = measure_trained(self.source, self.progress)
        return self._trained

    def drop_model(self) -> None:
        """Free the trained model's memory before another one is loaded; what it predicts is kept."""
        self.trained.model = None

    @property
    def choice(self) -> MergeChoice:
        """The base to merge into, measured at the first use."""
        if self._choice is None:
            trained = self.trained
            self.phase("measuring which base to merge into")
            with device_errors(self.source.config.memory):
                self._choice = choose(self.source, self.tensors, trained, self.dtype, self.merge_into, self.progress)
            self.choices.append(self._choice.choice)
        return self._choice

    def measure_bases(self) -> None:
        """Choose the base to merge into, while the trained model is loaded."""
        assert self.choice

    def add(self, artifact: Artifact) -> None:
        """Keep a finished artifact, and record it in export.json."""
        self.artifacts.append(artifact)
        self.folder.record(self.result())

    def result(self) -> Export:
        merge = self._choice.to_json() if self._choice else None
        return Export(self.folder.path, list(self.artifacts), list(self.choices), merge)


def sizes(source: ExportSource, tensors: BaseTensors, kinds: Sequence[str], dtype: str) -> dict[str, int]:
    """Bytes that each kind needs on the disk."""
    adapter = sum(tensor.numel() * tensor.element_size() for tensor in source.adapter.tensors.values())
    each = {"adapter": adapter, "merged": merged_bytes(tensors, OUTPUT_DTYPES[dtype])}
    beside = sum(len(content) for _, content in saved_files(source.tokenizer))
    return {kind: each[kind] + beside for kind in kinds}


def export_adapter(job: ExportJob) -> Artifact:
    """The adapter with its tokenizer, for PEFT, vLLM and whatever loads adapters."""
    started, source, target = time.monotonic(), job.source, job.folder.path / "adapter"
    with whole_folder(target) as folder:
        write_adapter(source, folder)
        compared = _adapter_in_peft(job, folder.path)
    commands = [_vllm_adapter(source, target)]
    return artifact_of("adapter", target, time.monotonic() - started, compared, next_commands=commands)


def _adapter_in_peft(job: ExportJob, folder: Path) -> Compared:
    notes = [note for note in (note_on_base(job.source), parity.why_not_in_peft(job.source)) if note is not None]
    if parity.why_not_in_peft(job.source) is not None:
        return Compared(notes=notes)
    trained = job.trained
    job.drop_model()
    job.phase("loading the adapter in PEFT")
    try:
        with device_errors(job.source.config.memory):
            found = parity_of(parity.in_peft(folder, job.source, trained), "peft")
    except parity.CannotRunBase as error:
        return Compared(notes=[*notes, f"not compared in PEFT: {error}"])
    return Compared([found], beyond(found), notes)


def export_merged(job: ExportJob) -> Artifact:
    """The merged model, a complete folder for transformers, vLLM and converters."""
    choice, target = job.choice, job.folder.path / "merged"
    job.phase(f"merging into the {choice.into} base")
    started = time.monotonic()
    merge = Merge.of(job.source, choice.into, OUTPUT_DTYPES[job.dtype])
    with whole_folder(target) as folder:
        write_merged(job.source, job.tensors, folder, merge, job.progress)
        compared = _merged_in_transformers(job, folder.path, choice)
    return artifact_of("merged", target, time.monotonic() - started, compared)


def _merged_in_transformers(job: ExportJob, folder: Path, choice: MergeChoice) -> Compared:
    trained = job.trained
    num_bytes = merged_bytes(job.tensors, OUTPUT_DTYPES[job.dtype])
    if (why_not := parity.why_not_in_transformers(num_bytes, trained)) is not None:
        return Compared(notes=[why_not])
    job.phase("loading the merged model again")
    with device_errors(job.source.config.memory):
        found = parity_of(parity.in_transformers(folder, trained), "transformers")
    return Compared([found], choice.problems(found))


def _vllm_adapter(source: ExportSource, target: Path) -> str:
    """The command that serves base and adapter."""
    rank = max(map(source.adapter.rank, source.adapter.modules))
    return f"vllm serve {source.base.name} --enable-lora --max-lora-rank {rank} --lora-modules tuned={target}"
