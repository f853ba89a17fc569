"""Load a checkpoint into a model that is ready to train, quantising each tensor as it is read.

    config.json -> the architecture on the meta device (no memory)
    each tensor of the safetensors files -> device -> a linear's weight: quantised into a `FrozenLinear`
                                                    -> anything else: kept in the compute dtype
    adapters -> on the frozen linears that the config names

So the peak memory of loading is the finished base plus one tensor.

Which layers are replaced
-------------------------
Every linear but the output head, the same rule as bitsandbytes' integration, so the base is the one that PEFT users
know. transformers' modules run unchanged: only the linears of this instance are replaced, nothing in the process is
patched.

Checkpoints that need conversion
--------------------------------
If tensors must be merged or split for the architecture (mixtures of experts), transformers' own loader reads them on
the CPU, and they are then moved tensor by tensor; this is slower, and reported as a choice.

The base that transformers loads
--------------------------------
Every tensor of the files is used, or named among the choices as not used, or the folder is refused. Head and embedding
are tied only if the files hold one tensor, or two equal ones.

What it does not do
-------------------
Run code from a model folder (`trust_remote_code` is never on), read pickles, load checkpoints that are already
quantised (except experts in MXFP4, which are unpacked).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solotune.config.run_config import Choice, RunConfig
from solotune.dataset import Example
from solotune.dataset.collate import Batch, collate, collate_packs
from solotune.errors import InputError
from solotune.hardware.gpu_errors import stage
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.model import lora, loss, packed_attention
from solotune.model.adapter_coverage import AdapterCoverage, adapter_coverage
from solotune.model.empty_model import empty_model
from solotune.model.frozen_linear import FrozenLinear, frozen_linears
from solotune.model.host_activations import HostActivations
from solotune.model.layer_blocks import LayerBlocks
from solotune.model.layer_ring import LayerRing
from solotune.model.layers import (
    blocks_of,
    decoder_layers,
    language_model,
    num_checkpointed,
    prepare_layers,
    stream_layers,
)
from solotune.model.lm_head import check_head, head_of
from solotune.model.residency import settle_residency
from solotune.model.sharded_blocks import SharedBase, require_ranks
from solotune.model.stored_weight import store_weight
from solotune.model.tied_weights import different_ties, tie, untie
from solotune.model.weight_files import unread_files, weight_files
from solotune.model.weights import (
    MISSING,
    TensorMatch,
    check_finite,
    load_with_transformers,
    match_names,
    read_tensors,
)
from solotune.runtime.world import ALONE, World
from solotune.units import first_line

Progress = Callable[[int, int, str], None]
"""Called with what is done, all of it, and what it is."""


@dataclass
class TrainableModel:
    """The model with its adapters; `token_losses` is the only way to compute losses with it."""

    module: PreTrainedModel
    layers: nn.ModuleList
    lora_layers: dict[str, lora.LoraLinear]
    head: loss.Head
    dtype: torch.dtype
    device: torch.device
    choices: list[Choice]
    flat_params: nn.Parameter  # all adapters as one vector, for the optimizer: see `lora.join`
    is_compiled: bool = False
    uses_varlen_attention: bool = False  # packed rows are separated by `packed_attention`, not by a mask
    ring: LayerRing | None = None  # streams the frozen weights of layers
    shared: SharedBase | None = None  # they are parts on the cards of all ranks, else in host memory
    offload: HostActivations | None = None  # keeps the inputs of checkpointed layers there

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for layer in self.lora_layers.values() for p in (layer.lora_A, layer.lora_B)]

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.trainable)

    def zero_gradients(self) -> None:
        assert self.flat_params.grad is not None
        self.flat_params.grad.zero_()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Dotted name -> (out_features, in_features) of every frozen linear of the language model."""
        under = language_model(self.module)
        return {
            name.removesuffix(".base"): (module.out_features, module.in_features)
            for name, module in self.module.named_modules()
            if isinstance(module, FrozenLinear) and name.startswith(under)
        }

    @property
    def num_parameters(self) -> int:
        """All parameters: the base as in its checkpoint, and the adapters."""
        frozen = [part for part in self.module.modules() if isinstance(part, FrozenLinear)]
        numbers = sum(part.out_features * part.in_features for part in frozen)
        biases = sum(part.bias_O.numel() for part in frozen if part.bias_O is not None)
        return numbers + biases + sum(p.numel() for p in self.module.parameters())

    def adapter_coverage(self) -> AdapterCoverage:
        """Which parts of the model have adapters."""
        return adapter_coverage(self.module, self.layers, language_model(self.module), self.lora_layers)

    def token_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses_N, correct_N) of the batch's loss tokens, in row order: see `loss.token_losses`."""
        places: dict[str, Any] = {}
        if batch.position_ids_BT is not None:
            places["position_ids"] = batch.position_ids_BT
            if self.uses_varlen_attention and torch.is_grad_enabled():
                starts, longest = batch.cu_seqlens_S, batch.input_ids_BT.shape[1]
                places |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
                places |= {"max_length_q": longest, "max_length_k": longest}
        # No cache: with one, transformers ignores packing, and packed rows would see each other.
        hidden = self.module.base_model(input_ids=batch.input_ids_BT, use_cache=False, **places).last_hidden_state
        h_ND = hidden.flatten(0, 1).index_select(0, batch.label_positions_N - 1)
        labels_N = batch.input_ids_BT.flatten()[batch.label_positions_N]
        vocab_size = self.module.config.get_text_config().vocab_size
        return loss.token_losses(h_ND, labels_N, self.head, vocab_size, is_compiled=self.is_compiled)


