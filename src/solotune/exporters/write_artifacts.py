"""Write each artifact, load it with the library that users load it with, and compare it with the trained model.

job = ExportJob(...)
export_adapter(job), export_merged(job)      -> Artifact
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from solotune.config.run_config import Choice
from solotune.exporters import parity
from solotune.exporters.adapter_folder import note_on_base, write_adapter
from solotune.exporters.artifact import Artifact, Compared, Export, Parity
from solotune.exporters.card import write_card
from solotune.exporters.export_folder import ExportFolder, artifact_of, sha256_of
from solotune.exporters.export_plan import WEIGHTS, ExportPlan
from solotune.exporters.merge import OUTPUT_DTYPES, Merge, Progress, merged_bytes, write_merged
from solotune.exporters.merge_choice import MergeChoice, Trained, beyond, choose, measure_trained
from solotune.exporters.parity import parity_of
from solotune.exporters.source import ExportSource
from solotune.exporters.template_parity import folder_parity
from solotune.exporters.vllm import NOT_RUN, check_vllm, serve_line
from solotune.hardware.gpu_errors import device_errors
from solotune.model.adapter import CONFIG as ADAPTER_CONFIG
from solotune.run.atomic_io import Folder, whole_folder

MOST_PROMPTS = 16


@dataclass
class ExportJob:
    """An export while it is made."""

    source: ExportSource
    plan: ExportPlan
    folder: ExportFolder
    phase: Any
    progress: Progress
    choices: list[Choice] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    _trained: Trained | None = None
    _choice: MergeChoice | None = None
    _token_ids: dict[str, tuple[Parity, list[str]]] = field(default_factory=dict)

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
                self._choice = choose(
                    self.source, self.plan.tensors, trained, self.plan.dtype, self.plan.merge_into, self.progress
                )
            self.choices.append(self._choice.choice)
        return self._choice

    def token_ids(self, folder: Folder) -> tuple[Parity, list[str]]:
        """Token ids of conversations in a folder that is being written; one with the same files is not asked again."""
        others = ("config.json", ADAPTER_CONFIG)
        files = {name: entry for name, entry in folder.entries.items() if name not in others}
        key = str(sorted(entry for name, entry in files.items() if not name.endswith(".safetensors")))
        if key not in self._token_ids:
            self.phase("comparing token ids of conversations")
            source = self.source
            self._token_ids[key] = folder_parity(
                folder.path, source.tokenizer, source.prompt_format, source.stop_ids, prompts_of(source)
            )
        return self._token_ids[key]

    def prepare(self) -> None:
        """Choose the base to merge into first, since that takes the trained model's weights."""
        if any(kind in WEIGHTS for kind in self.plan.kinds):
            assert self.choice

    def add(self, artifact: Artifact) -> None:
        """Keep a finished artifact, and record it in export.json."""
        self.artifacts.append(artifact)
        self.folder.record(self.result())

    def result(self) -> Export:
        merge = self._choice.to_json() if self._choice else None
        adapter = sha256_of(self.source.adapter)
        return Export(self.folder.path, list(self.artifacts), list(self.choices), merge, adapter)


def prompts_of(source: ExportSource) -> list[str]:
    """Some prompts of a model that was trained on plain text, as texts to compare token ids on."""
    ids = [row.prompt_ids for row in source.rows[:MOST_PROMPTS]] if source.prompt_format == "text" else []
    return [source.tokenizer.decode(one) for one in ids if len(one)]


def _with_token_ids(job: ExportJob, folder: Folder, compared: Compared) -> Compared:
    """What was compared, with the token ids that transformers makes of the folder's tokenizer and template."""
    ids, problems = job.token_ids(folder)
    found = [
        replace(one, token_ids_equal=ids.token_ids_equal, conversations=ids.conversations, differing=ids.differing)
        for one in compared.parity
    ]
    return Compared(found or [ids], [*compared.problems, *problems], compared.notes)


def _finish(job: ExportJob, folder: Folder, kind: str, compared: Compared) -> Compared:
    """Write the card, which lists the hashes of all other files."""
    facts = {"compared": vars(compared) | {"parity": [asdict(one) for one in compared.parity]}}
    if kind == "merged":
        facts["merged_into"] = job.choice.to_json()
    write_card(folder, job.source, kind, facts)
    return compared


def export_adapter(job: ExportJob) -> Artifact:
    """The adapter with its tokenizer, for PEFT, vLLM and whatever loads adapters."""
    started, source, target = time.monotonic(), job.source, job.folder.path / "adapter"
    with whole_folder(target) as folder:
        write_adapter(source, folder)
        compared = _with_token_ids(job, folder, _adapter_in_peft(job, folder.path))
        _finish(job, folder, "adapter", compared)
    return artifact_of("adapter", target, time.monotonic() - started, compared)


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
    merge = Merge.of(job.source, choice.into, OUTPUT_DTYPES[job.plan.dtype])
    with whole_folder(target) as folder:
        write_merged(job.source, job.plan.tensors, folder, merge, job.progress)
        compared = _with_token_ids(job, folder, _merged_in_transformers(job, folder.path, choice))
        _finish(job, folder, "merged", compared)
    return artifact_of("merged", target, time.monotonic() - started, compared)


def _merged_in_transformers(job: ExportJob, folder: Path, choice: MergeChoice) -> Compared:
    trained = job.trained
    num_bytes = merged_bytes(job.plan.tensors, OUTPUT_DTYPES[job.plan.dtype])
    if (why_not := parity.why_not_in_transformers(num_bytes, trained.dtype, trained.device)) is not None:
        return Compared(notes=[why_not])
    job.phase("loading the merged model again")
    with device_errors(job.source.config.memory):
        found = parity_of(parity.in_transformers(folder, trained), "transformers")
    return Compared([found], choice.problems(found))


def check_for_vllm(job: ExportJob) -> Artifact:
    """The exported folder that vLLM would serve, checked from its files; nothing is written."""
    started, source, root = time.monotonic(), job.source, job.folder.path
    is_merged = (root / "merged").is_dir()
    folder, name = root / ("merged" if is_merged else "adapter"), root.parent.name or "tuned"
    problems = check_vllm(folder, None if is_merged else source.base.config)
    line = serve_line(folder, name) if is_merged else serve_line(
        folder, name, base=source.base.name, revision=source.base.revision if source.base.hub_id else None
    )  # fmt: skip
    compared = Compared([Parity("files")], problems, [NOT_RUN])
    return artifact_of("vllm", folder, time.monotonic() - started, compared, next_commands=[line])
