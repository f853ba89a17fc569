"""The config of a run on several ranks, and what its ranks share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def keys(chat_config, tmp_path: Path) -> dict[str, Any]:
    from rank_runs import rows

    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(61)))
    return {**chat_config, "base_precision": "fp32", "lora_dropout": 0.0, "max_steps": 20, "save_steps": 10,
            "eval_steps": 10, "num_samples": 0}  # fmt: skip


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[int, int]]]:
    """The ranks that have shared a base to the end, and the bytes of each; its layers take turns in a ring of one."""
    from solotune.model import layers
    from solotune.model.layer_ring import LayerRing
    from solotune.model.sharded_blocks import SharedBase

    close = SharedBase.close

    def noted(shared: SharedBase) -> None:
        close(shared)
        num_bytes = sum(block.num_bytes_on_device for block in shared._blocks)
        (tmp_path / f"part-{shared.world.rank}").write_text(str(num_bytes))

    monkeypatch.setattr(SharedBase, "close", noted)
    monkeypatch.setattr(layers, "LayerRing", partial(LayerRing, slots=1))
    return lambda: [(rank, int(path.read_text())) for rank, path in enumerate(sorted(tmp_path.glob("part-*")))]
