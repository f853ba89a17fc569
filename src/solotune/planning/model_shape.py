"""Compute the shape of a model (the sizes and costs that a plan needs) from its config.json, without weights.

    config.json -> the architecture without memory -> frozen linears with adapters, as in training
                -> profile one layer of each kind (`profile_compiled`, `profile_eager`), embedding and last norm
                -> `ModelShape`

There is no table of architectures: sizes are counted on the model that transformers builds, and the memory of a layer
is found by running the compiler, or autograd, on fake tensors. A layer that cannot be profiled this way (experts chosen
by the data) is estimated from its linears, and the plan says so.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solotune.config.run_config import RunConfig
from solotune.errors import InputError
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.model import lora, loss
from solotune.model.adapter_coverage import adapter_coverage
from solotune.model.empty_model import empty_model
from solotune.model.frozen_linear import DenseWeight, Fp8Weight, FrozenLinear, frozen_linears
from solotune.model.host_embedding import own_embedding
from solotune.model.layers import decoder_layers, language_model
from solotune.model.tied_weights import different_ties, untie
from solotune.model.weight_files import weight_files
from solotune.model.weights import match_names
from solotune.planning.curve_fit import LENGTHS, ROWS, LayerProfile, PassCounts, fit
from solotune.planning.idle_layers import idle_layers, returns_tuple
from solotune.planning.layer_profile import LayerCost, Linear, ModelShape, Pass, Polynomial
from solotune.planning.profile_compiled import look_compiled
from solotune.planning.profile_eager import look_eager, metered
from solotune.planning.profile_evaluation import evaluation_pass, layer_moments
from solotune.runtime import signals


def model_shape(config: RunConfig, model_files: ModelFiles | None = None) -> ModelShape:
    """The shape of the model of a resolved config, whose `base_precision` must not be auto.

    Args:
        model_files: the files of the config's model; None: they are resolved here.

    Raises:
        InputError: the model is not found, an architecture without a list of layers, a target module that matches
            nothing, rows longer than the model's positions.
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    files = model_files or resolve_model(config)
    module, attention = empty_model(files, config.attn_implementation, config.batches, dtype, torch.device("cpu"))
    _untie(module, files, dtype)
    absent = _absent(module)
    linears = frozen_linears(module)
    total = sum(parameter.numel() for parameter in module.parameters())
    frozen = sum(p.numel() for part in linears.values() for p in part.parameters(recurse=False))
    text = module.config.get_text_config()
    # signals are deferred: where torch calls Python from C++, an exception from a signal would end the process
    with signals.defer_signals(), _unlogged(), FakeTensorMode(allow_non_fake_inputs=True):
        _fill_with_fakes(module, config.multiplies_in_fp8, dtype)
        inside, layers = language_model(module), decoder_layers(module)
        lora_layers = lora.attach(
            module, config.lora, torch.device("cpu"), is_compiled=config.torch_compile, inside=inside
        )
        coverage = adapter_coverage(module, layers, inside, lora_layers)
        module.train()
        costs = _layer_costs(module, layers, config.torch_compile, absent)
        outside = _outside_or_estimated(module, layers, attention)
        evaluation = evaluation_pass(module, layers, has_causal_mask=attention != "sdpa")
        logit_bytes = (2 * dtype.itemsize, 3 * dtype.itemsize) if config.torch_compile else _eager_logits(module, dtype)
    heads = getattr(text, "num_attention_heads", None) or 1
    return ModelShape(
        family=module.config.model_type,
        linears=_counted(module, set(lora_layers)),
        other_parameters=total - frozen,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_heads=heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        max_positions=getattr(text, "max_position_embeddings", None),
        layers=tuple(costs),
        outside=outside,
        logit_bytes=logit_bytes,
        max_chunk_logits=loss.MAX_CHUNK_LOGITS,
        lora_r=config.lora_r,
        dtype_bytes=dtype.itemsize,
        is_compiled=config.torch_compile,
        layer_linears=tuple(_counted(module, set(lora_layers), within=set(layer.modules())) for layer in layers),
        evaluation=evaluation,
        embedding_parameters=table.weight.numel() if (table := own_embedding(module)) is not None else 0,
        coverage=coverage,
    )


def _untie(module: PreTrainedModel, files: ModelFiles, dtype: torch.dtype) -> None:
    """Untie what the weights have untied, if they are on this machine; the plan of a hub model takes config.json."""
    module.tie_weights()
    if not files.is_local and not files.has_weights:
        return
    with contextlib.suppress(InputError):  # no weights, or damaged ones: loading reports it
        paths = weight_files(files.folder)
        untie(module, different_ties(module, paths, match_names(module, paths), dtype))


