"""Loading a streamed base on one GPU: the card never holds more than a few of its layers.

sh scripts/test -n 0 -m gpu tests/gpu/test_host_blocks.py
"""

from __future__ import annotations

import gc

import pytest
import torch
from tiny import save_model

from solotune.model.layer_blocks import MAX_INCOMPLETE
from solotune.model.limits import RING_SLOTS
from solotune.model.loading import load_model

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
DEPTH = 16


def test_the_card_holds_few_layers_while_loading(tiny_config, tmp_path):
    path = save_model(tmp_path, num_hidden_layers=DEPTH, hidden_size=512, intermediate_size=2048)
    keys = {"model_name_or_path": path, "use_cpu": False, "bf16": True, "base_precision": "bf16"}
    peaks = []
    for offload in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = load_model(tiny_config(**keys, base_offload=offload), GPU, torch.bfloat16)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        held = model.ring.num_bytes_on_host if model.ring else 0
        del model
    few = (RING_SLOTS + MAX_INCOMPLETE + 1) / DEPTH
    assert peaks[0] - peaks[1] >= (1 - few) * held
