"""How many layers are streamed where a run is read, and a host that has no room for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from solotune.errors import CheckError
from solotune.hardware import machine
from solotune.hardware.ram import Ram
from solotune.hub.model_files import resolve_model
from solotune.model.frozen_linear import FrozenLinear, stored_bytes
from solotune.model.loading import load_model
from solotune.planning.memory import StoredBytes
from solotune.training import base_memory
from solotune.training.base_memory import READING_BYTES, BaseSize, settle_offload

GIB = 1 << 30
LAYER = StoredBytes(3 * GIB // 4, GIB // 4)
SIZE = BaseSize((StoredBytes(3 * GIB // 2, GIB // 2), *[LAYER] * 6), 2 * GIB, GIB)  # 11 GiB; the first is a large layer


@pytest.fixture
def settled(tiny_config, monkeypatch):
    """settle_offload for a base of `SIZE` on a card and a host with so much free."""
    here = replace(machine.probe(), gpu="H200", num_gpus=1, gpu_bytes=140 * GIB, compute_capability=(9, 0))

    def settle(card, host=1000 * GIB, **keys):
        monkeypatch.setattr(BaseSize, "of", classmethod(lambda cls, *_: SIZE))
        monkeypatch.setattr(base_memory, "ram", lambda: Ram(2 * host, host))
        config = tiny_config(use_cpu=False, base_precision="nf4", **keys)
        found, choices = settle_offload(config, replace(here, gpu_free_bytes=card), resolve_model(config))
        return found.base_offload, [choice.because for choice in choices]

    return settle


@pytest.mark.parametrize(
    ("free", "wanted"),
    [
        (140 * GIB, False),
        (11 * GIB + READING_BYTES, False),
        (11 * GIB + READING_BYTES - 1, 1),  # the embedding goes with the first layer
        (10 * GIB + READING_BYTES - 1, 4),  # the ring has room for the largest layer twice
        (7 * GIB + READING_BYTES, 6),
        (6 * GIB + READING_BYTES, True),
        (GIB, True),  # nothing fits: the error names the memory that is missing
    ],
)
def test_as_few_layers_are_streamed_as_the_free_memory_requires(free, wanted, settled):
    value, why = settled(free)
    assert value == wanted and type(value) is type(wanted)
    if wanted is not False:
        assert f"of 7 layers stream from host memory ({SIZE.on_host(wanted) / GIB:.1f} GiB)" in why[0]
        assert SIZE.on_card(wanted) + READING_BYTES <= free or wanted is True


def test_a_value_that_is_set_is_kept_and_its_host_memory_checked(settled):
    assert settled(140 * GIB, base_offload=2) == (2, [])
    assert settled(GIB, base_offload=False) == (False, [])
    with pytest.raises(CheckError) as caught:
        settled(140 * GIB, host=6 * GIB, base_offload=True)
    assert str(caught.value).splitlines() == [
        "base_offload: the streamed layers do not fit in host memory",
        "  seen:    9.0 GiB of layers and embedding; 6.0 of 12.0 GiB of host memory are free",
        "  allowed: 5.4 GiB, 90% of what is free",
        "  change:  free host memory, or base_offload: 3 (then 10.0 GiB of the base are on the card)",
    ]
    with pytest.raises(CheckError, match="do not fit") as caught:
        settled(GIB, host=GIB)
    assert caught.value.change.startswith("free host memory, or base_offload: false (then 11.0 GiB")


@pytest.mark.parametrize(("family", "keys"), [
    ("llama", {"base_precision": "fp32"}), ("gpt2", {"base_precision": "nf4", "base_residency": "quantized"}),
    ("llama_tied", {"base_precision": "fp8"}), ("mixtral", {"base_precision": "nf4", "base_residency": "quantized"}),
])  # fmt: skip
def test_the_sizes_are_those_of_the_loaded_base(family, keys, tiny_config):
    config = tiny_config(family, **keys)
    size = BaseSize.of(config, resolve_model(config))
    module = load_model(config, torch.device("cpu"), torch.float32).module
    layers = module.base_model.h if family == "gpt2" else module.base_model.layers
    rounding = 512 * sum(1 for part in module.modules() if isinstance(part, FrozenLinear) for _ in part.buffers())
    for expected, layer in zip(size.layers, layers, strict=True):
        assert 0 <= sum(expected) - stored_bytes(layer) <= rounding
    others = {p for name, p in module.named_parameters() if "lora_" not in name}
    assert 0 <= size.rest + size.embedding - 4 * sum(p.numel() for p in others) <= rounding
    table = module.get_input_embeddings().weight
    assert size.embedding == (0 if module.get_output_embeddings().weight is table else 4 * table.numel())
