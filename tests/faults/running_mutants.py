"""The protections of a run at work, each removed once, and the tests that must then fail.

    python tests/faults/running_mutants.py        applies each to the source, runs its tests, puts the source back

`(file, what stands there, what is put in its place, the tests that kill it)`. A mutant that survives is a protection
without a test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "solotune"
FINITE, BEFORE = "tests/training/test_nonfinite.py", "tests/faults/test_running_before.py"
SIGNALS = "tests/runtime/test_signals.py"
HANGS = "tests/runtime/test_watchdog.py"
CAMPAIGN = "tests/faults/test_running_campaign.py"
TRAINING = "tests/training/test_loop.py"

MUTANTS: list[tuple[str, str, str, str]] = [
    ("training/loop.py", ", *nonfinite.norms(model, optimizer)]", "]", f"{FINITE} -k site"),
    ("training/loop.py", "if not nonfinite.all_finite([loss, norm, *state]):", "if loss != loss:", f"{FINITE} -k site"),
    (
        "training/loop.py",
        "if problem := nonfinite.nonfinite_tensors(self.model, self.optimizer):",
        "if problem := []:",
        f"{FINITE} -k update",
    ),
    ("training/loop.py", "            checkpoint.restore_random(random)\n", "", f"{TRAINING} -k mid_step"),
    ("training/loop.py", "            model.zero_gradients()\n", "", f"{TRAINING} -k mid_step"),
    (
        "training/loop.py",
        "        if done > saves.newest:\n            saves.make(done)\n",
        "",
        f"{TRAINING} -k signal",
    ),
    (
        "training/loop.py",
        "and not any(e.step == step for e in record.evals)",
        "and any(e.step == step for e in record.evals)",
        f"{TRAINING} -k evaluation_that_was_stopped",
    ),
    ("training/nonfinite.py", "LARGEST = 1e30", 'LARGEST = float("inf")', f"{FINITE} -k site"),
    (
        "training/nonfinite.py",
        "    checkpoint.restore_random(random)\n    total_weight",
        "    total_weight",
        f"{FINITE} -k chance",
    ),
    ("training/nonfinite.py", '"transient" if is_sound and not broken', '"transient" if is_sound', f"{FINITE} -k site"),
    (
        "training/nonfinite.py",
        "    broken = nonfinite_tensors(model, optimizer)\n",
        "    broken = []\n",
        f"{FINITE} -k site",
    ),
    ("runtime/signals.py", "        if not self.is_held_back:\n", "        if False:\n", f"{SIGNALS} -k at_once"),
    (
        "runtime/signals.py",
        "            signal.signal(each, signal.SIG_DFL if self.is_ours else handler)",
        "            pass",
        f"{SIGNALS} -k second",
    ),
    ("runtime/watchdog.py", "        self.set_limit(LIMIT_SECONDS)\n", "", CAMPAIGN),
    ("runtime/watchdog.py", "        os._exit(EXIT_CODE)\n", "        pass\n", HANGS),
    ("runtime/watchdog_process.py", "    os.kill(pid, signal.SIGKILL)\n", "", HANGS),
    ("display/observer.py", "        except SystemExit:", "        except ZeroDivisionError:", CAMPAIGN),
    ("training/disk_space.py", "    if free >= need.total:\n", "    if True:\n", f"{BEFORE} -k too_small"),
    ("training/disk_space.py", "config.save_total_limit + 1)", "config.save_total_limit)", f"{BEFORE} -k said_to_take"),
    ("training/disk_space.py", "max(most - existing,", "max(most,", f"{BEFORE} -k resumed"),
    (
        "api/setup.py",
        "    disk_space.require_writable(_folder_of(config.output_dir))\n",
        "",
        f"{BEFORE} -k takes_no_files",
    ),
    (
        "api/setup.py",
        "    doctor.require_hardware(machine",
        "    (lambda *_, **__: None)(\n",
        f"{BEFORE} -k bitsandbytes_that",
    ),
    ("api/train.py", "    doctor.require_torch()\n", "", f"{BEFORE} -k address_space"),
]


def survives(file: str, there: str, instead: str, tests: str) -> str | None:
    """What speaks for the mutant: its tests pass, or its place is not there; None where it is killed."""
    path = SOURCE / file
    text = path.read_text(encoding="utf-8")
    if text.count(there) != 1:
        return f"its place is there {text.count(there)} times"
    path.write_text(text.replace(there, instead), encoding="utf-8")
    try:
        variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    return {0: "its tests pass", 1: None}.get(done.returncode, f"pytest ended with {done.returncode}")


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant[0] in sys.argv[1:]]
    alive = 0
    for mutant in chosen:
        why = survives(*mutant)
        alive += why is not None
        print(f"{'killed' if why is None else 'ALIVE: ' + why:32} {mutant[0]:18} {mutant[1].strip()[:60]}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
