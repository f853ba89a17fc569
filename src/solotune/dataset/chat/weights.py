"""Loss weights of messages and rows, and the switches that other trainers have for "learn this".

`weight` (or `loss_weight`) on an assistant message applies to that answer's tokens, on a row to all of its tokens, and
the two multiply. With weights w the loss of an optimizer step is

    sum_n w_n l_n / sum_n w_n          over all loss tokens n of the whole accumulated batch

so only ratios matter: all weights 1 and all weights 5 give the same run, and a row of weight 2 counts like the same row
twice. (Twice in a file it counts once: exact duplicates are removed, and the weight of the first is kept.) Weight 0
leaves out an answer (it is still context) or the whole row. Cells of a csv are texts, so a weight may be a number as
text; true and false are not weights.

`train: false` (`training`, `trainable`, `loss`, ...) and `masked: true` are weight 0; their opposite is no weight. A
switch and a weight that contradict each other are refused.
"""

from __future__ import annotations

from typing import Any

from solotune.dataset.readers.row import RowError, is_blank, short
from solotune.errors import Advice

WEIGHT_KEYS = ("weight", "loss_weight")
_MESSAGE_WEIGHT_KEYS = (*WEIGHT_KEYS, "loss_scale")  # the third is ms-swift's
ON_KEYS = (
    "train",
    "training",
    "trainable",
    "is_trainable",
    "do_train",
    "train_on",
    "should_train",
    "loss",
    "compute_loss",
    "loss_mask",
    "supervised",
    "learn",
)
"""True: learn this message."""
OFF_KEYS = ("masked", "is_masked", "ignore", "ignore_loss", "no_loss", "no_train")
"""True: do not learn this message."""
UNCLEAR_KEYS = ("mask", "train_detail", "training_detail")
"""`mask: true` may mean either; `train_detail` marks parts of a message, which this package cannot do."""
MESSAGE_KEYS = frozenset((*_MESSAGE_WEIGHT_KEYS, *ON_KEYS, *OFF_KEYS, *UNCLEAR_KEYS))
ROW_KEYS = ("train", "training", "trainable", "masked")
"""Switches of a whole row. The others have other meanings there: `loss` is a number that somebody measured."""
_ROW_KEYS = frozenset((*WEIGHT_KEYS, *ROW_KEYS))

_TRUTH = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False, "1.0": True, "0.0": False}
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-9, 1e9  # the product of two, and a sum of millions of those, fits into float32


def weight_of_row(where: str, values: dict[str, Any]) -> float:
    """Return the loss weight of a row, 1 if none is given.

    Raises:
        RowError: not a weight, or a switch that contradicts it.
    """
    if _ROW_KEYS.isdisjoint(values):
        return 1.0
    given = [(key, truth) for key in ROW_KEYS if key in values and (truth := truth_of(values[key])) is not None]
    switches = [(key, truth != (key in OFF_KEYS)) for key, truth in given]
    return _together(where, values, _weights(where, values, is_row=True), switches)


def weight_of_message(place: str, values: dict[str, Any], *, is_answer: bool) -> float:
    """Return the loss weight of a message, 1 if none is given.

    Raises:
        RowError: not a number, negative, not finite, or outside the range of float32; or not 0 on a message that is not
            an answer; a switch that is neither true nor false, or that contradicts the weight.
    """
    if MESSAGE_KEYS.isdisjoint(values):
        return 1.0
    for key in UNCLEAR_KEYS:
        if not is_blank(values.get(key)):
            raise _unclear(place, key, values[key])
    weights, switches = _weights(place, values, is_row=False), _switches(place, values)
    weight = _together(place, values, weights, switches)
    if weight and not is_answer and (weights or any(is_on for _, is_on in switches)):
        key = weights[0][0] if weights else next(key for key, is_on in switches if is_on)
        given = f"{weights[0][1]:g}" if weights else short(values[key])
        raise RowError(
            f"{place}: {key}: {given}, but only assistant messages can have a weight",
            reason=f"{key} on a message that is not an answer",
            change=f"remove {key} from this message; to train on all tokens, set assistant_only_loss: false",
        )
    return weight


def _weights(place: str, values: dict[str, Any], *, is_row: bool) -> list[tuple[str, float]]:
    found = []
    for key in WEIGHT_KEYS if is_row else _MESSAGE_WEIGHT_KEYS:
        if values.get(key) is None:
            continue
        weight = _number(values[key])
        if weight is None or not (weight == 0 or _LEAST_WEIGHT <= weight <= _MOST_WEIGHT):
            doubt, ignored = "if it is not a loss weight: ", {"column_mapping": {key: "ignore"}}
            raise RowError(
                f"{place}: {key} is not a weight",
                reason=f"{key} is not a weight",
                seen=short(values[key]),
                allowed=f"0 (not trained on), or a number from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}; the default is 1",
                change=Advice(f"{doubt}column_mapping: {{{key}: ignore}}", ignored, is_choice=True)
                if is_row
                else f"{doubt}remove {key} from the messages",
            )
        found.append((key, weight))
    return found


def _switches(place: str, values: dict[str, Any]) -> list[tuple[str, bool]]:
    given = [key for key in (*ON_KEYS, *OFF_KEYS) if not is_blank(values.get(key))]
    return [(key, check_switch(place, key, values[key]) != (key in OFF_KEYS)) for key in given]


def check_switch(place: str, key: str, value: Any) -> bool:
    """Return whether a switch is true.

    Raises:
        RowError: it is neither true nor false.
    """
    truth = truth_of(value)
    if truth is None:
        raise RowError(
            f"{place}: {key} is neither true nor false",
            reason=f"{key} is neither true nor false",
            seen=short(value),
            allowed="true or false: whether to learn it",
            change=f"for a weight between, use weight; if {key} means something else, rename or remove it",
        )
    return truth


def truth_of(value: Any) -> bool | None:
    """True or false, also as 0 or 1 and as the texts that a csv has for them; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    return _TRUTH.get(value.strip().lower()) if isinstance(value, str) else None


def _together(
    place: str, values: dict[str, Any], weights: list[tuple[str, float]], switches: list[tuple[str, bool]]
) -> float:
    """The weight that all keys agree on."""
    if not weights and not switches:
        return 1.0
    said = [*weights, *((key, float(is_on)) for key, is_on in switches)]
    kinds = {weight > 0 for _, weight in said}
    if len(kinds) > 1 or len({weight for _, weight in weights}) > 1:
        keys = [key for key, _ in said]
        raise RowError(
            f"{place}: {', '.join(keys)} contradict each other",
            reason=f"{' and '.join(keys)} contradict each other",
            seen=", ".join(f"{key}: {short(values[key])}" for key in keys),
            allowed="one of them, or all with one meaning",
        )
    return said[0][1]


def _unclear(place: str, key: str, value: Any) -> RowError:
    return RowError(
        f"{place}: {key} is not read",
        reason=f"{key} on a message",
        seen=f"{key}: {short(value)}",
        allowed="train: false (or weight: 0) on a message that is not to be learned",
        change=f"write train: true or train: false on whole messages instead of {key}",
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # a text that is no number; an int of 400 digits
        return None
