"""Checkpoints that are already quantised: which can be read, and which model to use instead of the others.

Quantised codes are not read, with one exception: MXFP4 (gpt-oss, which exists in no other form) is unpacked exactly
(`model.mxfp4`). All others were made from a 16-bit model. solotune quantises that one itself, to the same 4 bits, so
the answer is its name: from the model card of the folder (`base_model` in README.md), or from config.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from solotune.errors import InputError
from solotune.hub.safe_files import contained

QUANTISATION = ("quantization_config", "compression_config")  # keys of config.json
READ = ("mxfp4",)
MAX_CARD_BYTES = 1 << 20
_BASE = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([\w.-]+/[\w.-]+)[\"']?[ \t]*$", re.MULTILINE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def refuse_quantised(folder: Path, raw: dict[str, Any]) -> None:
    """Check that a model's weights are not quantised, or can be unpacked.

    Raises:
        InputError: they are; the error names the model to use instead.
    """
    text = raw.get("text_config")
    found = [owner.get(key) for owner in (raw, text if isinstance(text, dict) else {}) for key in QUANTISATION]
    for settings in found:
        if settings is None:
            continue
        method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
        if method in READ:
            continue
        original = original_of(folder, raw)
        change = f"model_name_or_path: {original}" if original else "use the 16-bit model that it was made from (its"
        change += "" if original else " model card names it as base_model; often the same name without -4bit or -FP8)"
        raise InputError(
            f"{folder / 'config.json'}: the checkpoint is already quantised",
            seen=f"quantization_config: {method}"[:200],
            allowed="16- or 32-bit weights, which solotune quantises itself (base_precision: nf4 is 4 bits)",
            change=change,
            fault="F49",
        )


def original_of(folder: Path, raw: dict[str, Any]) -> str | None:
    """Hub id of the model that a quantised one was made from; None if the folder does not say it."""
    card = folder / "README.md"
    if card.exists():
        try:
            with contained(folder, card.name).open(encoding="utf-8", errors="replace") as file:
                parts = file.read(MAX_CARD_BYTES).split("---", 2)
        except (InputError, OSError):
            parts = []
        if len(parts) == 3 and not parts[0].strip() and (match := _BASE.search(parts[1])):
            return match[1]
    name = raw.get("_name_or_path")
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else None
