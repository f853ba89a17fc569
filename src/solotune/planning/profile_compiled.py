"""Profile a compiled decoder layer: the memory it keeps and needs, and its work, from a run on fake tensors.

Why fake tensors
----------------
A fake tensor has a shape and a dtype but no memory. So a layer of any size is profiled in a second, without weights and
without a GPU, for every architecture in transformers: no module is known by its name.

How
---
The layer goes through the compiler's own front end (AOTAutograd and its min-cut partitioner, with the options of
`layers.compiled`), which splits the joint graph into forward and backward: what passes between the two is exactly what
will be kept. An operation in a graph takes memory if the compiler's back end cannot fuse it: matmuls, attention, opaque
operations, reductions, and what these read (`_Graph`). Uncompiled layers are in `profile_eager.py`.

Both are done at several lengths, and a polynomial is fitted. Attention is profiled in the CPU's flash form: like the
GPU's it keeps its output and one float32 for each row of each head. The scratch memory of the GPU kernel is added.

The order in which the back end schedules kernels is not predicted; it is taken from the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from solotune.model.layers import PARTITIONER_OPTIONS
from solotune.planning.curve_fit import MATMULS, IsFrozen, LayerProfile, PassCounts, first

aten = torch.ops.aten

VIEWS = (
    "view", "_unsafe_view", "permute", "transpose", "t", "alias", "expand", "slice", "select", "unsqueeze", "squeeze",
    "detach", "as_strided", "split", "split_with_sizes", "unbind", "diagonal", "reshape", "lift_fresh",
)  # fmt: skip
FUSED = (
    "convert_element_type", "full", "scalar_tensor", "slice_scatter", "select_scatter", "cat", "clone", "iota",
    "arange", "constant_pad_nd", "copy", "full_like", "zeros_like", "ones_like", "empty", "zeros", "ones", "_to_copy",
    "repeat",
)  # fmt: skip


def look_compiled(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_frozen: IsFrozen) -> LayerProfile:
    """Profile the layer as the compiler will split it. Call it within the fake mode of its tensors; args[0] is x."""
    from torch._functorch import config as functorch_config
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import remove_noop_ops

    function, inputs = _flat(layer, args, kwargs)
    graphs: list[Any] = []

    def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        remove_noop_ops(joint.graph)  # as the compiler does; else an alias would be counted in addition to its tensor
        parts = min_cut_rematerialization_partition(joint, joint_inputs, **options)
        graphs.extend([*parts, options["num_fwd_outputs"]])
        return parts

    def as_it_is(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def boxed(arguments: list[Any]) -> Any:
            return gm(*arguments)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    with functorch_config.patch(PARTITIONER_OPTIONS):
        run = aot_function(function, as_it_is, as_it_is, partition_fn=partition, decompositions=select_decomp_table())
        run(*inputs).sum().backward()
    if len(graphs) < 3:
        raise ValueError("the layer has nothing to differentiate")
    forward, backward, num_outputs = graphs
    return _between(_Graph(forward.graph), _Graph(backward.graph), num_outputs, is_frozen)


def _flat(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The layer as a function of tensors only (x first, then the rest, then its parameters), and those tensors."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    leaves, spec = pytree.tree_flatten((args[1:], kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def function(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        filled = list(leaves)
        for place, tensor in zip(places, given, strict=False):
            filled[place] = tensor
        rest, keywords = pytree.tree_unflatten(filled, spec)
        state = dict(zip(tensors, given[len(places) :], strict=True))
        return first(torch.func.functional_call(layer, state, (x, *rest), keywords))

    x = args[0].detach().requires_grad_()
    return function, [x, *(leaves[place] for place in places), *tensors.values()]


class _Graph:
    """The lifetimes of a graph's tensors, as the compiler's back end will have them.

    A pointwise operation takes memory only if a reader cannot fuse it: a matmul, attention, an opaque operation, the
    caller. Otherwise its reader computes it from its own inputs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.outputs = [n if isinstance(n, fx.Node) else None for n in self.nodes[-1].args[0]]  # type: ignore[union-attr]
        self._uses: dict[fx.Node, int] = {}
        self.placeholders = {node.name: node for node in self.nodes if node.op == "placeholder"}

    def owner(self, node: fx.Node) -> fx.Node:
        """The node whose memory this one is a view of."""
        while _is_view(node):
            node = node.all_input_nodes[0]
        return node

    def readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that read it, directly or through views."""
        for user in node.users:
            if _is_view(user):
                yield from self.readers(user)
            else:
                yield user

    def is_memory(self, node: fx.Node) -> bool:
        if node.op != "call_function" or _is_view(node) or _bytes(node) == 0:
            return False
        if not _is_fusible(node):
            return True
        return any(r.op == "output" or not (_is_fusible(r) or _is_reduction(r)) for r in self.readers(node))

    def kernels(self) -> dict[int, list[fx.Node]]:
        """Position -> the nodes that one kernel writes there."""
        found: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            if self.is_memory(node):
                found.setdefault(self.birth(node), []).append(node)
        return found

    def _taken_over(self, birth: int, outputs: list[fx.Node]) -> int:
        """Bytes of a kernel's input that is reused for one of its outputs: a matmul's result, read for the last time.

        If a kernel of several outputs reads two such inputs, their sum replaces one of them and is written too.
        """
        if not _is_fusible(outputs[0]):
            return 0
        size = _bytes(outputs[0])
        read = {source for node in outputs for source in self._sources(node)}
        last = [s for s in read if _bytes(s) == size and not _is_fusible(s) and self.death(s) == birth]
        last = [source for source in last if source.op == "call_function"]
        return size if len(last) == 1 or (last and len(outputs) == 1) else 0

    def birth(self, node: fx.Node) -> int:
        """Its position, or that of the last pointwise operation computed in the same kernel.

        The compiler's back end joins pointwise operations of one size that read the same memory and do not depend on
        each other: the recomputed input of a layer's last matmul is written together with the gradients of its gate.
        """
        place = self.index[node]
        if not _is_fusible(node):
            return place
        sources = {source for source in self._sources(node) if _bytes(source) >= _bytes(node)}
        waiting = self._waiting_for(node)
        for other in self.nodes[place + 1 :]:
            if not (_is_fusible(other) and self.is_memory(other) and _bytes(other) == _bytes(node)):
                continue
            if other not in waiting and sources & self._sources(other):
                place = self.index[other]
        return place

    def _waiting_for(self, node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        todo = [node]
        while todo:
            for user in todo.pop().users:
                if user not in found:
                    found.add(user)
                    todo.append(user)
        return found

    def death(self, node: fx.Node) -> int:
        """The position of the last operation that reads it, through views and fused operations."""
        if node not in self._uses:
            last = self.index[node]
            for reader in self.readers(node):
                is_there = reader.op == "output" or self.is_memory(reader) or not _is_fusible(reader)
                last = max(last, self.index[reader] if is_there else self.death(reader))
            self._uses[node] = last
        return self._uses[node]

    def peak(self, given: dict[fx.Node, float]) -> float:
        """The most bytes alive at one time; `given` are tensors that exist from the start."""
        change = [0.0] * (len(self.nodes) + 1)
        spans = [(0, self.death(node), size) for node, size in given.items()]
        for birth, outputs in self.kernels().items():
            spans += [(birth, max(birth, self.death(node)), _bytes(node)) for node in outputs]
            change[birth] -= (taken := self._taken_over(birth, outputs))
            change[birth + 1] += taken
        spans += [(self.index[n], self.index[n], scratch) for n in self.nodes if (scratch := _scratch(n))]
        for birth, death, size in spans:
            change[birth] += size
            change[death + 1] -= size
        most = now = 0.0
        for step in change:
            now += step
            most = max(most, now)
        return most

    def work(self, is_frozen: IsFrozen) -> PassCounts:
        done = PassCounts()
        for outputs in self.kernels().values():
            node = outputs[-1]
            if node.target is getitem:
                continue
            done.num_kernels += 1
            size = sum(map(_bytes, {self.owner(source) for output in outputs for source in self._sources(output)}))
            size += sum(map(_bytes, outputs))
            if _name(node) in MATMULS:
                flops, frozen = _flops(node, is_frozen)
                done.matmuls.append((flops, size, frozen))
            elif "attention" not in _name(node):
                done.other_bytes += size
        return done

    def _sources(self, node: fx.Node) -> set[fx.Node]:
        """The nodes whose memory an operation reads, including what is fused into it."""
        found: set[fx.Node] = set()
        todo = [self.owner(source) for source in node.all_input_nodes]
        while todo:
            source = todo.pop()
            if source.op == "placeholder" or self.is_memory(source):
                found.add(source)
            elif source not in found:
                todo += [self.owner(before) for before in source.all_input_nodes]
        return found


def _is_view(node: fx.Node) -> bool:
    """Whether it is a view of another node's memory.

    A copy of attention's output counts as a view: the GPU's kernels write it in the order that the copy would have.
    """
    if node.op != "call_function":
        return False
    if _name(node) == "clone":
        source = node.all_input_nodes[0]
        while _is_view(source):
            source = source.all_input_nodes[0]
        return source.target is getitem and "attention" in _name(source.all_input_nodes[0])
    return _name(node) in VIEWS


def _name(node: fx.Node) -> str:
    """aten.mm.default -> mm"""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", "")


def _is_fusible(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (torch.Tag.pointwise in tags or _name(node) in FUSED)


def _is_reduction(node: fx.Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ()) or _name(node) in (
        "sum", "mean", "amax", "amin", "var_mean", "argmax", "any", "prod", "cumsum",
    )  # fmt: skip


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _scratch(node: fx.Node) -> int:
    """Scratch bytes of flash attention's backward on a GPU: dq summed in float32, and dk, dv of every query head."""
    if "attention" not in _name(node) or "backward" not in _name(node):
        return 0
    query = node.all_input_nodes[1].meta["val"]
    return query.numel() * (4 + 2 * query.element_size())


