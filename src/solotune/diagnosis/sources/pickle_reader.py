"""Read the attributes of a pickled object without running it: `training_args.bin` of an untrusted source.

    attributes(Path("output/training_args.bin"))  ->  ("trl...SFTConfig", {"learning_rate": 2e-5, ...})

Unpickling calls any function that the file names. This module walks the opcodes with `pickletools.genops`, which only
decodes them, and keeps a stack of plain values. Everything that would be called or imported becomes an `Opaque` with
its name and arguments: an enum is read by its value, a tensor or a device stays opaque. File size, opcodes and stack
are bounded.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_BYTES = 4 << 20
"""Training arguments are a few kilobytes."""
MAX_OPCODES = 200_000
MAX_DEPTH, MAX_VALUES = 4, 1000
"""Limits for one attribute: lists may contain each other many times."""
MAX_PICKLES = 8
"""Pickles in torch's format before zip: magic number, version, a dictionary, the object, tensor names."""


class UnreadableError(ValueError):
    """The file is not a pickle of one object, or is too large."""


@dataclass(eq=False)
class Opaque:
    """A value that only unpickling would create."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: dict[Any, Any] = field(default_factory=dict)


_MARK = object()


def attributes(path: Path) -> tuple[str, dict[str, Any]]:
    """(class, attribute -> plain value) of the one object in the file; other values are left out.

    Raises:
        UnreadableError: the file is damaged, too large, or has no object with attributes.
    """
    try:
        found = _object(_bytes(path))
    except (
        OSError,
        zipfile.BadZipFile,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        EOFError,
        RecursionError,
    ) as error:
        raise UnreadableError(f"{path.name}: {error}") from None
    state = {str(key): _plain(value) for key, value in found.state.items()}
    return found.name, {key: value for key, value in state.items() if not isinstance(value, Opaque)}


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > 4 * MAX_BYTES:
        raise UnreadableError("too large")
    if not zipfile.is_zipfile(path):
        return path.read_bytes()[: MAX_BYTES + 1]
    with zipfile.ZipFile(path) as archive:
        names = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if len(names) != 1 or names[0].file_size > MAX_BYTES:
            raise UnreadableError("not an archive of one small object")
        with archive.open(names[0]) as file:
            return file.read(MAX_BYTES + 1)


def _object(data: bytes) -> Opaque:
    if len(data) > MAX_BYTES:
        raise UnreadableError("too large")
    stream = io.BytesIO(data)
    for _ in range(MAX_PICKLES):
        if stream.tell() >= len(data):
            break
        found = _walk(stream)
        if isinstance(found, Opaque) and found.state:
            return found
    raise UnreadableError("no object with attributes")


def _walk(stream: io.BytesIO) -> Any:
    """The value of one pickle; what unpickling would create stays `Opaque`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise UnreadableError("too many opcodes")
        name = opcode.name
        if name == "STOP":
            return stack[-1]
        _step(name, argument, stack, memo)
    raise UnreadableError("cut off")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in ("PROTO", "FRAME"):
        return
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _FRESH:
        stack.append(_FRESH[name]())
    elif name == "MARK":
        stack.append(_MARK)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[int(argument)] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[int(argument)])
    elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
        items = _since_mark(stack)
        stack.append(_pairs(items) if name == "DICT" else items if name == "LIST" else tuple(items))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        size = int(name[-1])
        stack[-size:] = [tuple(stack[-size:])]
    elif name in ("APPEND", "APPENDS", "ADDITEMS"):
        items = [stack.pop()] if name == "APPEND" else _since_mark(stack)
        if isinstance(stack[-1], list):
            stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _since_mark(stack)
        target = stack[-1].state if isinstance(stack[-1], Opaque) else stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        parts = str(argument).split(" ") if name == "GLOBAL" else [str(stack.pop(-2)), str(stack.pop())]
        stack.append(Opaque(".".join(parts)))
    elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        taken = [stack.pop() for _ in range(3 if name == "NEWOBJ_EX" else 2)]
        _call(stack, taken[-1], taken[-2])
    elif name in ("OBJ", "INST"):
        items = _since_mark(stack)
        stack.append(Opaque(str(argument or (items and getattr(items[0], "name", "")))))
    elif name == "BUILD":
        _build(stack.pop(), stack[-1])
    elif name in ("PERSID", "BINPERSID"):
        if name == "BINPERSID":
            stack.pop()
        stack.append(Opaque("a tensor's storage"))
    elif name in ("POP", "POP_MARK"):
        _ = stack.pop() if name == "POP" else _since_mark(stack)
    elif name == "DUP":
        stack.append(stack[-1])
    elif name in ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"):
        raise UnreadableError(f"opcode {name}")
    else:  # all others push their argument: numbers, strings, bytes
        stack.append(argument)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}


def _since_mark(stack: list[Any]) -> list[Any]:
    place = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {key: value for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, (str, int))}


def _call(stack: list[Any], called: Any, arguments: Any) -> None:
    """Push the result of a call: an object of the called class, or of the class given to a constructor."""
    given = arguments if isinstance(arguments, tuple) else ()
    name = called.name if isinstance(called, Opaque) else "something"
    if name.startswith(("copyreg.", "copy_reg.")) and given and isinstance(given[0], Opaque):
        name = given[0].name
    stack.append(Opaque(name, given))


def _build(state: Any, target: Any) -> None:
    """Set attributes from a dict, or from (dict, slots)."""
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict) and isinstance(target, Opaque):
            target.state.update(part)


def _plain(value: Any, depth: int = 0, room: list[int] | None = None) -> Any:
    """Strings, numbers, lists and dicts; an enum as its value; all others, and what exceeds the limits, stay opaque."""
    room = [MAX_VALUES] if room is None else room
    room[0] -= 1
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Opaque):
        is_enum = len(value.arguments) == 1 and isinstance(value.arguments[0], (str, int)) and not value.state
        return value.arguments[0] if is_enum else value
    if depth >= MAX_DEPTH or room[0] < len(value if isinstance(value, (list, tuple, dict)) else ()):
        return Opaque("too much")
    if isinstance(value, (list, tuple)):
        return [one for one in (_plain(item, depth + 1, room) for item in value) if not isinstance(one, Opaque)]
    if isinstance(value, dict):
        found = {key: _plain(item, depth + 1, room) for key, item in value.items()}
        return {key: item for key, item in found.items() if not isinstance(item, Opaque)}
    return Opaque("something")
