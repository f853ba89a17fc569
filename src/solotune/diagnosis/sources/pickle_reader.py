"""Read the attributes of a pickled object without running it: `training_args.bin` of an untrusted source.

    attributes(Path("output/training_args.bin"))  ->  ("trl...SFTConfig", {"learning_rate": 2e-5, ...})

Unpickling calls any function that the file names. This module walks the opcodes with `pickletools.genops`, which only
decodes them, and keeps a stack of plain values. Everything that would be called or imported becomes an `Opaque` with
its name and arguments: an enum is read by its value, a tensor or a device stays opaque.

A pickle of a few bytes can describe a value of terabytes, because parts are shared: `t = (); t = (t, t)`, thirty times.
So nothing here is copied or made into text as a whole: names have to be strings, and a value is unfolded only within
limits of depth, number and length. Bytes, opcodes, items and attributes are limited before that.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solotune.regular_files import read_bytes

MAX_BYTES = 1 << 20
"""Training arguments are a few kilobytes."""
MAX_OPCODES = 50_000
MAX_ATTRIBUTES = 2_000
"""TrainingArguments has some 150, subclasses have up to 300."""
MAX_DEPTH, MAX_VALUES, MAX_TEXT = 4, 20_000, 10_000
"""Limits of depth, of values in all attributes (lists may contain each other many times), and of one text."""
MAX_NAME = 500
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
    except UnreadableError:
        raise
    except OSError as error:
        raise UnreadableError(error.strerror or "an error of the disk") from None
    # genops, zipfile and the stack raise errors of a dozen classes for damage; their text may hold any of the values
    except Exception as error:
        raise UnreadableError(f"not a whole pickle ({type(error).__name__})") from None
    if len(found.state) > MAX_ATTRIBUTES:
        raise UnreadableError(f"more than {MAX_ATTRIBUTES:,} attributes")
    room = [MAX_VALUES]
    state = {
        key: _plain(value, 0, room)
        for key, value in found.state.items()
        if isinstance(key, str) and len(key) <= MAX_NAME
    }
    return found.name, {key: value for key, value in state.items() if not isinstance(value, Opaque)}


def _bytes(path: Path) -> bytes:
    content = io.BytesIO(read_bytes(path, MAX_BYTES))
    if not zipfile.is_zipfile(content):
        return content.getvalue()
    with zipfile.ZipFile(content) as archive:
        names = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if len(names) != 1 or names[0].file_size > MAX_BYTES or names[0].compress_type != zipfile.ZIP_STORED:
            raise UnreadableError("not an archive of one small object, as torch saves it")
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
    work = 0
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "STOP":
            return stack[-1]
        work += 1 + (_attributes_in(stack[-1]) if name == "BUILD" else 0)
        if work > MAX_OPCODES:
            raise UnreadableError("too many opcodes")
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
        parts = argument.split(" ") if name == "GLOBAL" else [stack.pop(-2), stack.pop()]
        if not all(isinstance(part, str) and len(part) <= MAX_NAME for part in parts):
            raise UnreadableError("a name that is not a short text")
        stack.append(Opaque(".".join(parts)))
    elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        taken = [stack.pop() for _ in range(3 if name == "NEWOBJ_EX" else 2)]
        _call(stack, taken[-1], taken[-2])
    elif name in ("OBJ", "INST"):
        items = _since_mark(stack)
        first = items[0] if items else None
        found = argument if isinstance(argument, str) else first.name if isinstance(first, Opaque) else ""
        stack.append(Opaque(found[: 2 * MAX_NAME]))
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


_GETATTR = ("builtins.getattr", "__builtin__.getattr")
"""Python 3.11.0 to 3.11.3 write an enum as an attribute of its class; transformers' values are their names in small
letters."""
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
    if name in _GETATTR and len(given) == 2 and isinstance(given[0], Opaque) and isinstance(given[1], str):
        name, given = given[0].name, (given[1].lower(),)
    stack.append(Opaque(name, given))


def _attributes_in(state: Any) -> int:
    """How many attributes a BUILD sets; the same large dict can be used again and again."""
    parts = state if isinstance(state, tuple) else (state,)
    return len(parts) + sum(len(part) for part in parts if isinstance(part, dict))


def _build(state: Any, target: Any) -> None:
    """Set attributes from a dict, or from (dict, slots)."""
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict) and isinstance(target, Opaque):
            target.state.update(part)


def _plain(value: Any, depth: int = 0, room: list[int] | None = None) -> Any:
    """Strings, numbers, lists and dicts; an enum as its value; all others, and what exceeds the limits, stay opaque."""
    room = [MAX_VALUES] if room is None else room
    room[0] -= 1
    if isinstance(value, str):
        is_text = len(value) <= MAX_TEXT and not re.search("[\ud800-\udfff]", value)
        return value if is_text else Opaque("a long or damaged text")
    if isinstance(value, int):
        return value if abs(value) < 1 << 64 else Opaque("a large number")
    if isinstance(value, (float, type(None))):
        return value
    if isinstance(value, Opaque):
        is_enum = len(value.arguments) == 1 and isinstance(value.arguments[0], (str, int)) and not value.state
        return _plain(value.arguments[0], depth, room) if is_enum else value
    if depth >= MAX_DEPTH or room[0] < len(value if isinstance(value, (list, tuple, dict)) else ()):
        return Opaque("too much")
    if isinstance(value, (list, tuple)):
        return [one for one in (_plain(item, depth + 1, room) for item in value) if not isinstance(one, Opaque)]
    if isinstance(value, dict):
        found = {key: _plain(item, depth + 1, room) for key, item in value.items() if _plain(key) is key}
        return {key: item for key, item in found.items() if not isinstance(item, Opaque)}
    return Opaque("something")