@stage("loading the model")
def load_model(
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    model_files: ModelFiles | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> TrainableModel:
    """Load the base of `config` on `device` and attach new adapters.

    Args:
        config: resolved for this machine.
        device: of the model.
        dtype: of activations, norms, embeddings and head.
        model_files: of the config's model; None: resolved here.
        progress: called with the tensors read so far, and all of them.
        world: the ranks that load it; with `base_sharding` they share it.

    Raises:
        InputError: no usable model there, a damaged or already quantised checkpoint, an architecture without a list
            of decoder layers, a target module that matches nothing, or a base shared by a rank that is alone.
        CheckError: a rank cannot read its part of a shared base.
    """
    require_ranks(config, world.machines)
    shared = SharedBase(world, device) if config.base_sharding is True else None
    model_files = (model_files or resolve_model(config)).with_weights()
    module, attention_name = empty_model(model_files, config.attn_implementation, config.batches, dtype, device)
    family, choices = module.config.model_type, list[Choice]()
    if attention_name != config.attn_implementation:
        because = f"{family} has no {config.attn_implementation} attention"
        choices.append(Choice("attn_implementation", attention_name, because))
    module, found, blocks = _read_base(module, model_files, attention_name, config, dtype, device, shared, progress)
    choices += found
    module.requires_grad_(False)
    _set_generation(module, model_files)
    layers = decoder_layers(module)
    ring = stream_layers(module, config.precision, blocks, device, shared)
    if ring is None and config.base_precision == "nf4" and not config.multiplies_in_fp8:
        choices += settle_residency(module, config.base_residency, dtype, device)
    inside = language_model(module)
    lora_layers = lora.attach(module, config.lora, device, is_compiled=config.torch_compile, inside=inside)
    head = head_of(module)
    check_head(module, head, device)
    model = TrainableModel(
        module, layers, lora_layers, head, dtype, device, choices, lora.join(lora_layers, device), config.torch_compile,
        ring=ring, shared=shared, offload=HostActivations(device) if config.activation_offload else None,
    )  # fmt: skip
    if device.type == "cuda" and attention_name == "sdpa":
        choices += _take_fast_attention(model, config.max_length, config.multiplies_in_fp8)
    if config.packing and (change := isolation_error(model, config.multiplies_in_fp8)):
        raise InputError(
            f"{config.source_of('packing')}, packing: rows of a packed sequence see each other in this model",
            seen=f"a token's loss changes by {change:.3g} on average when its row is packed with other rows",
            allowed="models and attention implementations that follow position_ids that restart at each row",
            change="packing: false",
        )
    recomputed = num_checkpointed(config.gradient_checkpointing, len(layers))
    prepare_layers(layers, recomputed, model.is_compiled, ring, model.offload)
    return model


def _read_base(
    module: PreTrainedModel,
    model_files: ModelFiles,
    attention: str,
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device,
    shared: SharedBase | None,
    progress: Progress | None,
) -> tuple[PreTrainedModel, list[Choice], LayerBlocks[Any]]:
    """Read the weights into a model without weights (or another one of its class).

    Returns: the model, what was chosen, and the weights of streamed layers.
    """
    folder, family = model_files.folder, module.config.model_type
    files = weight_files(folder)
    match = match_names(module, files)
    choices = _not_used(type(module).__name__, model_files, files, match)
    if match.must_convert:
        because = f"transformers merges or splits {family} tensors while loading"
        choices.append(Choice("loader", "transformers, on the CPU first", because))
        ties = module.all_tied_weights_keys
        module = load_with_transformers(folder, module.config, attention, dtype)
        untied = {name: ties[name] for name in ties.keys() - module.all_tied_weights_keys.keys()}
        tensors, given = _own_tensors(module), set(module.state_dict())
    else:
        untied = different_ties(module, files, match, dtype)
        untie(module, untied)
        tensors, given = read_tensors(files, match, dtype), set(match.names.values())
    for one, two in untied.items():
        choices.append(Choice("tie_word_embeddings", False, f"the files hold another {one} than {two}"))
    tensors = _counted(tensors, len(given), progress)
    blocks = blocks_of(module, config.precision, device, shared)
    _fill(module, tensors, config, dtype, device, blocks)
    tie(module, given)
    _check_complete(module, folder)
    return module, choices, blocks


def _not_used(architecture: str, model_files: ModelFiles, files: list[Path], match: TensorMatch) -> list[Choice]:
    """What stands in the folder and is not used, and why."""
    found = []
    if match.unused:
        names = ", ".join(sorted(match.unused)[:2]) + (", ..." if len(match.unused) > 2 else "")
        because = f"{architecture} computes them, or has no part for them ({names})"
        found.append(Choice("tensors not used", len(match.unused), because))
    if others := unread_files(model_files.folder, files):
        because = f"the weights are in {files[0].name}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        found.append(Choice("files not read", ", ".join(others), because))
    if "auto_map" in model_files.config:
        because = f"transformers has {architecture} itself; code from a model folder never runs"
        found.append(Choice("auto_map", "not used", because))
    return found


def _counted(
    tensors: Iterator[tuple[str, torch.Tensor]], total: int, progress: Progress | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for done, named in enumerate(tensors, start=1):
        yield named
        if progress is not None:
            progress(done, total, "tensors")


def _own_tensors(module: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(module.state_dict().items())


def _fill(
    module: PreTrainedModel,
    tensors: Iterator[tuple[str, torch.Tensor]],
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device,
    blocks: LayerBlocks[Any],
) -> None:
    """Store every tensor in its module; a linear becomes a `FrozenLinear` when its weight is read."""
    frozen, where, precision = frozen_linears(module), config.model_name_or_path, config.precision
    in_float32 = kept_in_float32(module, dtype)
    biases: dict[str, torch.Tensor] = {}
    for part in module.modules():  # buffers that were computed while the module was built
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        wanted = getattr(frozen.get(owner) or module.get_submodule(owner), leaf)
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            raise InputError(
                f"{where}: tensor {name} does not fit the architecture in config.json",
                seen=f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}",
                allowed=f"{str(wanted.dtype).removeprefix('torch.')} {tuple(wanted.shape)}",
            )
        tensor = tensor.to(device)
        check_finite(where, name, tensor, may_be_infinite=not isinstance(wanted, nn.Parameter))
        if owner not in frozen:
            kept = torch.float32 if in_float32 and in_float32.search(name) else wanted.dtype
            _set(module.get_submodule(owner), leaf, tensor.to(kept))
        elif leaf == "weight":
            transposed = isinstance(frozen[owner], Conv1D)
            storage = store_weight(tensor.T.contiguous() if transposed else tensor, precision, dtype)
            parent, _, last = owner.rpartition(".")
            setattr(module.get_submodule(parent), last, FrozenLinear(storage, biases.get(owner), transposed))
        else:
            biases[owner] = tensor.to(dtype)
            if isinstance(done := module.get_submodule(owner), FrozenLinear):
                done.bias_O = biases[owner]
        if owner in frozen:
            blocks.loaded(owner)


def kept_in_float32(module: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names that the architecture keeps in float32 whatever the model's dtype (routers); None if there are none."""
    names = [name for name, kept in module._get_dtype_plan(dtype).items() if kept == torch.float32]
    return re.compile("|".join(name.replace("*", ".*") for name in names)) if names else None


def _set(owner: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _check_complete(module: PreTrainedModel, folder: Path) -> None:
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise InputError(f"{folder}: {MISSING.format(len(empty))}", seen=", ".join(empty[:3]))


def _set_generation(module: PreTrainedModel, model_files: ModelFiles) -> None:
    """Take only the special token ids from generation_config.json: it can also name code and caches."""
    if not (raw := model_files.generation_config):
        return
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    for key, value in ids.items():
        numbers = value if isinstance(value, list) else [value]
        if any(type(number) is not int or number < 0 for number in numbers):
            path = model_files.folder / "generation_config.json"
            raise InputError(f"{path}: {key} is not a token id", seen=repr(value)[:80])
    module.generation_config = GenerationConfig(**ids)


def _take_fast_attention(model: TrainableModel, max_length: int, multiplies_in_fp8: bool) -> list[Choice]:
    """Switch to `packed_attention` if this model supports it, else keep transformers' sdpa and say why."""
    reason = packed_attention.unsupported_reason(model.module, max_length, model.dtype)
    if reason is None:
        packed_attention.install(model.module)
        model.uses_varlen_attention = True
        try:
            change = isolation_error(model, multiplies_in_fp8)
            reason = f"rows would see each other (a token's loss changes by {change:.3g})" if change else None
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            reason = first_line(error)
    if reason is None:
        return []
    model.uses_varlen_attention = False
    model.module.set_attn_implementation("sdpa")
    return [Choice("attn_implementation", "sdpa", f"packed rows are separated by a mask: {reason}")]


def isolation_error(model: TrainableModel, multiplies_in_fp8: bool) -> float:
    """Average change of a token's loss when its row is packed with others; 0 if it is only rounding.

    An attention that ignores restarting position_ids (ALiBi models, some backends) lets a row read its neighbours, and
    the loss then looks better than it is. So this model and this backend are tested before the first step.
    """
    vocab = model.module.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    lengths = (5, 9, 7)
    rows = [Example(rng.integers(1, vocab, n).astype(np.int32), np.ones(n, dtype=bool), "probe", []) for n in lengths]
    model.module.eval()
    together = model.token_losses(collate_packs([rows], model.device))[0].detach()  # with gradients, as in training
    with torch.no_grad():
        alone = torch.cat([model.token_losses(collate([row], model.device))[0] for row in rows])
    # Means, not worst cases: in bfloat16 single tokens of an 8B model move by 0.2 nats for padding alone. Rounding to
    # fp8 moves SmolLM2's by 0.3 on average, where rows that do see each other move them by 1.7.
    tolerance = 0.6 if multiplies_in_fp8 else 1e-3 if model.dtype == torch.float32 else 0.1
    change = (together - alone).abs().mean().item()
    return change if not change <= tolerance else 0.0
