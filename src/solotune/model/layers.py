"""The training pass of the decoder layers: compilation, and what is kept for backward.

What a layer keeps
------------------
Most memory of a training step is what layers keep between forward and backward. From little to much:

- checkpointed and offloaded: nothing on the GPU; its input is in host memory (`host_activations.py`).
- checkpointed: its input. Backward runs the layer's forward again (Chen et al. 2016, arXiv 1604.06174).
- neither: the outputs of its matmuls and of attention, 94 KB a token for each layer of Llama 8B. Everything between
  them (norms, rotary embedding, SiLU x up, dropout) is recomputed, which costs no more than reading it.

Partitioner options
-------------------
The compiler chooses what the last kind keeps, by a minimum cut through the graph. Three of its rules are switched off,
because they keep what is cheap to recompute if a consumer is far away or a chain is long: with them 146 KB a token are
kept, a third of it dropped copies of the inputs and their masks.

Order
-----
The first layers are checkpointed: backward ends with them, and when they are recomputed, what later layers had kept is
already free.

What it does not do: compile passes without gradients; their shapes (evaluation, a growing cache) change all the time.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from solotune.config.settings import PrecisionSettings
from solotune.errors import InputError
from solotune.model.frozen_linear import frozen_linears
from solotune.model.host_activations import HostActivations
from solotune.model.host_blocks import HostBlock
from solotune.model.host_embedding import move_embedding_to_host
from solotune.model.layer_blocks import LayerBlocks
from solotune.model.layer_ring import LayerRing
from solotune.model.limits import MLP_CHUNK_TOKENS, offloaded_layers
from solotune.model.sharded_blocks import SharedBase

PARTITIONER_OPTIONS: dict[str, Any] = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}
"""Options of the compiler's partitioner for compiled layers."""


def language_model(module: PreTrainedModel) -> str:
    """Dotted name of the part that reads text, if the model has towers for images or sound too; empty if not.

    Rows are text, so other towers do not run: adapters on them would never be trained.
    """
    if module.config.get_text_config() is module.config or not module.config.sub_configs:
        return ""
    try:
        decoder = module.get_decoder()
    except AttributeError:  # a text model whose class is written for the towers too: Llama 4
        return ""
    inner = module.base_model
    parts = inner.named_modules(prefix=module.base_model_prefix)
    return next((name for name, part in parts if part is decoder and part is not inner), "")


