"""Each tracker with its real library and a real local back end, read back with the library's own reader.

One run of a tiny model reports to all four: TensorBoard event files, an MLflow server on loopback, an offline folder of
Weights & Biases, Trackio's database. Then it is stopped and resumed. `sh scripts/test_trackers` installs what this
needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import solotune
from solotune.diagnosis.sources import binary_logs
from solotune.run.record import RunRecord
from solotune.trackers import observer

pytestmark = pytest.mark.trackers
ALL = ["tensorboard", "wandb", "mlflow", "trackio"]
SECRET = "f00dfeed" * 5


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, *store], cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.5)
        else:
            raise AssertionError((folder / "log").read_text())
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers do not always stop when asked
        server.wait()


@pytest.fixture
def back_ends(mlflow_server, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(observer, "FINISH_SECONDS", 120.0)
    return tmp_path


def tensorboard_steps(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def wandb_steps(folder: Path, name: str) -> list[tuple[int, float]]:
    """By solotune's own reader: the library has none in Python any more."""
    (datastore,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows, _, _, exit_code = binary_logs.wandb(datastore)
    assert exit_code == 0
    return [(int(row["_step"]), row[name]) for row in rows if name in row]


def mlflow_steps(run_id: str, name: str) -> list[tuple[int, float]]:
    import mlflow

    found = mlflow.MlflowClient().get_metric_history(run_id, name)
    return [(one.step, one.value) for one in sorted(found, key=lambda one: one.step)]


def trackio_steps(folder: Path, name: str) -> list[tuple[int, float]]:
    with contextlib.closing(sqlite3.connect(folder / "trackio/solotune.db")) as database:
        rows = [(step, json.loads(values)) for step, values in database.execute("select step, metrics from metrics")]
    return sorted((step, values[name]) for step, values in rows if name in values)


def test_a_run_is_in_all_trackers_as_in_its_own_log(chat_config, back_ends):
    result = solotune.train(chat_config, report_to=ALL)
    run = result.run_dir
    record = RunRecord.read(run)
    reports = {name: json.loads((run / f"trackers/{name}.json").read_text()) for name in ALL}
    assert {name: (one["problem"], one["finished"]) for name, one in reports.items()} == dict.fromkeys(ALL, ("", True))
    losses = {"train/loss": [(one.step, one.loss) for one in record.steps]}
    losses["eval/loss"] = [(one.step, one.loss) for one in record.evals]
    evaluation = record.evaluation
    assert evaluation is not None
    losses["eval/base_loss"] = [(record.last_step, evaluation["base"]["loss"])]
    run_id = reports["mlflow"]["id"]
    for name, expected in losses.items():
        exact = pytest.approx(dict(expected), rel=1e-6)  # TensorBoard keeps float32
        assert dict(tensorboard_steps(run / "trackers/tensorboard", name)) == exact, name
        assert dict(wandb_steps(back_ends, name)) == exact, name
        assert dict(mlflow_steps(run_id, name)) == exact, name
        assert dict(trackio_steps(back_ends, name)) == exact, name
    import mlflow

    seen = mlflow.get_run(run_id)
    assert (seen.info.status, seen.info.run_name, seen.data.params["lora_r"]) == ("FINISHED", run.name, "4")
    assert solotune.verify(run).ok
    log = (run / "log.txt").read_text()
    assert all(f"{name}: {one['where']}" in log for name, one in reports.items()) and "warning" not in log
    for path in [*run.rglob("*"), *back_ends.glob("wandb/**/*")]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_killed_run_is_resumed_as_the_same_run(chat_config, back_ends, tmp_path):
    """The process is killed after its second step: the trackers hear it, and go on with the resumed run."""
    import mlflow

    program = (
        "import os, sys, time, signal, solotune\n"
        "from solotune.display.progress import SilentDisplay\n"
        "class Killed(SilentDisplay):\n"
        "    def step(self, event):\n"
        "        if event.step == 3: time.sleep(20); os.kill(os.getpid(), signal.SIGKILL)\n"
        "solotune.train(sys.argv[1], display=Killed(), save_steps=2, report_to=['tensorboard', 'mlflow'])\n"
    )
    (tmp_path / "again.yaml").write_text(json.dumps(chat_config))  # YAML too
    command = [sys.executable, "-c", program, str(tmp_path / "again.yaml")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    run = Path(chat_config["output_dir"])
    state = run / "trackers/mlflow.json"
    for _ in range(120):
        if json.loads(state.read_text())["finished"]:
            break
        time.sleep(0.5)
    run_id = json.loads(state.read_text())["id"]
    assert mlflow.get_run(run_id).info.status == "KILLED"
    result = solotune.train(tmp_path / "again.yaml", resume=True, save_steps=2, report_to=["tensorboard", "mlflow"])
    steps = [one.step for one in RunRecord.read(result.run_dir).steps]
    assert json.loads(state.read_text())["id"] == run_id
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    assert sorted({step for step, _ in mlflow_steps(run_id, "train/loss")}) == steps
    assert [step for step, _ in tensorboard_steps(run / "trackers/tensorboard", "train/loss")] == steps


def test_a_server_that_is_not_there_costs_the_run_nothing(chat_config, back_ends, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(observer, "FINISH_SECONDS", 1.0)
    result = solotune.train(chat_config, report_to=["mlflow", "wandb"])
    assert RunRecord.read(result.run_dir).is_finished and solotune.verify(result.run_dir).ok
    assert result.evaluation is not None
    log = (result.run_dir / "log.txt").read_text()
    assert "mlflow is slow or does not answer: it has the run up to step 0" in log or "mlflow failed" in log
    assert "wandb is slow or does not answer: it has the run up to step 0" in log or "wandb failed" in log
