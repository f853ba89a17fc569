"""What is refused before a run starts: a disk too small, a machine that cannot; and what dry runs leave alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import chat_rows

import solotune
from solotune.api.train import prepare_run
from solotune.config.load import load_config
from solotune.display.progress import SilentDisplay
from solotune.errors import CheckError
from solotune.hardware import doctor
from solotune.hardware import machine as environment
from solotune.training import checkpoint, disk_space


def used_bytes(folder, block):
    """What the files below take on a disk of such blocks."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // block) * block for size in sizes)


class AtSaves(SilentDisplay):
    """Keeps what the run directory takes whenever a checkpoint has been written, before the oldest is removed."""

    def __init__(self, monkeypatch, block):
        self.most, keep = 0, checkpoint.keep_newest

        def measure(folder, *args):
            self.most = max(self.most, used_bytes(folder, block))
            keep(folder, *args)

        monkeypatch.setattr(checkpoint, "keep_newest", measure)


@pytest.mark.parametrize(
    ("limit", "save_steps", "r"), [(None, 1, 64), (None, 4, 16), (1, 1, 64), (2, 1, 32), (2, 3, 64)]
)
def test_what_a_run_is_said_to_take_is_what_it_takes(chat_config, monkeypatch, limit, save_steps, r):
    """Predicted by real is between 1.00 and 1.10."""
    keys = {**chat_config, "save_steps": save_steps, "save_total_limit": limit, "lora_r": r, "max_steps": 9}
    seen, block = [], 512
    monkeypatch.setattr(disk_space, "block_bytes", lambda folder: block)
    monkeypatch.setattr(disk_space, "require_room", lambda need, folder: seen.append(need))
    watched = AtSaves(monkeypatch, block)
    run = solotune.train(keys, display=watched).run_dir
    (need,) = seen
    outside = used_bytes(run, block) - used_bytes(run / "checkpoints", block)
    assert 1.0 <= need.total / (watched.most + outside) <= 1.10
    assert 1.0 <= need.checkpoint * need.checkpoints / watched.most <= 1.10


def test_a_disk_too_small_is_refused_before_the_first_step(chat_config, monkeypatch, tmp_path):
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 100_000)
    with pytest.raises(CheckError) as caught:
        solotune.train({**chat_config, "save_steps": 1})
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert "0.1 MiB" in text and "6 checkpoints" in text and "save_total_limit: 1" in text
    assert not (tmp_path / "run").exists()


class Killed(BaseException):
    """Past every handler, as a power cut."""


def test_a_resumed_run_needs_no_room_for_what_is_there(chat_config, monkeypatch):
    class Stop(SilentDisplay):
        def saved(self, event, path):
            raise Killed

    keys, seen = {**chat_config, "save_steps": 2}, []
    monkeypatch.setattr(disk_space, "require_room", lambda need, folder: seen.append(need.checkpoints))
    with pytest.raises(Killed):
        solotune.train(keys, display=Stop())
    solotune.train(keys, resume=True)
    assert seen == [3, 2]


SMALL_DISK = """
from solotune import cli
from solotune.training import disk_space
print("asked", cli.main(["train", "run.yaml"]))
disk_space.require_room = lambda need, folder: None
print("unasked", cli.main(["train", "run.yaml"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk is made with a namespace of its own")
@pytest.mark.slow
def test_on_a_real_small_disk_it_is_refused_and_would_have_failed(chat_config, tmp_path):
    """A tmpfs a tenth smaller than the need: refused (3); unasked, the run meets a full disk (8), nothing torn."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    small, script = tmp_path / "small", tmp_path / "train.py"
    small.mkdir()
    script.write_text(SMALL_DISK)
    keys = {**chat_config, "output_dir": str(small / "run"), "save_steps": 1, "lora_r": 64}
    config = load_config(keys)
    ready = prepare_run(config, False, SilentDisplay())
    need = disk_space.need_of(ready.config, ready.model, ready.prepared, ready.tokenizer)
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    mount = f"mount -t tmpfs -o size={int(need.total * 0.9)} none {small}"
    look = f"ls -A {small}/run/checkpoints; tail -c1 {small}/run/metrics.jsonl | od -c | head -1"
    command = f"{mount} && {sys.executable} {script} && {look}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert "asked 3\n" in done.stdout and "unasked 8\n" in done.stdout, done.stdout + done.stderr
    assert "do not fit on the disk" in done.stderr and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\nstep-00000" in done.stdout and ".partial" not in done.stdout
    assert "\\n" in done.stdout.splitlines()[-1]  # the last line of metrics.jsonl is whole


# --- the machine


def test_bitsandbytes_that_does_not_work_is_told_before_anything_is_read(chat_config, monkeypatch, tmp_path):
    def broken(device):
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "_nf4_error", broken)
    (tmp_path / "chats.jsonl").unlink()
    with pytest.raises(CheckError, match="libcudart") as caught:
        solotune.train(chat_config)
    assert "pip install" in caught.value.change and "base_precision: bf16" in caught.value.change