def decoder_layers(module: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of the language model.

    Raises:
        InputError: no list in it has the length that its config says.
    """
    depth = module.config.get_text_config().num_hidden_layers
    for part in module.get_submodule(language_model(module) or module.base_model_prefix).modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise InputError(
        f"{module.config.model_type}: no list of {depth} decoder layers in this architecture",
        allowed="a causal language model with one list of decoder layers",
    )


def streamed_layers(module: PreTrainedModel, precision: PrecisionSettings) -> list[nn.Module]:
    """The decoder layers whose frozen weights are not on the device, or only a part of them.

    Raises:
        InputError: a part of one is also a part of something else, which would compute with the weights of whichever
            layer is on the device.
    """
    layers = decoder_layers(module)
    key, value = "base_offload", precision.base_offload
    if precision.base_sharding is True:
        key, value = "base_sharding", True
    chosen = [layers[number] for number in offloaded_layers(value, len(layers))]
    if chosen:
        owners = Counter(child for part in module.modules() for child in part.children())
        parts = {part for layer in chosen for part in layer.modules()}
        if any(owners[part] > 1 and next(part.parameters(), None) is not None for part in parts):
            raise InputError(
                f"{key}: layers of {module.config.model_type} share parts, so they cannot be streamed alone",
                seen=f"{key}: {str(value).lower()}",
                change=f"{key}: false",
            )
    return chosen


def blocks_of(
    module: PreTrainedModel, precision: PrecisionSettings, device: torch.device, shared: SharedBase | None
) -> LayerBlocks[Any]:
    """The blocks of those layers, to be made while they are loaded: in host memory, or on the cards of all ranks."""
    make = functools.partial(HostBlock, device=device) if shared is None else shared.block
    return LayerBlocks(streamed_layers(module, precision), frozen_linears(module), make)


def stream_layers(
    module: PreTrainedModel,
    precision: PrecisionSettings,
    blocks: LayerBlocks[Any],
    device: torch.device,
    shared: SharedBase | None,
) -> LayerRing | None:
    """Stream the frozen weights of those layers from host memory, or from the cards of all ranks.

    The token embedding goes to host memory.

    Args:
        blocks: the weights of layers that are there already.

    Raises:
        DeviceError: the system does not pin so much memory.
        CheckError: a rank cannot read another one's memory.
    """
    if not (layers := streamed_layers(module, precision)):
        return None
    made = [blocks.of(layer) for layer in layers]
    if shared is not None:
        shared.connect(made)
    move_embedding_to_host(module, device)
    return LayerRing(layers, made, device)


def num_checkpointed(gradient_checkpointing: bool | int | Literal["auto"], depth: int) -> int:
    """Number of layers, counted from the first, that are recomputed in backward: all for True and `auto`."""
    if isinstance(gradient_checkpointing, bool) or gradient_checkpointing == "auto":
        return depth if gradient_checkpointing else 0
    return min(gradient_checkpointing, depth)


def prepare_layers(
    layers: nn.ModuleList,
    recomputed: int,
    is_compiled: bool,
    ring: LayerRing | None = None,
    offload: HostActivations | None = None,
) -> None:
    """Replace each layer's forward for passes with gradients; passes without gradients run the layer's own code.

    Args:
        recomputed: how many layers, counted from the first, are checkpointed.
        is_compiled: compile the layers.
        ring: streams the weights of some of the layers.
        offload: keeps the inputs of all checkpointed layers but the last in host memory.
    """
    for number, layer in enumerate(layers):
        plain = layer.forward
        if number < recomputed and isinstance(mlp := getattr(layer, "mlp", None), nn.Module):
            mlp.forward = _in_parts(mlp.forward, is_compiled)
        streams = ring if ring is not None and layer in ring else None
        trained = streams.own_forward(layer) if streams else plain
        trained = compiled(trained) if is_compiled else trained
        trained = streams.streamed(layer, trained) if streams else trained
        eager = functools.partial(checkpoint, plain, use_reentrant=False)
        if number < recomputed:
            # a compiled layer draws no random numbers: dropout hashes its seed
            trained = functools.partial(checkpoint, trained, use_reentrant=False, preserve_rng_state=not is_compiled)
        if offload is not None and number < recomputed - 1:
            trained, eager = offload.keeping(number, trained), offload.keeping(number, eager)
        layer.forward = _only_with_gradients(trained, plain, eager, wants_gradient=is_compiled and number == 0)


_runs_eager: ContextVar[bool] = ContextVar("runs_eager", default=False)


@contextmanager
def eager_layers() -> Iterator[None]:
    """Run training passes in the block uncompiled, with every layer checkpointed to save memory."""
    token = _runs_eager.set(True)
    try:
        yield
    finally:
        _runs_eager.reset(token)


def _only_with_gradients(
    trained: Callable[..., Any], plain: Callable[..., Any], eager: Callable[..., Any], wants_gradient: bool
) -> Callable[..., Any]:
    """Run `trained` (or `eager`) only with gradients; the first layer's input has one: so all layers share a graph."""

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        if _runs_eager.get():  # read outside what is compiled, so nothing is traced again
            return eager(*args, **kwargs)
        if wants_gradient and args and not args[0].requires_grad:
            args[0].requires_grad_()
        return trained(*args, **kwargs)

    return run


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` that keeps only the outputs of matmuls and attention for backward."""
    return torch.compile(forward, backend=_compile_lean)


def _compile_lean(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    with functorch_config.patch(PARTITIONER_OPTIONS):
        return compile_fx(graph, example_inputs)


def _in_parts(forward: Callable[..., Any], is_compiled: bool) -> Callable[..., Any]:
    """Split long rows of an MLP (x_BTD -> y_BTD, token by token) into parts that are checkpointed one by one."""
    part = compiled(forward) if is_compiled else forward

    @torch.compiler.disable(recursive=False)
    def in_parts(x_BTD: torch.Tensor, parts: int) -> torch.Tensor:
        return torch.cat(
            [
                checkpoint(part, some, use_reentrant=False, preserve_rng_state=not is_compiled)  # type: ignore[misc]
                for some in x_BTD.chunk(parts, dim=1)
            ],
            dim=1,
        )

    @functools.wraps(forward)
    def run(x_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts = -(-x_BTD.shape[1] // MLP_CHUNK_TOKENS) if x_BTD.dim() == 3 else 1
        if parts < 2 or args or kwargs or not torch.is_grad_enabled():
            return forward(x_BTD, *args, **kwargs)
        return in_parts(x_BTD, parts)

    return run
