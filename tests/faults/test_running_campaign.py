"""A sample of the campaign: the real command line in processes of its own, stopped, hung and unheard."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback

import pytest

from bench import faults
from bench.faults_command import STAGES, Child, Commands, stage_times, stages_in


@pytest.mark.skipif(sys.platform != "linux", reason="signals of the kernel, /dev/full, /proc")
@pytest.mark.timeout(1800)
def test_a_sample_of_the_campaign_has_nothing_bad(tmp_path, monkeypatch):
    """In a fork of this process, which has imported torch; the limit leaves room for a machine that does other things."""
    monkeypatch.setattr(sys, "argv", ["bench.faults", "--only", "stop,second,hang,output"])
    shown = tmp_path / "shown.txt"
    shown.touch()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:  # stays in here
        code = 99
        try:
            for number in (1, 2):
                os.dup2(os.open(shown, os.O_WRONLY | os.O_APPEND), number)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            code = faults.main()
        finally:
            traceback.print_exc()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = shown.read_text()
    rows = re.findall(r"^(\w[\w ]+): (\d+) injected, (\d+) bad", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["stop signals", "second signals", "hangs", "clock and output"], text
    assert all(int(count) > 0 and bad == "0" for _, count, bad in rows), text
    assert code == 0


OUTPUT = "".join(f"{stage}  → ½ {number}\n" for number, stage in enumerate(STAGES)).encode()


def test_stages_are_seen_wherever_a_growing_output_ends():
    """Also within a character."""
    seen = [stages_in(OUTPUT[:length]) for length in range(len(OUTPUT) + 1)]
    assert [*map(len, seen)] == sorted(map(len, seen))
    assert seen[-1] == [*STAGES]


class Writing(Commands):
    """Its child writes `OUTPUT` byte by byte, or some of it, and ends."""

    length = len(OUTPUT)

    def start(self, arguments, before=None, stdout=None):
        def write():
            for place in range(self.length):
                os.write(1, OUTPUT[place : place + 1])
                time.sleep(0.002)
            os._exit(0)

        return Child(self.folder, arguments, write, None)


def test_times_of_stages_are_taken_while_the_output_is_written(tmp_path):
    work = Writing(tmp_path)
    work.config = tmp_path / "run.yaml"
    times = stage_times(work)
    assert len(times) == len(STAGES) + 2
    assert times == sorted(times) and times[0] == 0.0


def test_a_stage_that_never_begins_is_not_waited_for_longer_than_its_process_lives(tmp_path):
    work = Writing(tmp_path)
    work.length = OUTPUT.index(b"training")
    child = work.start(["train"])
    child.await_stage(len(STAGES))
    assert child.wait().stage == "trying the largest step"
