"""Format bytes, seconds, losses and errors as text, and text for a screen, the same everywhere."""

from __future__ import annotations

# C0 and DEL become control pictures; other characters that control a terminal, have no width or cannot be encoded
# become the replacement sign. Joiners stay: emoji and Indic scripts need them.
_INERT = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_INERT |= dict.fromkeys([0x180E, 0x200B, *range(0x2060, 0x2065), 0xFEFF, *range(0xE0000, 0xE0080)], 0xFFFD)
_INERT |= dict.fromkeys([*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, 0x2028, 0x2029], 0xFFFD)
_INERT |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)], 0xFFFD)


def gib(count: float, digits: int = 1) -> str:
    """Bytes as a number of GiB: `79.0`, for `79.0 of 80.0 GiB`."""
    return f"{count / 2**30:,.{digits}f}"


def mib(count: float, digits: int = 1) -> str:
    """Bytes as a number of MiB."""
    return f"{count / 2**20:,.{digits}f}"


def format_bytes(count: float, digits: int = 1) -> str:
    """`23.4 GiB`, or whole MiB below 1 GiB: `512 MiB`."""
    return f"{gib(count, digits)} GiB" if count >= 2**30 else f"{mib(count, 0)} MiB"


def format_duration(seconds: float) -> str:
    """`0:07`, `12:31`, `3:04:05`; from two days on `6 days 22 h`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 48 * 60:
        return f"{minutes // 1440:,} days {minutes % 1440 // 60} h"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def format_step_time(seconds: float) -> str:
    """`0.0421 s`, `12.3 s`; from a minute on like a duration: `6:38:20`."""
    return f"{seconds:.3g} s" if seconds < 60 else format_duration(seconds)


def format_rate(per_second: float, what: str = "tokens/s") -> str:
    """`17,209 tokens/s`; below 10 with two digits: `0.34 tokens/s`."""
    return f"{per_second:,.0f} {what}" if per_second >= 10 else f"{per_second:.2g} {what}"


def first_line(error: BaseException, with_type: bool = False) -> str:
    """The first line of an error that is not blank; the name of its type if it has no text.

    Args:
        with_type: `ValueError: text`, as in the last line of a traceback.
    """
    name = type(error).__name__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (f"{name}: {line}" if with_type else line) if line else name


def plus_minus(value: float, stderr: float | None) -> str:
    """`1.2345 ± 0.0123`; without the error if it is unknown, as for a single row."""
    known = stderr is not None and 0 <= stderr < float("inf")
    return f"{value:.4f} ± {stderr:.4f}" if known else f"{value:.4f}"


def escape_terminal(text: str) -> str:
    """Replace everything that controls a terminal by a visible sign; line breaks and tabs stay."""
    return text.translate(_INERT)
