"""A run's model, loaded again: its base, its adapter, and the tokenizer that lies beside it.

What evaluating a run and talking to it share. The machine may be another one than trained it: what depends on it is
settled anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from solotune import dataset
from solotune.config.run_config import Choice, RunConfig, load_config
from solotune.errors import InputError, IntegrityError
from solotune.evaluation import generation
from solotune.hardware import machine as environment
from solotune.hardware.gpu_errors import device_errors
from solotune.hardware.machine import Machine
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.model import lora
from solotune.model.adapter import CONFIG, read_config, read_finite_tensors
from solotune.model.base_fingerprint import base_fingerprint, check_base
from solotune.model.loading import TrainableModel, load_model
from solotune.run.manifest import check_folder
from solotune.run.run_dir import FINGERPRINTS, RunDirectory, read_json
from solotune.training import checkpoint


def resolve_for_machine(config: RunConfig) -> tuple[RunConfig, Machine, list[Choice]]:
    """The config with what this machine decides, the machine, and those decisions."""
    machine = environment.probe()
    resolved, choices = environment.resolve_for_machine(config, machine)
    return resolved, machine, choices


def load_base(config: RunConfig, machine: Machine, model_files: ModelFiles | None = None) -> TrainableModel:
    """The base of a settled config with fresh adapters, where this machine computes: see `load_model`."""
    device = torch.device(environment.device_of(config, machine))
    with device_errors(config):
        return load_model(config, device, getattr(torch, environment.dtype_of(config)), model_files)


@dataclass
class TunedRun:
    """A run to read from; `load` brings the model."""

    directory: RunDirectory
    config: RunConfig
    machine: Machine
    choices: list[Choice]
    tokenizer: Any
    base: ModelFiles | None = None  # where they had to be found for the tokenizer

    @classmethod
    def open(cls, path: str | Path) -> TunedRun:
        """Raises:
        InputError: no run there.
        """
        directory = RunDirectory.open(path)
        recorded = load_config(directory.path / "config.yaml")
        if not recorded.multiplies_in_fp8:  # what the plan chose for the card of the run may not fit here
            recorded = recorded.replaced("machine", base_residency="auto")
        config, machine, choices = resolve_for_machine(recorded)
        if directory.adapter.is_dir():
            beside = {"model_name_or_path": str(directory.adapter), "chat_template_path": None}
            tokenizer = dataset.load_tokenizer(config.replaced("run", **beside))
            return cls(directory, config, machine, choices, tokenizer)
        base = resolve_model(config)
        return cls(directory, config, machine, choices, dataset.load_tokenizer(config, base), base)

    def load(self) -> TrainableModel:
        """The base with the run's adapter, or with its newest checkpoint's while it has not finished.

        Raises:
            InputError: nothing was saved yet.
            IntegrityError: the adapter is damaged, or the base is another than it was trained on.
        """
        done = self.directory.adapter.is_dir()
        folder = self.directory.adapter if done else checkpoint.newest(self.directory.checkpoints)
        if folder is None:
            raise InputError(
                f"{self.directory.path}: nothing was saved yet", change="train it to its end, or --resume it"
            )
        for file, problem in check_folder(folder):
            raise IntegrityError(f"{folder / file}: {problem}", change="solotune verify names all that is wrong")
        tensors = read_finite_tensors(folder)
        recorded = read_json(self.directory.path / FINGERPRINTS)["base"]
        base = (self.base or resolve_model(self.config)).with_weights()
        check_base(recorded, base_fingerprint(base), str(self.directory.path))
        model = load_base(self.config, self.machine, base)
        _check_adapter_config(folder, lora.peft_config(self.config, model.lora_layers, model.module))
        lora.load_state_dict(model.lora_layers, tensors, str(folder))
        return model


SAME = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "fan_in_fan_out")
FREE = ("task_type", "base_model_name_or_path", "revision", "lora_dropout", "init_lora_weights", "inference_mode")


def _check_adapter_config(folder: Path, expected: dict[str, Any]) -> None:
    """Holds the adapter's own config to the run's: PEFT, which reads the one, must compute what is computed here.

    Raises:
        InputError: they differ, or it asks for something else than plain LoRA (`auto_mapping`, `corda_config`, DoRA).
    """
    path, found = folder / CONFIG, read_config(folder)
    for key in (*SAME, *sorted(found.keys() - {*SAME, *FREE})):
        given, wanted = found.get(key), expected.get(key)
        if key == "target_modules" and isinstance(given, list):
            given, wanted = sorted(map(str, given)), sorted(expected[key])
        if given != wanted and (key in SAME or given not in (None, False, {}, [], "")):
            raise InputError(
                f"{path}: {key} is not that of the run",
                seen=f"{key}: {json.dumps(given)}"[:200],
                allowed=f"{key}: {json.dumps(wanted)}"[:200] if key in SAME else "plain LoRA",
                change="put the adapter of this run back",
            )


class ChatSession:
    """A conversation with a run's model; the same prompt can be put to its base."""

    def __init__(self, run: TunedRun) -> None:
        self._config, self._tokenizer = run.config, run.tokenizer
        self._model = run.load()
        self._stops = generation.stop_ids(self._model, self._tokenizer, [])
        self.choices = run.choices
        self.model_name = f"{self._config.model_name_or_path} + {run.directory.path.name}"
        self.history: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forgets the conversation."""
        self.history = []

    def reply(self, text: str, base: bool = False, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to `text`; with `base` the base model's, which is not added to the history.

        Args:
            on_text: called with each piece of the answer as it comes.
        """
        asked = [*self.history, {"role": "user", "content": text}]
        streamer = None
        if on_text is not None:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
        with device_errors(self._config), lora.adapters_off(self._model.module) if base else nullcontext():
            ids = generation.generate(
                self._model,
                dataset.render_prompt(self._tokenizer, asked),
                self._config.max_new_tokens,
                self._stops,
                streamer,
            )
        answer = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        if not base:
            self.history = [*asked, {"role": "assistant", "content": answer}]
        return answer