@contextmanager
def _unlogged() -> Iterator[None]:
    """Silence torch's log: for an operation that refuses fake tensors it logs a traceback, and raises too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _fill_with_fakes(module: PreTrainedModel, in_fp8: bool, dtype: torch.dtype) -> None:
    """Replace every tensor by a fake one, and every linear by a frozen one. Call it within the fake mode."""

    def fake_of(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    _replace_tensors(module, fake_of, fake_of)
    for name, part in list(frozen_linears(module).items()):
        weight = part.weight
        assert isinstance(weight, nn.Parameter)
        transposed = isinstance(part, Conv1D)
        out, into = reversed(weight.shape) if transposed else weight.shape
        fake = torch.empty(out, into, dtype=dtype)
        storage = (Fp8Weight if in_fp8 else DenseWeight)(fake)
        bias = torch.empty(out, dtype=dtype) if isinstance(part.bias, nn.Parameter) else None
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, FrozenLinear(storage, bias, transposed))


def _counted(
    module: PreTrainedModel, lora_layers: set[str], within: set[nn.Module] | None = None
) -> tuple[Linear, ...]:
    found: Counter[tuple[int, int, bool, bool]] = Counter()
    for name, part in module.named_modules():
        if isinstance(part, FrozenLinear) and (within is None or part in within):
            own = name.removesuffix(".base")
            found[part.out_features, part.in_features, part.bias_O is not None, own in lora_layers] += 1
    return tuple(Linear(o, i, count, bias, is_adapted) for (o, i, bias, is_adapted), count in found.items())


def _layer_costs(
    module: PreTrainedModel, layers: nn.ModuleList, is_compiled: bool, absent: set[object]
) -> list[LayerCost]:
    """The cost of each layer; each kind of layer is profiled once."""
    try:
        calls = {tokens: _calls(module, layers, tokens, absent) for tokens in LENGTHS}
    except Exception:  # an architecture that reads its data before the first layer
        x = torch.empty(ROWS, LENGTHS[0], module.config.get_text_config().hidden_size, dtype=module.dtype)
        return [estimated(layer, x, is_compiled) for layer in layers]
    known: dict[str, LayerCost] = {}
    costs = []
    for number, layer in enumerate(layers):
        signals.check_stop()
        kind = f"{type(layer).__name__} {getattr(layer, 'attention_type', '')} " + ",".join(
            f"{name}{tuple(p.shape)}" for name, p in (*layer.named_parameters(), *layer.named_buffers())
        )
        if kind not in known:
            inputs = {tokens: calls[tokens][number] for tokens in LENGTHS}
            known[kind] = _cost(layer, inputs, is_compiled)
        costs.append(known[kind])
    return costs


_Replace = Callable[[torch.Tensor], torch.Tensor]
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(
    module: PreTrainedModel, layers: nn.ModuleList, tokens: int, absent: set[object], device="cpu"
) -> list[_Call]:
    """The arguments that the model passes to each of its layers; the layers do not run.

    Args:
        absent: positions and names of arguments that are None in a real call; see `_absent`.
    """
    caught: list[_Call] = []

    def catch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args = args if args else (kwargs.pop("hidden_states"),)
        args = tuple(None if place in absent else value for place, value in enumerate(args))
        caught.append((args, {name: None if name in absent else value for name, value in kwargs.items()}))

    with idle_layers(layers, returns_tuple(module, layers), catch), torch.no_grad():
        module.base_model(input_ids=torch.zeros(ROWS, tokens, dtype=torch.int64), use_cache=False)
    return caught


def _absent(module: PreTrainedModel) -> set[object]:
    """Positions and names of a layer's arguments that are None in a real call.

    transformers leaves out a mask that is only causal, but not on fake tensors. So the model is called once on real
    tensors; each parameter is a single zero expanded to its shape, which takes no memory.
    """

    def zero(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)

    _replace_tensors(module, zero, lambda buffer: zero(buffer) if buffer.is_meta else buffer)
    try:
        calls = _calls(module, decoder_layers(module), 16, set())
    except (RuntimeError, ValueError):  # an architecture that fails on zeros
        calls = []
    if not calls:
        return {"attention_mask"}
    args, kwargs = calls[0]
    return {place for place, value in (*enumerate(args), *kwargs.items()) if value is None}


def _replace_tensors(module: nn.Module, parameter: _Replace, buffer: _Replace) -> None:
    """Replace all parameters and buffers; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(parameter(old), requires_grad=False)
                part._parameters[name] = made[id(old)]
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = buffer(old)


