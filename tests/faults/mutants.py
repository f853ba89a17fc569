"""Protections taken away, one at a time; the campaign must turn red under each.

A mutant is one or several edits of a function's source: made in the running process, so that the forks of the campaign
have it, and undone after. `kill` names the part that finds it. An edit whose old text is no longer there is an error,
so this list cannot fall behind the code in silence.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple


class Edit(NamedTuple):
    where: str  # module:function, below solotune
    old: str
    new: str


class Mutant(NamedTuple):
    name: str
    kill: str  # a function of test_mutants.py
    edits: list[Edit]


MUTANTS = [
    # --- writing
    Mutant("folders are not synced", "cut_from_power", [
        Edit("run.fs_ops:sync_folder", 'say("sync_folder", folder)', "return")]),
    Mutant("files are not synced", "cut_from_power", [Edit("run.fs_ops:fsync", 'say("fsync", path)', "return")]),
    Mutant("a file is renamed before it is synced", "cut_from_power_at_data_json", [
        Edit("run.atomic_io:_write_new", "fs_ops.fsync(", "path.name.endswith(PARTIAL) or fs_ops.fsync("),
        Edit("run.atomic_io:write_whole", "rename(temporary, path)", "rename(temporary, path); sync(path)")]),
    Mutant("a file is written in its place", "killed_at_data_json", [
        Edit("run.atomic_io:write_whole", "_write_new(temporary, ", "fs_ops.unlink(path); _write_new(path, "),
        Edit("run.atomic_io:write_whole", "fs_ops.rename(temporary, path)", "pass")]),
    Mutant("a checkpoint is written in its place", "killed_in_a_save", [
        Edit("run.atomic_io:whole_folder", 'target.with_name(f".{target.name}{PARTIAL}")', "target"),
        Edit("run.atomic_io:whole_folder", "if target.exists():", "if False:"),
        Edit("run.atomic_io:whole_folder", "fs_ops.rename(partial, target)", "pass")]),
    Mutant("a checkpoint's rename is not synced", "cut_from_power", [
        Edit("run.atomic_io:whole_folder", "fs_ops.sync_folder(target.parent)", "pass")]),
    Mutant("a removed checkpoint may come back in part", "cut_from_power_in_retention", [
        Edit("run.atomic_io:_set_aside", "fs_ops.sync_folder(path.parent)", "pass")]),
    Mutant("a checkpoint is not read back", "lied_to", [
        Edit("run.atomic_io:whole_folder", "for file, problem in check.problems():", "for file, problem in ():")]),
    Mutant("retention keeps the oldest", "killed_in_a_save", [
        Edit("training.checkpoint:keep_newest", "found[: -limit if limit else 0]", "found[limit:] if limit else []")]),
    Mutant("metrics are not synced before a checkpoint counts them", "cut_from_power", [
        Edit("run.run_dir:RunDirectory.metrics_offset", "atomic_io.sync(self._metrics)", "pass")]),
    Mutant("half a line stays when the disk is full", "out_of_room", [
        Edit("run.atomic_io:append_line", "fs_ops.truncate(handle, path, size)", "pass")]),
    Mutant("the half made is not swept away", "killed_at_data_json", [
        Edit("run.atomic_io:sweep", "with storage_errors", "return\n    with storage_errors")]),
    Mutant("the lock is not taken", "contended_for", [
        Edit("run.atomic_io:take_lock", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass")]),
    # --- going on
    Mutant("manifests are not checked", "rotten", [
        Edit("training.checkpoint:invalid_reason", "for file, problem in check_folder(folder):", "for file, problem in ():")]),
    Mutant("metrics are not compared with the mark", "ahead_of_metrics", [
        Edit("run.run_dir:RunDirectory.metrics_mismatch", 'if there < mark["bytes"]:', "return None\n    if there < 0:")]),
    Mutant("metrics are not cut back", "killed_after_a_save", [
        Edit("run.run_dir:RunDirectory.truncate_metrics", "atomic_io.cut_back(", "(lambda *_: None)(")]),
    Mutant("the adapter is not restored", "killed_after_a_save", [
        Edit("model.lora:load_state_dict", "part.data.copy_(tensors[key])", "pass")]),
    Mutant("the optimizer is not restored", "killed_after_a_save", [
        Edit("training.checkpoint:restore_optimizer", "state: dict[int, dict[str, Any]] = {}", "return\n    state = {}")]),
    Mutant("the optimizer's step is not restored", "killed_after_a_save", [
        Edit("training.checkpoint:restore_optimizer", "state.setdefault(int(index), {})[name] = value",
             'state.setdefault(int(index), {})[name] = value * 0 if name == "step" else value')]),
    Mutant("the random states are not restored", "killed_after_a_save", [
        Edit("training.checkpoint:restore_random", 'if "cpu" in states:', "if False:")]),
    Mutant("the row cursor is not restored", "killed_after_a_save", [
        Edit("dataset.sampler:BatchSampler.steps", "range(done, self.total_steps)", "range(0, self.total_steps - done)")]),
    Mutant("the schedule is not restored", "killed_after_a_save", [
        Edit("training.loop:train", "learning_rate_at(config.schedule, step - 1,", "learning_rate_at(config.schedule, step - 1 - done,")]),
    Mutant("another config is continued", "changed", [
        Edit("training.resume:compare", "if key not in inexact:", "if False:")]),
    Mutant("other rows are continued", "changed", [
        Edit("training.resume:compare", 'if then["train_rows"] != now["train_rows"]:', "if False:")]),
    Mutant("another base is continued", "changed", [
        Edit("training.resume:compare", 'check_base(then["base"], now["base"], where)', "pass")]),
    # --- verify
    Mutant("verify looks at sizes alone", "damaged", [
        Edit("run.manifest:differences", "entry_at(path, recorded.bytes) != recorded", "False")]),
    Mutant("verify does not look for what was added", "damaged", [
        Edit("run.manifest:unknown", "return [", "return [] and [")]),
    Mutant("verify believes any manifest", "damaged", [
        Edit("run.manifest:read_manifest", "text != manifest_text(entries)", "False")]),
    Mutant("verify looks at no parameter", "not_finite", [
        Edit("training.verify_run:_tensors", "not bool(torch.isfinite(tensor).all())", "False")]),
]  # fmt: skip


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Within it the protection is gone, in every module that has the function."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for where in dict.fromkeys(edit.where for edit in mutant.edits):
            module_name, _, path = where.partition(":")
            module = importlib.import_module(f"solotune.{module_name}")
            *holders, name = path.split(".")
            holder: Any = module
            for part in holders:
                holder = getattr(holder, part)
            before = holder.__dict__[name]
            changed = _edited(before, [edit for edit in mutant.edits if edit.where == where], module)
            places = [(holder, name)]
            if holder is module:
                loaded = [m for n, m in list(sys.modules.items()) if n.startswith("solotune.") and m is not module]
                places += [(m, key) for m in loaded for key, value in list(vars(m).items()) if value is before]
            for place, key in places:
                undo.append((place, key, before))
                setattr(place, key, changed)
        yield
    finally:
        for place, key, value in reversed(undo):
            setattr(place, key, value)


def _edited(function: Any, edits: list[Edit], module: Any) -> Any:
    inner = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(inner))
    for edit in edits:
        assert edit.old in source, f"{edit.where} no longer holds {edit.old!r}"
        source = source.replace(edit.old, edit.new)
    names = dict(vars(module))
    exec(compile("from __future__ import annotations\n" + source, f"<mutant of {edits[0].where}>", "exec"), names)
    made = names[inner.__name__]
    unwrapped = inspect.unwrap(made)
    # the module's own globals, so that other mutated functions are seen
    result = type(unwrapped)(unwrapped.__code__, vars(module), inner.__name__, inner.__defaults__, inner.__closure__)
    result.__kwdefaults__ = inner.__kwdefaults__
    return contextlib.contextmanager(result) if made is not unwrapped else result