def require_hardware(config, machine):
    doctor.require_hardware(machine, base_precision=config.base_precision, optim=config.optim, use_cpu=config.use_cpu)


def test_a_run_that_needs_no_bitsandbytes_does_not_ask_for_it(chat_config, monkeypatch):
    monkeypatch.setattr(doctor, "_nf4_error", lambda device: pytest.fail("asked"))
    config = load_config({**chat_config, "base_precision": "bf16", "optim": "adamw_torch"})
    require_hardware(config, environment.probe())


@pytest.mark.parametrize(("value", "use_cpu", "refused"), [("", False, True), ("", True, False), (None, False, False)])
def test_a_hidden_gpu_is_not_passed_over(chat_config, monkeypatch, value, use_cpu, refused):
    monkeypatch.setattr(environment, "_nvidia_smi", lambda: ("NVIDIA H100", "570"))
    monkeypatch.setattr(environment, "_torch_facts", lambda: {"cuda_runtime": "12.8", "cuda_error": "no device"})
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    config = load_config({**chat_config, "use_cpu": use_cpu, "base_precision": "bf16", "optim": "adamw_torch"})
    machine = environment.probe()
    if not refused:
        require_hardware(config, machine)
        return
    with pytest.raises(CheckError, match="CUDA_VISIBLE_DEVICES") as caught:
        require_hardware(config, machine)
    assert "CUDA_VISIBLE_DEVICES" in caught.value.change and "use_cpu: true" in caught.value.change


def test_a_place_that_takes_no_files_is_told_before_anything_is_read(chat_config, tmp_path):
    (tmp_path / "chats.jsonl").unlink()
    with pytest.raises(CheckError, match="/proc"):
        solotune.train({**chat_config, "output_dir": "/proc/solotune-run"})


@pytest.mark.parametrize("kib", [300_000, 700_000])
def test_too_little_address_space_is_exit_3_and_says_so(chat_config, tmp_path, kib):
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in chat_config.items()))
    command = f"ulimit -v {kib}; {sys.executable} -m solotune train run.yaml"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    # wherever it runs out: at torch, at a check, or in Python itself
    said = ("torch cannot be imported", "memory does not suffice", "does not have enough memory")
    assert any(one in done.stderr for one in said)
    assert "ulimit -v" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


# --- rows accounted, dry runs pure


ROW = st.one_of(
    st.integers(0, 5).map(lambda i: chat_rows(6)[i]),
    st.just({"messages": []}),
    st.just({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}),
    st.just({"messages": [{"role": "wizard", "content": "hi"}]}),
    st.just({"messages": [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y"}]}),
    st.just({"text": 5}),
    st.text(alphabet="abc ", min_size=1, max_size=40).map(
        lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=3, max_size=25), overflow=st.sampled_from(["truncate", "drop", "split"]))
def test_every_row_read_is_used_or_dropped_for_a_reason(rows, overflow, chat_config, tmp_path):
    good = [{"messages": [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": f"is {i}"}]}
            for i in range(30)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, *rows]))
    keys = {"on_bad_row": "drop", "overflow": overflow, "validation_size": 0, "max_length": 48}
    found = solotune.data({**chat_config, **keys}).report.to_json()
    counted = found["rows"]
    assert counted["read"] == len(rows) + 30 == counted["kept"] + sum(counted["dropped"].values())
    assert found["split"]["train"] == counted["kept"] + counted["added_by_split"]
    assert all(reason and number > 0 for reason, number in counted["dropped"].items())


PURE = """
import os, sys
allowed, written = tuple(sys.argv[1].split(":")), []

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        written.append(f"{event} {args[1:]}")
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        writes = args[1] is not None and set("wax+") & set(args[1]) or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        path = os.path.abspath(os.fsdecode(args[0]))
        if writes and not path.startswith(allowed):
            written.append(path)
    if event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate"):
        path = os.path.abspath(os.fsdecode(args[0]))
        if not path.startswith(allowed):
            written.append(f"{event} {path}")

sys.addaudithook(watch)
from solotune import cli
codes = [cli.main(command.split()) for command in sys.argv[2:]]
print("CODES", codes, file=sys.stderr)
print("WRITTEN", written, file=sys.stderr)
"""


def test_dry_runs_write_nothing_but_caches_and_connect_to_nothing(chat_config, tmp_path):
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in chat_config.items()))
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    scratch.mkdir()
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)  # torch makes it when it is imported
    commands = ["plan run.yaml", "data run.yaml", "doctor"]
    allowed = f"{cache}:{scratch}:/dev/null:/proc/self"
    done = subprocess.run(
        [sys.executable, "-c", PURE, allowed, *commands], capture_output=True, text=True, env=variables
    )
    assert "CODES [0, 0, 0]" in done.stderr, done.stdout + done.stderr
    assert "WRITTEN []" in done.stderr, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (tmp_path / "runs").exists() and not (tmp_path / "run").exists()
