"""Load the model of a run: its base, its adapter, and its tokenizer. Used by evaluate and chat.

The machine may be another than the one that trained the run, so the settings that depend on it are resolved again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from solotune import dataset
from solotune.config.load import load_config
from solotune.config.run_config import Choice, RunConfig
from solotune.dataset import Prepared
from solotune.errors import InputError, IntegrityError, program, resume_command
from solotune.hardware import machine as environment
from solotune.hardware.gpu_errors import device_errors
from solotune.hardware.machine import Machine
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.model import lora
from solotune.model.adapter import CONFIG, read_config, read_finite_tensors
from solotune.model.base_fingerprint import base_fingerprint, check_base
from solotune.model.loading import Progress, TrainableModel, load_model
from solotune.run.manifest import check_folder
from solotune.run.record import RunRecord
from solotune.run.run_dir import FINGERPRINTS, RunDirectory, read_object
from solotune.runtime.world import ALONE, World
from solotune.training import checkpoint
from solotune.training.base_memory import settle_offload
from solotune.training.resume import day_of


def resolve_for_machine(config: RunConfig) -> tuple[RunConfig, Machine, list[Choice]]:
    """Resolve the settings that depend on the machine; the config, the machine, and what was chosen."""
    machine = environment.probe()
    resolved, choices = environment.resolve_for_machine(config, machine)
    return resolved, machine, choices


def load_base(
    config: RunConfig,
    machine: Machine,
    model_files: ModelFiles | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> TrainableModel:
    """Load the base of a resolved config, with new adapters, on the config's device: see `load_model`.

    Raises:
        CheckError: the host has no room for the layers that are streamed, or ranks cannot share the base.
    """
    device = torch.device(environment.device_of(machine, use_cpu=config.use_cpu))
    with device_errors(config.memory):
        model_files = model_files or resolve_model(config)
        config, choices = settle_offload(config, machine, model_files)
        dtype = getattr(torch, environment.dtype_of(config.bf16))
        model = load_model(config, device, dtype, model_files, progress, world)
    model.choices += choices
    return model


def for_reading(recorded: RunConfig) -> RunConfig:
    """The config of a run that is read: where the base lies is chosen for this machine, not for that of the run."""
    again: dict[str, object] = {"base_offload": "auto", "base_sharding": False}
    if not recorded.multiplies_in_fp8:
        again["base_residency"] = "auto"
    return recorded.replaced("machine", **again)


@dataclass
class TunedRun:
    """A run opened for reading; `load` loads the model."""

    directory: RunDirectory
    config: RunConfig
    machine: Machine
    choices: list[Choice]
    tokenizer: Any
    base: ModelFiles | None = None  # known if the tokenizer came from the base

    @classmethod
    def open(cls, path: str | Path) -> TunedRun:
        """Open a run, with its tokenizer.

        Raises:
            InputError: no run there.
        """
        directory = RunDirectory.open(path)
        config, machine, choices = resolve_for_machine(for_reading(load_config(directory.path / "config.yaml")))
        if directory.adapter.is_dir():
            beside = {"model_name_or_path": str(directory.adapter), "chat_template_path": None}
            tokenizer = dataset.load_tokenizer(config.replaced("run", **beside))
            return cls(directory, config, machine, choices, tokenizer)
        base = resolve_model(config)
        return cls(directory, config, machine, choices, dataset.load_tokenizer(config, base), base)

    @property
    def prompt_format(self) -> str:
        """How the model was trained, and is asked: `chat` (through its chat template) or `text`.

        Runs that did not record it are asked through the chat template.

        Raises:
            InputError: data.json is damaged.
        """
        return "text" if self._data.get("prompt_format") == "text" else "chat"

    @property
    def system_prompt(self) -> tuple[str, int, int] | None:
        """The most frequent system prompt of the training rows, its rows and all rows; None without one."""
        found = self._data.get("system_prompt")
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            return None
        return found["text"], int(found.get("rows", 0)), int(found.get("of", 0))

    @property
    def shared_system_prompt(self) -> str | None:
        """The system prompt that all training rows have; None if they differ, or for a model of plain text."""
        if self.system_prompt is None or self.prompt_format == "text":
            return None
        text, rows, total = self.system_prompt
        return text if rows >= total else None

    @property
    def answer_ends(self) -> list[int]:
        """Ids of the tokens that end the training rows."""
        found = self._data.get("answer_ends")
        return [int(token) for token in found] if isinstance(found, dict) else []

    @property
    def _data(self) -> dict[str, Any]:
        """data.json; empty if there is none.

        Raises:
            InputError: it is damaged.
        """
        path = self.directory.path / "data.json"
        return read_object(path) if path.is_file() else {}

    def prepare(self) -> Prepared:
        """The run's rows, prepared again, with the same rows held out as in training.

        Raises:
            InputError: the data is not there, or cannot be read.
            IntegrityError: the held-out rows have changed since the run.
        """
        path = self.directory.path
        prepared = dataset.prepare(self.config, self.tokenizer, rendered_on=day_of(path))
        hashes = read_object(path / "data.json").get("sha256")
        recorded = hashes.get("validation") if isinstance(hashes, dict) else None
        if recorded != prepared.report.validation_sha256:
            raise IntegrityError(
                f"{path}: the held-out rows have changed since the run",
                seen="the data file, its split or the tokenizer has changed",
                change="restore the data, or train again",
            )
        return prepared

    def adapter_folder(self) -> Path:
        """Folder of the run's adapter, or of the newest checkpoint if the run has not finished; its files are checked.

        Raises:
            InputError: nothing is saved yet.
            IntegrityError: a file differs from the folder's manifest.
        """
        done = self.directory.adapter.is_dir()
        folder = self.directory.adapter if done else checkpoint.newest(self.directory.checkpoints)
        if folder is None:
            ranks = RunRecord.read(self.directory.path).launched
            raise InputError(
                f"{self.directory.path}: no adapter or checkpoint is saved yet",
                change=f"finish the run with: {resume_command(self.directory.path, ranks)}",
            )
        for file, problem in check_folder(folder):
            change = f"{program()} verify {self.directory.path} lists all damaged files"
            raise IntegrityError(f"{folder / file}: {problem}", change=change)
        return folder

    def checked_base(self) -> ModelFiles:
        """Files of the run's base, with its weights.

        Raises:
            InputError: it is not there.
            IntegrityError: it is not the base that the run was trained on.
        """
        recorded = read_object(self.directory.path / FINGERPRINTS).get("base")
        if not isinstance(recorded, dict):
            path = self.directory.path / FINGERPRINTS
            raise IntegrityError(f"{path}: the fingerprint of the base is missing", change="restore the run's files")
        base = (self.base or resolve_model(self.config)).with_weights()
        check_base(recorded, base_fingerprint(base), str(self.directory.path))
        return base

    @staticmethod
    def choices_of(model: TrainableModel) -> list[Choice]:
        """What was chosen for this machine while the model was loaded."""
        return [choice for choice in model.choices if choice.key == "base_offload"]

    def load(self, progress: Progress | None = None) -> TrainableModel:
        """Load the base with the run's adapter, or with that of the newest checkpoint if the run has not finished.

        Args:
            progress: called with the tensors read so far, and all of them.

        Raises:
            InputError: nothing is saved yet.
            IntegrityError: the adapter is damaged, or the base is not the one it was trained on.
        """
        folder = self.adapter_folder()
        tensors = read_finite_tensors(folder)
        base = self.checked_base()
        model = load_base(self.config, self.machine, base, progress)
        name, revision = self.config.model_name_or_path, self.config.model_revision
        expected = lora.peft_config(self.config.lora, model.lora_layers, model.module, base=name, revision=revision)
        _check_adapter_config(folder, expected)
        lora.load_state_dict(model.lora_layers, tensors, str(folder))
        return model


SAME = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "fan_in_fan_out")
FREE = ("task_type", "base_model_name_or_path", "revision", "lora_dropout", "init_lora_weights", "inference_mode")


def _check_adapter_config(folder: Path, expected: dict[str, Any]) -> None:
    """Compare adapter_config.json with the run's config: PEFT reads the first and must compute the same as solotune.

    Raises:
        InputError: they differ, or it sets more than plain LoRA (`auto_mapping`, `corda_config`, DoRA).
    """
    path, written = folder / CONFIG, read_config(folder)
    for key in (*SAME, *sorted(written.keys() - {*SAME, *FREE})):
        given, wanted = written.get(key), expected.get(key)
        if key == "target_modules" and isinstance(given, list):
            given, wanted = sorted(map(str, given)), sorted(expected[key])
        if given != wanted and (key in SAME or given not in (None, False, {}, [], "")):
            raise InputError(
                f"{path}: {key} differs from the run's config",
                seen=f"{key}: {json.dumps(given)}"[:200],
                allowed=f"{key}: {json.dumps(wanted)}"[:200] if key in SAME else "plain LoRA",
                change="restore the adapter of this run",
            )
