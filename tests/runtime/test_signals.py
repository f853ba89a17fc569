"""Stop requests by themselves: at once, held back, lost in a destructor, twice."""

# ruff: noqa: PT012 - what is raised comes out of several statements here

from __future__ import annotations

import os
import signal
import time

import pytest

from solotune.runtime import signals
from solotune.runtime.signals import StopRequested


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_is_raised_at_once_where_nothing_holds_it_back(number):
    before = signal.getsignal(number)
    with signals.handle_signals(), pytest.raises(StopRequested) as caught:
        send(number)
        time.sleep(5)
        pytest.fail("went on")
    assert caught.value.number == number
    assert signal.getsignal(number) == before


def test_held_back_it_waits_for_a_poll_and_is_raised_once():
    done = []
    with signals.handle_signals(), pytest.raises(StopRequested), signals.defer_signals():
        send()
        done.append("went on")
        with signals.defer_signals():
            done.append("inner")
        signals.check_stop()
        done.append("too far")
    assert done == ["went on", "inner"]
    signals.check_stop()  # outside, nobody is asked


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "Ctrl-C: stopping as soon as it is safe. Press it again to stop at once, without saving.\n"),
        (signal.SIGTERM, "SIGTERM: stopping as soon as it is safe. Send it again to stop at once, without saving.\n"),
    ],
)
def test_a_stop_that_has_to_wait_is_announced(number, said, capfd):
    with signals.handle_signals(True), pytest.raises(StopRequested), signals.defer_signals():
        send(number)
        assert capfd.readouterr().err == said


def test_where_nothing_is_to_be_saved_the_announcement_says_nothing_of_it(capfd):
    """`solotune watch`, say: a run of another process goes on."""
    with signals.handle_signals(True), pytest.raises(StopRequested):
        send(signal.SIGINT)
    assert capfd.readouterr().err == "Ctrl-C: stopping. Press it again to stop at once.\n"


def test_what_nobody_polled_for_is_raised_at_the_end():
    with signals.handle_signals(), pytest.raises(StopRequested):
        with signals.defer_signals():
            send()
        pytest.fail("went on")


def test_an_interruption_lost_in_a_destructor_is_raised_by_the_next_poll(capsys):
    class Deaf:
        def __del__(self):
            send()
            time.sleep(0.01)

    with signals.handle_signals(), pytest.raises(StopRequested):
        deaf = Deaf()
        del deaf
        signals.check_stop()
        pytest.fail("went on")
    assert capsys.readouterr().err == ""


def test_the_second_is_the_callers_own():
    seen, before = [], signal.signal(signal.SIGTERM, lambda *_: seen.append("caller"))
    try:
        with signals.handle_signals(), signals.defer_signals():
            send()
            send()
            assert seen == ["caller"]
            with pytest.raises(StopRequested):
                signals.check_stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_torchruns_echo_of_a_signal_is_not_a_second_one():
    own = signals.handle_signals(True, has_launcher=True, is_quiet=True)
    with own, pytest.raises(StopRequested), signals.defer_signals():
        send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        signals.check_stop()


def test_another_thread_can_ask_for_a_stop():
    class Why(StopRequested):
        pass

    with signals.handle_signals(), pytest.raises(Why):
        signals.request_stop(Why(signal.SIGTERM))
        signals.request_stop(StopRequested(signal.SIGINT))  # later: what was first is the reason
        signals.check_stop()
    signals.check_stop()