def _cost(layer: nn.Module, calls: dict[int, _Call], is_compiled: bool) -> LayerCost:
    shapes = {m.storage.shape for m in layer.modules() if isinstance(m, FrozenLinear)}

    def is_frozen(a: int, b: int) -> bool:
        return (a, b) in shapes or (b, a) in shapes

    look = look_compiled if is_compiled else look_eager
    try:
        looks = []
        for tokens in LENGTHS:
            signals.check_stop()
            looks.append((tokens, look(layer, *calls[tokens], is_frozen)))
    except Exception:  # operations of this architecture do not work on fake tensors
        return estimated(layer, calls[LENGTHS[0]][0][0], is_compiled)
    cost = fit(looks, ROWS, "compiled" if is_compiled else "eager")
    return replace(cost, evaluation=layer_moments(layer, calls, is_frozen))


def estimated(layer: nn.Module, x: torch.Tensor, is_compiled: bool) -> LayerCost:
    """Estimate a layer's cost from its linears alone: their outputs, times 1.4 if it is not compiled."""
    linears = [part for part in layer.modules() if isinstance(part, FrozenLinear)]
    size = x.element_size()
    width = x.shape[-1]
    outputs = sum(part.out_features for part in linears) * size
    others = sum(p.numel() for p in layer.parameters() if p.dim() > 2)  # experts
    kept = (outputs + 3 * width * size) * (1.0 if is_compiled else 1.4)
    kept += 3 * size * (others / max(1, width)) ** 0.5
    widest = max((part.out_features for part in linears), default=width) * size
    nothing = Pass((), Polynomial(0, 4 * kept), 30)
    return LayerCost(
        kept=Polynomial(0, kept),
        output=Polynomial(0, width * size),
        forward_peak=Polynomial(0, kept + 2 * widest),
        backward_extra=Polynomial(0, 4 * widest),
        forward=nothing,
        backward=nothing,
        how="estimated",
    )


def _outside_or_estimated(module: PreTrainedModel, layers: nn.ModuleList, attention: str) -> LayerCost:
    try:
        return _outside(module, layers, attention)
    except Exception:  # as in `_layer_costs`
        size = module.config.get_text_config().hidden_size * module.dtype.itemsize
        kept, nothing = Polynomial(0, 3 * size), Pass((), Polynomial(0, 8 * size), 10)
        return LayerCost(kept, Polynomial(0, size), kept, kept, nothing, nothing, "estimated")


def _outside(module: PreTrainedModel, layers: nn.ModuleList, attention: str) -> LayerCost:
    """The cost of embedding and last norm: the model with layers that do nothing."""
    looks = []
    gives_tuple = returns_tuple(module, layers)
    for tokens in LENGTHS:
        ids = torch.zeros(ROWS, tokens, dtype=torch.int64)
        with idle_layers(layers, gives_tuple), metered() as meter:
            hidden = module.base_model(input_ids=ids, use_cache=False).last_hidden_state
            kept, forward_peak, work = meter.now, meter.most, meter.work
            meter.work = PassCounts()
            dy = torch.ones_like(hidden)
            meter.most = meter.now
            torch.autograd.backward(hidden, dy)
        output = hidden.numel() * hidden.element_size()
        looks.append((tokens, LayerProfile(kept, output, forward_peak, meter.most - kept, [work, meter.work])))
        del hidden, dy
    cost = fit(looks, ROWS, "eager")
    if attention == "sdpa":  # here there is a causal mask, which real tensors do not get

        def linear(growth: Polynomial) -> Polynomial:
            return growth._replace(per_token_squared=0.0)

        kept, forward, backward = map(linear, (cost.kept, cost.forward_peak, cost.backward_extra))
        cost = replace(cost, kept=kept, forward_peak=forward, backward_extra=backward)
    return cost


def _eager_logits(module: PreTrainedModel, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per logit, for one chunk and for several, found by running the loss on fake tensors."""
    vocab, width = module.config.get_text_config().vocab_size, 8
    weight = torch.empty(vocab, width, dtype=dtype)
    found = []
    for chunks in (1, 2):
        h = torch.empty(64 * chunks, width, dtype=dtype).requires_grad_()
        labels = torch.zeros(64 * chunks, dtype=torch.int64)
        with metered() as meter:
            loss._ChunkedLosses.apply(h, labels, lambda part: F.linear(part, weight), 64, False)
        found.append(meter.most / (64 * vocab))
    return found[0], found[1]


def cpu_gflops(seconds: float = 0.5) -> float:
    """Speed of this CPU's float32 products, in 10^9 operations per second.

    The best of many tries on one core, times the number of cores: on all cores, other busy processes would slow it.
    """
    threads = torch.get_num_threads()
    a, b = torch.ones(512, 768), torch.ones(768, 1024)
    best, until = float("inf"), time.perf_counter() + seconds
    torch.set_num_threads(1)
    try:
        while (started := time.perf_counter()) < until:
            torch.mm(a, b)
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return threads * 2 * 512 * 768 * 1024 / best / 1e9
