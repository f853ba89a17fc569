"""Match the tensors of a model folder's files with the architecture, check shapes and dtypes, and read them.

The headers of all files are read first (`safetensors_header.read_header`), so that missing, extra or misshapen tensors
are refused before memory is taken. Every tensor has one place in the model, or the architecture does not use it
(`TensorMatch.unused`, which `train` names); any other folder is refused.

Names are those that transformers' loader gives (`rename_source_key`), so the base is the one that `from_pretrained`
loads. A checkpoint whose tensors must be merged or split (mixtures of experts) goes through that loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from solotune.errors import InputError
from solotune.hub.safetensors_header import Entry, read_header
from solotune.model import mxfp4
from solotune.model.weight_files import COMPUTED
from solotune.units import first_line

FLOATS = ("F32", "F16", "BF16", "F64")
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
MISSING = "the checkpoint lacks {} tensors"
EXTRA = "the checkpoint has {} tensors that the architecture does not have"


@dataclass(frozen=True)
class TensorMatch:
    """Which tensor of the files belongs where in the model."""

    names: dict[str, str]  # name in the files -> name in the model; the two parts of a packed tensor share one
    must_convert: bool = False  # some must be merged or split, which only transformers' loader does
    unused: tuple[str, ...] = ()  # tensors that this architecture does not use


def match_names(module: PreTrainedModel, files: list[Path]) -> TensorMatch:
    """Match the tensors of the files with those of a model.

    Files may lack or carry the prefix of the inner model (`transformer.` of GPT-2), may hold tables that are computed
    (`rotary_emb.inv_freq`), and may lack all but one of several tied tensors.

    Raises:
        InputError: a tensor is missing, extra, twice in the files, or has another shape or dtype than the architecture.
    """
    places = _Places(module)
    names: dict[str, str] = {}
    owners: dict[str, str] = {}  # model name (of a packed tensor: and its part) -> name in the files
    unused: list[str] = []
    unknown: list[str] = []
    given: set[str] = set()
    must_convert, numel = False, 0
    for path in files:
        for key, entry in read_header(path).items():
            targets, is_merged = places.of(key)
            if not targets and places.is_unused(key):
                unused.append(key)
                continue
            given.update(targets)
            numel += entry.numel
            if is_merged or not targets:
                _check_dtype(path, key, entry, FLOATS)
                must_convert |= is_merged
                unknown += [] if targets else [key]
                continue
            name, part = targets[0], mxfp4.part_of(key, targets[0])
            _check_place(path, key, entry, places.wanted[name], part)
            for other in (name, name + part) if part else (name, name + mxfp4.BLOCKS, name + mxfp4.SCALES):
                if other in owners:
                    raise InputError(f"{path}: two tensors for {name}", seen=f"{owners[other]} and {key}")
            owners[name + part], names[key] = key, name
    missing = sorted(places.wanted.keys() - given - _tied_to(module, given))
    missing += [f"{name}{half}" for name in names.values() for half in mxfp4.missing_part(name, owners)]
    if missing or unknown:
        shown = missing or sorted(unknown)
        raise InputError(
            f"{files[0].parent}: {(MISSING if missing else EXTRA).format(len(shown))}",
            seen=", ".join(shown[:3]),
            change="check that config.json belongs to these weights, or download the folder again",
        )
    if must_convert and numel < (needed := places.numel(given)):
        raise InputError(
            f"{files[0].parent}: the checkpoint lacks tensors",
            seen=f"{numel:,} numbers",
            allowed=f"{needed:,}, the size of the architecture in config.json",
            change="check that config.json belongs to these weights, or download the folder again",
        )
    return TensorMatch(names, must_convert, tuple(unused))


class _Places:
    """Where transformers puts each tensor of a file in a model."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.wanted: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        rules = get_model_conversion_mapping(module)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = module.base_model_prefix
        self._computed = {name for name, _ in module.named_buffers()} - self.wanted.keys()
        self._unused = [*(module._keys_to_ignore_on_load_unexpected or []), COMPUTED]

    def of(self, key: str) -> tuple[list[str], bool]:
        """(names in the model, whether the tensor must be merged or split for them); no names: it has no place."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.wanted)
        if name not in self.wanted and key in self.wanted:
            name, pattern = key, None
        if pattern is not None and name in self.wanted:
            patterns = next(rule.target_patterns for rule in self._converters if pattern in rule.source_patterns)
            targets = [name.replace(patterns[0], other) for other in patterns]
            return [target for target in targets if target in self.wanted], True
        if name not in self.wanted and (unpacked := self._prefixed(mxfp4.unpacked_name(key), self.wanted)):
            name = unpacked if self.wanted[unpacked].dim() == 3 else name
        return ([name] if name in self.wanted else []), False

    def is_unused(self, key: str) -> bool:
        """Whether this architecture ignores a tensor that has no place: it computes it, or has no such part."""
        name = rename_source_key(key, self._renamings, self._converters, self._prefix, self.wanted)[0]
        is_computed = self._prefixed(key, self._computed) is not None
        return is_computed or any(re.search(pattern, text) for pattern in self._unused for text in (key, name))

    def numel(self, names: set[str]) -> int:
        """All numbers of these tensors; shared ones count once."""
        return sum({id(tensor): tensor.numel() for name, tensor in self.wanted.items() if name in names}.values())

    def _prefixed(self, key: str | None, names: Any) -> str | None:
        """The key as it stands in `names`: itself, or with or without the prefix of the inner model."""
        if key is None:
            return None
        prefix = f"{self._prefix}."
        return next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in names), None)


def _tied_to(module: PreTrainedModel, given: set[str]) -> set[str]:
    """Names that need no tensor of their own, because one that they are tied to is given."""
    groups: dict[str, set[str]] = {}
    for target, source in module.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {name for group in groups.values() if group & given for name in group}


def _check_place(path: Path, key: str, entry: Entry, wanted: torch.Tensor, part: str) -> None:
    """Check shape and dtype of a tensor that has a place of its own."""
    expected, kinds = tuple(wanted.shape), FLOATS if wanted.is_floating_point() else INTEGERS
    if part:
        expected, kinds = mxfp4.part_shape(part, expected), ("U8",)
    _check_dtype(path, key, entry, kinds)
    if entry.shape != expected:
        raise InputError(
            f"{path}: tensor {key} does not fit the architecture in config.json",
            seen=f"{entry.dtype} {entry.shape}",
            allowed=f"{'floating point' if kinds is FLOATS else kinds[0]} {expected}",
        )


def _check_dtype(path: Path, key: str, entry: Entry, kinds: tuple[str, ...]) -> None:
    if entry.dtype not in kinds:
        raise InputError(
            f"{path}: tensor {key} does not fit the architecture in config.json",
            seen=f"{entry.dtype} {entry.shape}",
            allowed=("floating point of 16 bits or more: " if kinds is FLOATS else "whole numbers: ")
            + ", ".join(kinds),
        )


def read_tensors(files: list[Path], match: TensorMatch, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in the model, tensor on the CPU), one at a time in the files' order.

    Args:
        dtype: of tensors that are unpacked.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}  # parts of packed tensors
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    if key not in match.names:
                        continue
                    name, tensor = match.names[key], file.get_tensor(key)
                    if not (part := mxfp4.part_of(key, name)):
                        yield name, tensor
                        continue
                    parts = waiting.setdefault(name, {}) | {part: tensor}
                    waiting[name] = parts
                    if len(parts) == 2:
                        yield name, mxfp4.unpack(parts[mxfp4.BLOCKS], parts[mxfp4.SCALES], dtype)
                        del waiting[name]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file", seen=str(error)) from None


def check_finite(where: str, name: str, tensor: torch.Tensor, may_be_infinite: bool = False) -> None:
    """Check a tensor for NaN and infinity.

    If any number is NaN or infinite, so is the sum. Only then are all numbers checked, because large finite numbers can
    also add up to infinity. torch adds 16-bit numbers in float32, and ten times as fast if it returns 16 bits.

    Args:
        may_be_infinite: only NaN is refused; limits of a range may be infinite.

    Raises:
        InputError: NaN or infinity in it. Later nothing would show it: sdpa on a CPU hides a NaN.
    """
    total = tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize == 1 else None)
    if bool(total.isfinite()):
        return
    bad = int((tensor.isnan() if may_be_infinite else ~tensor.isfinite()).sum())
    if bad:
        raise InputError(
            f"{where}: tensor {name} is not finite",
            seen=f"{bad:,} of {tensor.numel():,} numbers are NaN or infinite",
            change="download the folder again, or use another model",
        )


def load_with_transformers(
    folder: Path, architecture: PreTrainedConfig, attention: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Load a checkpoint that must be converted, into the checked `architecture`.

    transformers fills missing tensors with random numbers: refused.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=architecture,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: transformers cannot load the checkpoint", seen=first_line(error)) from None
    module, found = loaded
    for kind, words in (("missing_keys", MISSING), ("mismatched_keys", MISSING), ("unexpected_keys", EXTRA)):
        if names := sorted(map(str, found[kind])):
            raise InputError(f"{folder}: {words.format(len(names))}", seen=", ".join(names[:3]))
    return module
