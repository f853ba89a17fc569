"""A sample of the campaign: the real command line in processes of its own, stopped, hung and unheard."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="signals of the kernel, /dev/full, /proc")
def test_a_sample_of_the_campaign_has_nothing_bad():
    command = [sys.executable, "-m", "bench.faults", "--only", "stop,second,hang,output"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    rows = re.findall(r"^(\w[\w ]+): (\d+) injected, (\d+) bad", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["stop signals", "second signals", "hangs", "clock and output"]
    assert all(int(count) > 0 and bad == "0" for _, count, bad in rows), done.stdout + done.stderr
    assert done.returncode == 0
