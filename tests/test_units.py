"""Bytes, seconds and errors in words."""

from __future__ import annotations

import math
import sys

import pytest

from solotune.units import (
    escape_terminal,
    first_line,
    format_bytes,
    format_duration,
    format_rate,
    format_step_time,
    gib,
    mib,
    plus_minus,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (151, "2:31"), (11045, "3:04:05"), (172_799, "47:59:59"), (597_424, "6 days 21 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_large_and_small_speeds_stay_readable() -> None:
    """A 70B model on a CPU was `2.39e+04 s, 0 tokens/s`."""
    assert [format_step_time(seconds) for seconds in (0.0421, 3.8, 59.0, 23_900)] == [
        "0.0421 s",
        "3.8 s",
        "59 s",
        "6:38:20",
    ]
    assert [format_rate(rate) for rate in (17_209.4, 12.3, 2.74, 0.34)] == [
        "17,209 tokens/s",
        "12 tokens/s",
        "2.7 tokens/s",
        "0.34 tokens/s",
    ]


@pytest.mark.parametrize(
    ("count", "digits", "text"),
    [
        (0, 1, "0 MiB"),
        (2**30 - 1, 2, "1,024 MiB"),
        (2**30, 1, "1.0 GiB"),
        (int(23.46 * 2**30), 1, "23.5 GiB"),
        (int(23.46 * 2**30), 2, "23.46 GiB"),
        (1500 * 2**30, 1, "1,500.0 GiB"),
    ],
)
def test_bytes(count: int, digits: int, text: str) -> None:
    assert format_bytes(count, digits) == text


def test_numbers_of_one_unit() -> None:
    assert (gib(80 * 2**30), gib(2**29, 0), gib(10**12)) == ("80.0", "0", "931.3")
    assert (mib(2**19), mib(3 * 2**30, 0)) == ("0.5", "3,072")


@pytest.mark.parametrize(
    ("error", "line", "with_type"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (ValueError("\n  one  \r\ntwo"), "one", "ValueError: one"),
        (ValueError(" \n"), "ValueError", "ValueError"),
        (KeyError("a"), "'a'", "KeyError: 'a'"),
    ],
)
def test_first_lines(error: Exception, line: str, with_type: str) -> None:
    assert first_line(error) == line
    assert first_line(error, with_type=True) == with_type


def test_a_single_rows_unknown_error_is_left_out() -> None:
    assert plus_minus(1.5, 0.25) == "1.5000 ± 0.2500"
    assert [plus_minus(1.5, error) for error in (math.inf, math.nan, None)] == ["1.5000"] * 3


def test_inert_text_can_be_encoded_and_steers_nothing() -> None:
    everything = [chr(code) for code in range(sys.maxunicode + 1)]
    shown = escape_terminal("".join(everything))
    shown.encode()
    assert len(shown) == len(everything)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]
    directions = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert not set(shown) & set(directions)
    ordinary = "Zoë 日本語 🙂 [bold] {} \n\t\u200d"
    assert escape_terminal(ordinary) == ordinary
