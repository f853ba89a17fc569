"""The fault tests bite: each protection taken away is noticed, and with all of them in place nothing is.

A kill is a small piece of the campaign (`bench/faults.py`); it returns what went wrong.
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import metrics_of

from bench import faults
from bench.faults_power import Disk, states_now
from bench.faults_run import KILLED
from bench.faults_starts import contend
from bench.faults_verify import flip, mutations
from solotune.run.manifest import MANIFEST, entry_at, manifest_text, read_manifest
from solotune.run.run_dir import RunDirectory
from solotune.training.verify_run import verify
from tests.faults.mutants import MUTANTS, applied


def listed(*problems):
    return [problem for problem in problems if problem]


def kill_at(work, chosen, resume=False):
    """Kills where `chosen(kind, path)` says, a write in its middle."""

    def hook(kind, path, content):
        if chosen(kind, path):
            if kind == "write":
                with path.open("ab") as file:
                    file.write(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    assert work.once(resume, hook).code == KILLED


def killed_after_a_save(work):
    faults.until_step(work, 6)
    return listed(work.what_is_wrong(4))


def killed_in_a_save(work):
    kill_at(work, lambda kind, path: kind == "write" and "step-000004" in str(path) and "optimizer" in path.name)
    damaged = work.damaged_checkpoints()
    return listed(f"damaged: {damaged}" if damaged else None, work.what_is_wrong(2))


def killed_at_data_json(work):
    kill_at(work, lambda kind, path: kind == "write" and "data.json" in path.name)
    return listed(work.what_is_wrong())


def _cut(work, moment, seeds=(0,)):
    """A power cut after the operation of the number that `moment` finds in the trace."""
    trace, outcome = work.traced()
    assert outcome.code == 0, outcome.said
    done = moment(trace) + 1
    disk = Disk()
    for operation in trace[:done]:
        disk.do(operation)
    problems = []
    for seed in seeds:
        for _ in states_now(done, disk, work.folder, work.run.name, seed):
            problems.append(faults.after_power(work, work.claimed(trace[:done])))
    return listed(*problems)


def _first(trace, kind, part):
    return next(n for n, done in enumerate(trace) if done.kind == kind and part in done.path.encode() + done.content)


def cut_from_power(work):
    """After a checkpoint was said to be saved."""
    return _cut(work, lambda trace: _first(trace, "write", b'"save", "step": 4'))


def cut_from_power_in_retention(work):
    return _cut(work, lambda trace: _first(trace, "rmdir", b"step-000002.removed") - 1, seeds=range(4))


def cut_from_power_at_data_json(work):
    return _cut(work, lambda trace: _first(trace, "rename", b"data.json.partial"), seeds=range(4))


def lied_to(work):
    def lie(kind, path, content):
        if kind == "fsync" and path.name == "optimizer.safetensors" and "step-000006" in str(path):
            flip(random.Random(0), path)

    code = work.once(False, lie).code
    return listed(f"exit code {code}" if code != faults.STORAGE_ERROR else None, work.what_is_wrong(4))


def out_of_room(work):
    number = _first(work.trace, "write", b'"step", "step": 5')
    ended = work.once(False, faults.refusing(work, number, faults.errno.ENOSPC, True))
    return listed(faults.after_error(work, ended.code, ended.said, 4))


def contended_for(work):
    return listed(contend(work, 6))


def rotten(work):
    faults.until_step(work, 6)
    flip(random.Random(0), work.run / "checkpoints" / "step-000004" / "optimizer.safetensors")
    problem = work.what_is_wrong(2)
    resumed = [event["step"] for event in metrics_of(RunDirectory(work.run)) if event["event"] == "resume"]
    return listed(problem, None if resumed == [2] else f"went on from {resumed}")


def ahead_of_metrics(work):
    faults.until_step(work, 6)
    faults.cut_below_mark(random.Random(0), work.run / "metrics.jsonl")
    return listed(work.what_is_wrong(2))


def changed(work):
    """Another config, other rows, another base: each refused, exit code 5."""
    faults.until_step(work, 4)
    ready, codes = work.ready, {}
    report = ready.prepared.report
    weights = work.folder / "model" / "model.safetensors"
    content = weights.read_bytes()
    try:
        work.ready = replace(ready, config=ready.config.replaced("test", weight_decay=0.1))
        codes["config"] = work.once(resume=True).code
        work.ready = ready
        rows, report.train_sha256 = report.train_sha256, "0" * 64
        codes["rows"] = work.once(resume=True).code
        report.train_sha256 = rows
        weights.write_bytes(content[:-2048] + bytes(2048))
        codes["base"] = work.once(resume=True).code
    finally:
        work.ready = ready
        weights.write_bytes(content)
    return [f"{what} changed: exit code {code}" for what, code in codes.items() if code != 5]


def damaged(work):
    """Random damage to a finished run; and a manifest that was only written otherwise."""
    assert work.once(False).code == 0
    missed = [f"{name}: {problem}" for name, problem in mutations(work.run, 50, 0) if problem]
    manifest = work.run / "adapter" / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace("\n ", "\n\t", 1))
    (work.run / MANIFEST).write_text(manifest_text(read_manifest(work.run / MANIFEST) | _entry(work, manifest)))
    return missed + listed(None if not verify(work.run).ok else "a manifest that no run writes is believed")


def _entry(work, path):
    return {path.relative_to(work.run).as_posix(): entry_at(path)}


def not_finite(work):
    """A NaN with a perfect manifest, as a run would leave that wrote it."""
    assert work.once(False).code == 0
    folder = work.run / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    entries = read_manifest(folder / MANIFEST)
    entries["adapter_model.safetensors"] = entry_at(folder / "adapter_model.safetensors")
    (folder / MANIFEST).write_text(manifest_text(entries))
    RunDirectory(work.run).write_manifest()
    problems = [problem for problem in verify(work.run).problems if "not finite" in problem.problem]
    return listed(None if problems else "a NaN is not seen")


KILLS = sorted({mutant.kill for mutant in MUTANTS})


@pytest.mark.parametrize("kill", KILLS)
def test_with_every_protection_nothing_is_wrong(kill, work):
    assert globals()[kill](work) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_without_a_protection_something_is(mutant, work):
    with applied(mutant):
        assert globals()[mutant.kill](work)
