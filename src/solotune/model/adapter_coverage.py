"""Which parts of a model have adapters and which have none, for people and for JSON.

    self_attn    q_proj, k_proj, v_proj, o_proj in 8 of 32 layers
    linear_attn  none in 24 layers: the targets name none of its linears
    mlp.experts  none in 32 layers, 16 bits: experts are one tensor, no linear layer, so neither adapted nor quantised
    model.visual none: another tower than the language model

A part is a child module of a decoder layer; experts are a part of their own. Children of one name but different classes
(`mixer` of Nemotron-H) are different parts. Embeddings, head, norms and routers, which never get an adapter, are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

OTHERS = "embeddings, head, norms, routers"


@dataclass(frozen=True)
class ModelPart:
    """One kind of part."""

    name: str
    num_layers: int  # decoder layers that have it; 0: it is outside of them
    num_adapted_layers: int
    adapted: tuple[str, ...]  # last names of its linears with an adapter
    not_adapted: tuple[str, ...]  # last names of its linears without one
    num_parameters: int
    num_unadapted: int  # of its parameters, those in layers where it has no adapter
    bits: int | None  # of its weights, if they are no linear layers and so stay as they are; None: linear layers
    num_experts: int | None = None  # in each layer, if the part is experts


@dataclass(frozen=True)
class AdapterCoverage:
    """All parts of a model, those of the decoder layers first."""

    num_layers: int
    parts: tuple[ModelPart, ...]

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    def _share(self, number: int) -> float:
        return number / max(1, self.num_parameters)

    def to_json(self) -> dict[str, Any]:
        parts = [{**asdict(part), "share": round(self._share(part.num_parameters), 6)} for part in self.parts]
        return {"num_layers": self.num_layers, "num_parameters": self.num_parameters, "parts": parts}

    def in_words(self) -> list[str]:
        """One line about the parts with adapters, and one about those without, if there are any."""
        adapted = [part for part in self.parts if part.adapted]
        without = [
            replace(part, num_layers=part.num_layers - part.num_adapted_layers)
            for part in self.parts
            if part.num_adapted_layers < max(1, part.num_layers) and part.name != OTHERS
        ]
        lines = ["adapters: " + "; ".join(map(self._with, adapted))]
        return lines + (["no adapters: " + "; ".join(map(self._without, without))] if without else [])

    def _layers(self, count: int) -> str:
        return f"{count} of {self.num_layers} layers" if count < self.num_layers else f"all {count} layers"

    def _with(self, part: ModelPart) -> str:
        linears = "" if part.adapted == (part.name,) else f"{', '.join(part.adapted)} of "
        return f"{linears}{part.name} in {self._layers(part.num_adapted_layers)}"

    def _without(self, part: ModelPart) -> str:
        name = part.name + (f" ({part.num_experts} each)" if part.num_experts else "")
        where = f"{name} in {self._layers(part.num_layers)}" if part.num_layers else name
        share = f"{self._share(part.num_unadapted):.1%} of the parameters"
        return f"{where} ({share}" + (f", kept in {part.bits} bits)" if part.bits else ")")


def adapter_coverage(
    module: PreTrainedModel, layers: nn.ModuleList, language_model: str, lora_layers: Collection[str]
) -> AdapterCoverage:
    """What `lora_layers` adapt.

    Args:
        module: with frozen linears, and adapters or not.
        layers: its decoder layers.
        language_model: dotted name of the part that reads text; empty: the whole model.
        lora_layers: dotted names of the layers with an adapter.
    """
    names = {part: name for name, part in module.named_modules()}
    inner = f"{names[module.base_model]}." if module.base_model is not module else ""
    of_layers, of_towers = dict[tuple[str, str], list[_Unit]](), dict[str, list[_Unit]]()
    units = list(_units(module))
    for unit in units:
        layer = next((layer for layer in layers if unit.name.startswith(f"{names[layer]}.")), None)
        if layer is not None:
            key = _kind(unit, layer, unit.name.removeprefix(f"{names[layer]}."))
            of_layers.setdefault(key, []).append(replace(unit, layer=names[layer]))
        elif language_model and not unit.name.startswith(f"{language_model}.") and unit.name.startswith(inner):
            of_towers.setdefault(unit.name.removeprefix(inner).partition(".")[0], []).append(unit)
    of_layers = {  # what is left is norms and routers
        key: found for key, found in of_layers.items() if any(unit.bits is None or unit.is_experts for unit in found)
    }
    kinds = Counter(name for name, _ in of_layers)
    parts = [
        _part(f"{name} ({kind})" if kinds[name] > 1 else name, found, set(lora_layers))
        for (name, kind), found in of_layers.items()
    ]
    parts += [_part(name, found, set(lora_layers)) for name, found in of_towers.items()]
    others = sum(unit.num_parameters for unit in units) - sum(part.num_parameters for part in parts)
    return AdapterCoverage(len(layers), (*parts, ModelPart(OTHERS, 0, 0, (), (), others, others, None)))


@dataclass(frozen=True)
class _Unit:
    """A module with parameters of its own."""

    name: str
    part: nn.Module
    num_parameters: int
    shape: tuple[int, ...]  # of its largest parameter
    bits: int | None  # None: a frozen linear
    layer: str = ""

    @property
    def is_experts(self) -> bool:
        from torch import nn

        is_convolution = isinstance(self.part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return self.bits is not None and len(self.shape) >= 3 and not is_convolution


def _units(module: nn.Module) -> Iterator[_Unit]:
    from solotune.model.frozen_linear import FrozenLinear
    from solotune.model.lora import LoraLinear

    seen: set[int] = set()
    for name, part in module.named_modules():
        if isinstance(part, FrozenLinear):
            bias = 0 if part.bias_O is None else part.bias_O.numel()
            yield _Unit(
                name.removesuffix(".base"), part, part.out_features * part.in_features + bias, part.storage.shape, None
            )
        elif not isinstance(part, LoraLinear):
            own = [p for p in part._parameters.values() if p is not None and id(p) not in seen]
            seen |= {id(p) for p in own}
            if own:
                largest = max(own, key=lambda p: p.numel())
                yield _Unit(name, part, sum(p.numel() for p in own), tuple(largest.shape), 8 * largest.element_size())


def _kind(unit: _Unit, layer: nn.Module, inside: str) -> tuple[str, str]:
    """(name of the unit's part of the layer, class of that part)."""
    if unit.is_experts:
        return inside, type(unit.part).__name__
    child = inside.partition(".")[0]
    return child, "" if child == inside else type(layer.get_submodule(child)).__name__


def _part(name: str, units: list[_Unit], lora_layers: set[str]) -> ModelPart:
    linears = {unit.name: unit for unit in units if unit.bits is None}
    adapted = [unit for name, unit in linears.items() if name in lora_layers]
    others = [unit for name, unit in linears.items() if name not in lora_layers]
    in_layers = {unit.layer for unit in adapted}

    def leaves(found: list[_Unit]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(unit.name.rpartition(".")[2] for unit in found))

    return ModelPart(
        name,
        len({unit.layer for unit in units if unit.layer}),
        len(in_layers),
        leaves(adapted),
        leaves(others),
        sum(unit.num_parameters for unit in units),
        sum(unit.num_parameters for unit in units if unit.layer not in in_layers),
        units[0].bits if not linears else None,
        units[0].shape[0] if all(unit.is_experts for unit in units) else None,
    )
