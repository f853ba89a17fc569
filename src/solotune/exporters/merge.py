"""The adapter added to its base: a complete model folder, written tensor by tensor.

    W' = W + s B A        in float32, rounded once to the dtype that is written

    W of `original`       the base as it lies in its files
    W of `dequantized`    the 4- or 8-bit codes that the run trained with, dequantised: what was trained
    `requantized`         W' of what was trained, in NF4 again: what someone gets who loads a merged model in 4 bits

Memory: four tensors at most, whatever the size of the model. While one is hashed and written, the next is merged in
place, some rows at a time, and one more is read. The shards are those of the base, split where one is larger than
SHARD_BYTES.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from solotune.config.settings import PrecisionSettings
from solotune.errors import InputError
from solotune.exporters.base_tensors import NAMES, BaseTensor, BaseTensors, as_bytes
from solotune.exporters.source import ExportSource
from solotune.hardware import machine as environment
from solotune.hardware.cpu_threads import numbers_at_once, spread
from solotune.hub.quantised import QUANTISATION
from solotune.model.adapter import Adapter
from solotune.model.frozen_linear import NF4Weight
from solotune.model.stored_weight import Rows, trained_rows
from solotune.model.weight_files import INDEX, WHOLE
from solotune.model.weights import check_finite
from solotune.run.atomic_io import Folder, json_text
from solotune.runtime import signals

ORIGINAL, DEQUANTIZED, REQUANTIZED = "original", "dequantized", "requantized"
OUTPUT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5 * 10**9  # of transformers' `save_pretrained` until version 5
CHUNK = 1 << 20  # numbers added and rounded at a time on a GPU
AHEAD = 2  # tensors that are read or merged while one is written
_CPU = torch.device("cpu")
NOT_IN_MERGED = ("_name_or_path", "auto_map", "torch_dtype", "custom_generate", "_from_model_config")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Merge:
    """How each linear layer of a merged model is made."""

    adapter: Adapter
    precision: PrecisionSettings
    compute_dtype: torch.dtype
    device: torch.device
    """Where weights are quantised as in training; everything else is computed on the CPU."""
    into: str
    dtype: torch.dtype

    @classmethod
    def of(cls, source: ExportSource, into: str, dtype: torch.dtype) -> Merge:
        config, machine = source.config, environment.probe()
        device = torch.device(environment.device_of(machine, use_cpu=config.use_cpu))
        compute_dtype = getattr(torch, environment.dtype_of(config.bf16))
        return cls(source.adapter, config.precision, compute_dtype, device, into, dtype)

    @property
    def is_quantised(self) -> bool:
        """Whether the training changed the base's numbers by quantising them."""
        return is_quantised(self.precision)

    def weight(self, tensor: BaseTensor, read: torch.Tensor | None = None) -> torch.Tensor:
        """The weight of a linear layer, merged, in the layout of the base's file.

        Args:
            read: the tensor, if it was read already; it is overwritten.

        Raises:
            InputError: it is not finite, or too large for float16.
        """
        layer, W = tensor.layer, tensor.read() if read is None else read
        assert layer is not None
        if self.into == DEQUANTIZED or (self.into == REQUANTIZED and self.is_quantised):
            merged = self._merged(layer, W, *self._as_trained(W, tensor.is_transposed), tensor.is_transposed)
        elif layer in self._layers:
            merged = self._merged(layer, W, _CPU, lambda begin, end: W[begin:end], tensor.is_transposed)
        else:
            merged = rounded(W, self.dtype)
        _check_written(merged, tensor)
        if self.into == REQUANTIZED:
            W_OI = merged.T.contiguous() if tensor.is_transposed else merged
            again = NF4Weight(W_OI.to(self.device, self.compute_dtype), double_quant=True)
            merged = again.dense(self.dtype).cpu()
            merged = merged.T.contiguous() if tensor.is_transposed else merged
        return merged

    @cached_property
    def _layers(self) -> frozenset[str]:
        return frozenset(self.adapter.modules)

    def _as_trained(self, W: torch.Tensor, is_transposed: bool) -> tuple[torch.device, Rows]:
        """Where the weight is quantised, and its rows as the training computed with them, in the file's layout."""
        given = W.to(self.device)
        rows = trained_rows(given.T.contiguous() if is_transposed else given, self.precision, self.compute_dtype)
        if not is_transposed:
            return self.device, rows
        dense = rows(0, W.shape[1]).T
        return self.device, lambda begin, end: dense[begin:end]

    def _merged(
        self, layer: str, W: torch.Tensor, device: torch.device, rows: Rows, is_transposed: bool
    ) -> torch.Tensor:
        """W' in the memory of W if its dtype is the one that is written: fresh memory costs more than the sum.

        Some rows at a time, those of W before they are overwritten.
        """
        merged = W if W.dtype == self.dtype else torch.empty(W.shape, dtype=self.dtype)
        step = max(1, (numbers_at_once() if device == _CPU else CHUNK) // W.shape[1])
        scaling = self.adapter.scaling(layer) if layer in self._layers else 0.0
        if scaling:
            A, B = (factor.to(device) for factor in self.adapter.factors(layer))
            left, right = (A.T, B.T) if is_transposed else (B, A)  # (B A)^T = A^T B^T

        def merge_rows(starts: Iterable[int]) -> None:
            for begin in starts:
                end = min(begin + step, len(W))
                sums = rows(begin, end).float()
                if scaling:
                    sums.addmm_(left[begin:end], right, alpha=scaling)
                merged[begin:end] = sums

        starts = range(0, len(W), step)
        spread(merge_rows, starts) if device == _CPU else merge_rows(starts)
        return merged


def is_quantised(precision: PrecisionSettings) -> bool:
    """Whether a run with this precision trained on other numbers than those in the base's files."""
    return precision.base_precision in ("nf4", "fp8") or precision.multiplies_in_fp8


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`, contiguous."""
    return tensor.to(dtype).contiguous()


def _check_written(written: torch.Tensor, tensor: BaseTensor) -> None:
    """Raises:
    InputError: a number of the base is not finite, or became infinite when it was rounded.
    """
    try:
        check_finite("", tensor.key, written)
    except InputError:
        check_finite(str(tensor.path), tensor.key, tensor.read())
        raise InputError(
            f"{tensor.path}: tensor {tensor.key} has numbers that are too large for float16",
            seen=f"more than {torch.finfo(torch.float16).max:,.0f}",
            change="--dtype bf16",
        ) from None


def output_dtype(tensors: BaseTensors, wanted: str | None) -> tuple[str, str]:
    """(dtype to write, why): the given one, else the 16-bit one of the base."""
    if wanted is not None:
        return wanted, "--dtype"
    if tensors.stored_dtypes == {torch.float16}:
        return "fp16", "the base is stored in float16, which has more digits than bfloat16"
    return "bf16", "it has the range of float32, so nothing overflows"


# --- writing


@dataclass(frozen=True)
class _Shard:
    name: str
    tensors: list[BaseTensor]


def merged_bytes(tensors: BaseTensors, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a merged model."""
    return sum(_size(tensor, dtype) for tensor in tensors.all)


def write_merged(source: ExportSource, tensors: BaseTensors, folder: Folder, merge: Merge, progress: Progress) -> None:
    """Write a merged model into a folder that is being filled.

    Raises:
        InputError: a tensor is not finite, or too large for float16.
        StorageError: the disk is full, or cannot be written.
    """
    write_weights(tensors, folder, merge, progress)
    folder.write("config.json", json_text(_config(source, tensors, merge.dtype)))
    folder.write("generation_config.json", json_text(generation_config(source)))
    for name, content in source.tokenizer_files():
        folder.write(name, content)


def write_weights(tensors: BaseTensors, folder: Folder, merge: Merge, progress: Progress) -> None:
    """Write the safetensors files, and their index if there are several."""
    shards, done = _shards(tensors, merge.dtype), 0
    with closing(_written_ahead((tensor for shard in shards for tensor in shard.tensors), merge)) as written:
        for shard in shards:
            folder.write(shard.name, _content(shard, written, merge, progress, done, len(tensors.all)))
            done += len(shard.tensors)
    if len(shards) > 1:
        weight_map = {tensor.key: shard.name for shard in shards for tensor in shard.tensors}
        total = merged_bytes(tensors, merge.dtype)
        folder.write(
            INDEX, json_text({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        )


def _shards(tensors: BaseTensors, dtype: torch.dtype) -> list[_Shard]:
    """The base's shards; one that is larger than SHARD_BYTES is split."""
    groups: list[list[BaseTensor]] = []
    size, path = 0, None
    for tensor in tensors.all:
        if path != tensor.path or size + _size(tensor, dtype) > SHARD_BYTES:
            groups.append([])
            size, path = 0, tensor.path
        groups[-1].append(tensor)
        size += _size(tensor, dtype)
    if len(groups) == 1:
        return [_Shard(WHOLE, _aligned(groups[0], dtype))]
    return [
        _Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", _aligned(group, dtype))
        for number, group in enumerate(groups, start=1)
    ]


def _aligned(tensors: list[BaseTensor], dtype: torch.dtype) -> list[BaseTensor]:
    """The tensors in the order of the file: wide numbers first, as the format's library does, so all are aligned."""
    return sorted(tensors, key=lambda tensor: -_dtype_of(tensor, dtype).itemsize)


def _dtype_of(tensor: BaseTensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is written in."""
    is_kept = not tensor.dtype.is_floating_point or (tensor.keeps_float32 and tensor.dtype == torch.float32)
    return tensor.dtype if is_kept else dtype


def _size(tensor: BaseTensor, dtype: torch.dtype) -> int:
    return tensor.entry.numel * _dtype_of(tensor, dtype).itemsize


def _content(
    shard: _Shard, written: Iterator[torch.Tensor], merge: Merge, progress: Progress, done: int, total: int
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor, of which `written` gives the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard.tensors:
        begin, end = end, end + _size(tensor, merge.dtype)
        name = NAMES[_dtype_of(tensor, merge.dtype)]
        header[tensor.key] = {"dtype": name, "shape": list(tensor.entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for number, _ in enumerate(shard.tensors, start=1):
        yield as_bytes(next(written))
        signals.check_stop()
        progress(done + number, total, "tensors")


def _written_ahead(tensors: Iterable[BaseTensor], merge: Merge) -> Generator[torch.Tensor, None, None]:
    """The tensors as they are written; while one is hashed and written, the next is merged and one more is read."""
    coming: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as merging:
        for tensor in tensors:
            coming.append(merging.submit(_written, tensor, reading.submit(tensor.read), merge))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _written(tensor: BaseTensor, read: Future[torch.Tensor], merge: Merge) -> torch.Tensor:
    """A tensor as it is written."""
    if tensor.layer is not None:
        return merge.weight(tensor, read.result())
    written = rounded(read.result(), _dtype_of(tensor, merge.dtype))
    if written.is_floating_point():
        _check_written(written, tensor)
    return written


# --- the files beside the weights


def _config(source: ExportSource, tensors: BaseTensors, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the base, in the dtype that is written, without paths and code.

    Quantisation stays only where the experts of a mixture are still packed in MXFP4.
    """
    name = str(dtype).removeprefix("torch.")
    is_packed = any(tensor.key.endswith("_blocks") and tensor.dtype == torch.uint8 for tensor in tensors.all)
    left_out = {*NOT_IN_MERGED, *(() if is_packed else QUANTISATION)}

    def cleaned(config: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in left_out}
        if {"dtype", "torch_dtype"} & config.keys():
            kept["dtype"] = name
        return {key: cleaned(value) if key.endswith("_config") and isinstance(value, dict) else value
                for key, value in kept.items()}  # fmt: skip

    config = {**cleaned(source.base.config), "dtype": name}
    if tensors.is_untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    return config


def generation_config(source: ExportSource) -> dict[str, Any]:
    """generation_config.json of the base, with the tokens that end an answer as it was trained."""
    config = {key: value for key, value in source.base.generation_config.items() if key not in NOT_IN_MERGED}
    for key in ("bos_token_id", "pad_token_id"):
        if config.get(key) is None and (token := getattr(source.tokenizer, key)) is not None:
            config[key] = token
    config["eos_token_id"] = source.stop_ids[0] if len(source.stop_ids) == 1 else source.stop_ids
    return config
