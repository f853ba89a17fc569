"""The tensors of a base's files, and the layers of the model that they belong to.

    tensors = BaseTensors.of(base, config)
    tensors.check(adapter, where)       every layer of the adapter is a linear layer of this base, of its size
    for tensor in tensors.all: tensor.read()

Names are matched as the model is loaded (`model.weights`). Tensors that an architecture merges or splits while it is
loaded (experts of mixtures) have no layer here: they are copied as they are, and an adapter on one of them is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from solotune.config.run_config import RunConfig
from solotune.errors import InputError
from solotune.hub.model_files import ModelFiles
from solotune.hub.safetensors_header import Entry, read_header
from solotune.model.adapter import Adapter
from solotune.model.empty_model import empty_model
from solotune.model.frozen_linear import frozen_linears
from solotune.model.loading import kept_in_float32
from solotune.model.tied_weights import different_ties
from solotune.model.weight_files import weight_files
from solotune.model.weights import match_names
from solotune.regular_files import open_regular

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WITH_PEFT = "merge it with PEFT into the 16-bit base (model.merge_and_unload()), and use the merged model"


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of a file."""

    path: Path
    key: str
    entry: Entry
    layer: str | None = None
    """Dotted name of the linear layer whose weight it is; None for every other tensor."""
    is_transposed: bool = False
    """Whether that layer stores its weight as (in, out), like GPT-2."""
    keeps_float32: bool = False
    """Whether the architecture keeps it in float32, whatever the model's dtype."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    def read(self) -> torch.Tensor:
        """Its values, in memory of its own: a mapped file would count as memory in use, page by page.

        NumPy asks for large pages, so that touching new memory takes a third of the time of reading, not two thirds.

        Raises:
            InputError: the file cannot be read.
        """
        count = self.entry.end - self.entry.begin
        buffer = np.empty(count, np.uint8)
        try:
            with open_regular(self.path) as file:
                file.seek(self.entry.begin)
                read = file.readinto(buffer.data)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read", seen=error.strerror) from None
        if read != count:
            raise InputError(f"{self.path}: is shorter than it was", change="download the file again")
        return torch.from_numpy(buffer).view(self.dtype).view(self.entry.shape)


@dataclass(frozen=True)
class BaseTensors:
    """All tensors of a base, in the order of its files."""

    all: list[BaseTensor]
    linears: frozenset[str]
    """Dotted names of all linear layers but the output head: what a training in 4 or 8 bits quantises."""
    is_untied: bool
    """Whether head and embedding differ in the files although config.json ties them."""

    @classmethod
    def of(cls, base: ModelFiles, config: RunConfig) -> BaseTensors:
        """Read the headers of a base's files.

        Raises:
            InputError: the files cannot be read, or do not fit the architecture.
        """
        cpu = torch.device("cpu")
        module, _ = empty_model(base, config.attn_implementation, config.batches, torch.bfloat16, cpu)
        files = weight_files(base.folder)
        match = match_names(module, files)
        frozen = frozen_linears(module)
        in_float32 = kept_in_float32(module, torch.bfloat16)
        found = []
        for path in files:
            for key, entry in read_header(path).items():
                name = match.names.get(key, "")
                layer, _, leaf = name.rpartition(".")
                is_linear = leaf == "weight" and layer in frozen
                is_kept = in_float32 is not None and bool(name) and in_float32.search(name) is not None
                transposed = is_linear and isinstance(frozen[layer], Conv1D)
                found.append(BaseTensor(path, key, entry, layer if is_linear else None, transposed, is_kept))
        untied = different_ties(module, files, match, torch.bfloat16)
        return cls(found, frozenset(frozen), bool(untied))

    @property
    def weights(self) -> Iterator[BaseTensor]:
        """The weights of linear layers."""
        return (tensor for tensor in self.all if tensor.layer is not None)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.entry.end - tensor.entry.begin for tensor in self.all)

    @property
    def stored_dtypes(self) -> set[torch.dtype]:
        """Dtypes of the linear layers' weights."""
        return {tensor.dtype for tensor in self.weights}

    def check(self, adapter: Adapter, where: str) -> None:
        """Raises:
        InputError: a layer of the adapter is not a linear layer of this base, or has another size.
        """
        shapes = {weight.layer: _out_in(weight) for weight in self.weights}
        for layer in adapter.modules:
            if layer not in self.linears:
                raise InputError(
                    f"{where}: the adapter has layers that are not linear layers of this base",
                    seen=layer,
                    allowed=f"names such as {min(self.linears)}",
                    change=f"check --base; if it is the output head or the embedding, {WITH_PEFT}",
                )
            if layer not in shapes:
                raise InputError(
                    f"{where}: the files of this base hold {layer} in another form",
                    seen="transformers merges or splits it while it loads the model",
                    change=WITH_PEFT,
                )
            A, B = adapter.factors(layer)
            if (len(B), A.shape[1]) != shapes[layer]:
                raise InputError(
                    f"{where}: the adapter does not fit this base",
                    seen=f"{layer}: {len(B)} x {A.shape[1]}",
                    allowed=f"{shapes[layer][0]} x {shapes[layer][1]}, the layer's size in the base",
                    change="check --base",
                )

    @property
    def has_every_linear(self) -> bool:
        """Whether the files hold the weight of every linear layer as the layer has it."""
        return self.linears == {weight.layer for weight in self.weights}

    def check_quantised(self) -> None:
        """Raises:
        InputError: a quantised layer's weight is not in the files as the layer has it, so it cannot be dequantised.
        """
        if missing := sorted(self.linears - {weight.layer for weight in self.weights}):
            raise InputError(
                "the dequantised base cannot be written for this architecture",
                seen=f"transformers merges or splits {missing[0]} while it loads the model",
                change="--merge-into original",
            )


def _out_in(weight: BaseTensor) -> tuple[int, ...]:
    return weight.entry.shape[::-1] if weight.is_transposed else weight.entry.shape


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
