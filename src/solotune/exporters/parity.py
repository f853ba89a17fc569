"""Load what was written with the libraries that users load it with, and compare it with the trained model.

in_transformers(folder, trained)     a merged folder, by `AutoModelForCausalLM`
in_peft(folder, source, trained)     an adapter, by stock PEFT on the base as it was trained; None without PEFT
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from solotune.dataset import Example
from solotune.exporters import measure
from solotune.exporters.artifact import Parity
from solotune.exporters.measure import Fit
from solotune.exporters.merge_choice import Trained
from solotune.exporters.source import ExportSource
from solotune.hardware.ram import ram
from solotune.model.adapter import Adapter
from solotune.model.lm_head import head_of
from solotune.units import first_line

NUM_ROWS, ROW_TOKENS = 4, 128  # compared with engines that give all log-probabilities of a position


class CannotRunBase(Exception):
    """The library cannot run the base here, without any adapter; the text says why."""


def in_transformers(folder: Path, trained: Trained) -> Fit:
    """A merged folder, loaded by transformers in the dtype of the trained model's activations."""
    module = _loaded(folder, dtype=trained.dtype)
    return _compared(module.to(trained.device), trained)


def in_peft(folder: Path, source: ExportSource, trained: Trained) -> Fit:
    """An adapter folder, loaded by stock PEFT on its base as transformers and bitsandbytes load it."""
    from peft import PeftModel

    precision, how = source.config.precision, dict[str, Any](dtype=trained.dtype)
    if precision.base_precision == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=precision.double_quant,
            bnb_4bit_compute_dtype=trained.dtype,
        )
    if trained.device.type == "cuda":
        how["device_map"] = {"": trained.device}
    base = _loaded(source.base.folder, **how)
    try:
        measure.predictions(base, trained.rows[:1])
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CannotRunBase(f"bitsandbytes cannot run this base: {first_line(error)}") from error
    tuned: Any = PeftModel.from_pretrained(
        base, str(folder), trust_remote_code=False, use_safetensors=True, attn_implementation=None
    ).get_base_model()
    return _compared(tuned, trained)


@torch.no_grad()
def row_logits(
    folder: Path, rows: Sequence[Example], adapter: Adapter | None = None
) -> list[tuple[list[int], torch.Tensor]]:
    """Ids of a few rows, and the logits (T, V) of a folder's model for them, in float32 on the CPU.

    Args:
        adapter: to be added, in float32; None: the model is merged.
    """
    module = _loaded(folder, dtype=torch.float32).eval()
    if adapter is not None:
        for name in adapter.modules:
            module.get_submodule(name).weight += adapter.delta(name)
    ids = [row.input_ids[:ROW_TOKENS].tolist() for row in rows[:NUM_ROWS]]
    return [(one, module(torch.tensor([one]), use_cache=False).logits[0]) for one in ids]


def why_not_in_peft(source: ExportSource) -> str | None:
    """Why an adapter cannot be compared in PEFT here; None if it can."""
    if find_spec("peft") is None:
        return "not loaded in PEFT, which is not installed here (pip install peft)"
    if source.config.precision.multiplies_in_fp8:
        return "not compared in PEFT: it has no counterpart of training in fp8"
    return None


def why_not_in_transformers(num_bytes: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a merged folder is not loaded in a dtype on a device; None if it is.

    Args:
        num_bytes: of its weights, in 16 bits.
    """
    needed = num_bytes * dtype.itemsize // 2
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ram().free
    if needed < 0.9 * free:
        return None
    return f"not loaded again: that takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"


def _loaded(folder: Path, **how: Any) -> Any:
    """A model as `from_pretrained` loads it; the attention is the one that users get."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation=None,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        **how,
    )


def _compared(module: PreTrainedModel, trained: Trained) -> Fit:
    return trained.compare(measure.predictions(module, trained.rows), head_of(module))


def parity_of(fit: Fit, engine: str) -> Parity:
    """A line of an artifact's parity."""
    return Parity(
        engine,
        mean_kl=fit.mean_kl,
        max_kl=fit.max_kl,
        top1_agreement=fit.top1_agreement,
        max_logprob_diff=fit.max_logprob_diff,
        positions=fit.positions,
    )
