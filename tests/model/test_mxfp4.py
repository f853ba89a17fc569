"""Experts in MXFP4 (gpt-oss): unpacked as transformers does, by the formula of the standard."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from solotune.errors import InputError
from solotune.model.loading import load_model
from solotune.model.mxfp4 import unpack
from tests.model.test_adapter_coverage import gpt_oss, saved
from tests.model.test_weights import changed, same_as_transformers

CPU = torch.device("cpu")


def packed(weight_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to MXFP4 by the formula of the standard: the nearest code, after a scale of a power of two."""
    groups = weight_EIO.mT.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1, keepdim=True).log2().floor() - 2).clamp(min=-100)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / 2.0**exponents
    codes = (scaled.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks.to(torch.uint8), (exponents[..., 0] + 127).to(torch.uint8)


def to_mxfp4(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(tensors.pop(name))


def test_experts_in_mxfp4_are_unpacked_as_transformers_does(tiny_config, tmp_path):
    plain = saved(gpt_oss, tmp_path / "plain")
    folder = changed(plain, tmp_path / "model", to_mxfp4, quantization_config={"quant_method": "mxfp4"})
    model = same_as_transformers(tiny_config(model_name_or_path=str(folder)), folder)
    before = load_file(plain / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    after = model.module.model.layers[0].mlp.experts.down_proj
    assert 0 < (after - before).abs().mean() < 0.2 * before.abs().mean()  # rounded, and so unpacked the right way round


def test_half_of_a_packed_tensor_is_refused(tiny_config, tmp_path):
    def half(tensors: dict[str, torch.Tensor]) -> None:
        to_mxfp4(tensors)
        del tensors["model.layers.1.mlp.experts.down_proj_scales"]

    folder = changed(saved(gpt_oss, tmp_path / "plain"), tmp_path / "model", half)
    with pytest.raises(InputError, match=r"lacks 1 tensors\n.*layers\.1\.mlp\.experts\.down_proj_scales"):
        load_model(tiny_config(model_name_or_path=str(folder)), CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_and_scale_is_exact(dtype):
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    blocks = (codes[0::2] | codes[1::2] << 4).expand(1, 3, 2, 16)
    scales = torch.tensor([[[127, 128], [117, 1], [137, 200]]], dtype=torch.uint8)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.tensor([*values, *(-value for value in values)]).repeat(2)
    found = unpack(blocks, scales, dtype)
    assert found.shape == (1, 64, 3) and found.dtype == dtype
    for row in range(3):
        for group in range(2):
            factor = 2.0 ** (int(scales[0, row, group]) - 127)
            assert torch.equal(found[0, 32 * group : 32 * group + 32, row].double(), expected.double() * factor)
