"""A sample of the campaign: the real command line in processes of its own, stopped, hung and unheard."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.faults_command import STAGES, Child, Commands, stage_times, stages_in

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="signals of the kernel, /dev/full, /proc")
@pytest.mark.timeout(1800)
def test_a_sample_of_the_campaign_has_nothing_bad():
    """Half a minute of the processor: the limit is for a hang, and leaves room for a machine that does other things."""
    command = [sys.executable, "-m", "bench.faults", "--only", "stop,second,hang,output"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    rows = re.findall(r"^(\w[\w ]+): (\d+) injected, (\d+) bad", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["stop signals", "second signals", "hangs", "clock and output"]
    assert all(int(count) > 0 and bad == "0" for _, count, bad in rows), done.stdout + done.stderr
    assert done.returncode == 0


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