def _flops(node: fx.Node, is_frozen: IsFrozen) -> tuple[float, bool]:
    shapes = [tuple(source.meta["val"].shape) for source in node.all_input_nodes if source.meta.get("val") is not None]
    if _name(node) == "scaled_matmul":
        shapes = [shapes[0], shapes[2][::-1]]
    shapes = [shape for shape in shapes if len(shape) > 1][-2:]
    if len(shapes) < 2:
        return 0.0, False
    left, right = shapes
    return 2.0 * math.prod(left) * right[-1], is_frozen(*right[-2:])


def _between(forward: _Graph, backward: _Graph, num_outputs: int, is_frozen: IsFrozen) -> LayerProfile:
    """The profile from both graphs: what forward passes to backward, and the peaks of both."""
    x = next(iter(forward.placeholders.values()))
    y = forward.outputs[0]
    assert y is not None
    kept: dict[fx.Node, list[str]] = {}
    for node in forward.outputs[num_outputs:]:
        if node is not None and (node is x or forward.owner(node).op != "placeholder"):
            kept.setdefault(forward.owner(node), []).append(node.name)
    sizes = {owner: _bytes(owner) for owner in kept}
    given: dict[fx.Node, float] = {}
    for owner, names in kept.items():  # one memory with several names lives as long as the last of them
        places = [backward.placeholders[name] for name in names if name in backward.placeholders]
        if places:
            given[max(places, key=backward.death)] = sizes[owner]
    for name, node in backward.placeholders.items():
        if name.startswith("tangents"):
            given[node] = _bytes(node)
    total = sum(sizes.values())
    return LayerProfile(
        kept=total - sizes.get(x, 0) + _bytes(y),
        output=_bytes(y),
        forward_peak=forward.peak({}),
        backward_extra=backward.peak(given) - total,
        passes=[forward.work(is_frozen), backward.work(is_frozen)],
    )
