"""examples/quickstart.ipynb runs in a kernel, shows a run in one output, and survives the stop button."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import chat_rows

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

LOOK_ONCE = f"""
import pytest, sys
sys.path.append({str(ROOT)!r})
from tests import plans
plans.look_once(pytest.MonkeyPatch())
"""

STOPPED = """
import os, pathlib, signal, threading, time

def press_stop():
    log = pathlib.Path("stopped/metrics.jsonl")
    while not (log.exists() and log.read_text().count('"event": "step"') >= 3):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)  # what the stop button does

threading.Thread(target=press_stop, daemon=True).start()
solotune.train(config, output_dir="stopped", max_steps=5000, save_strategy="no", eval_steps=None)
"""
ALIVE = (
    "print(len(solotune.runs('.')[-1].history), [path.name for path in pathlib.Path('stopped/checkpoints').iterdir()])"
)


@pytest.fixture(scope="module")
def notebook(chat_model, tmp_path_factory):
    """The executed code cells by their ids, and the folder; after the notebook's own, a run is stopped."""
    folder = tmp_path_factory.mktemp("notebook")
    rows = [{**row, "shop": i % 20} for i, row in enumerate(chat_rows(300))]
    (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    book = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    cells = {cell.id: cell for cell in book.cells if cell.cell_type == "code"}
    assert not any(cell.outputs or cell.execution_count for cell in cells.values())
    # instead of the demo's model and 60 steps
    cells["parameters"].source = f"model, steps = {str(chat_model)!r}, 4{LOOK_ONCE}"
    for name, source in (("stopped", STOPPED), ("alive", ALIVE)):
        cells[name] = nbformat.v4.new_code_cell(source, id=name)
        book.cells.append(cells[name])
    cells["stopped"].metadata["tags"] = ["raises-exception"]
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return SimpleNamespace(folder=folder, **cells)


def outputs(cell) -> list[tuple[str, str]]:
    """Type and HTML (else text) of each output."""
    shown = [(one.output_type, one.get("data", {}), one.get("text", "")) for one in cell.outputs]
    return [(kind, data.get("text/html", data.get("text/plain", text))) for kind, data, text in shown]


def test_every_result_is_a_table_and_nothing_else_is_printed(notebook):
    results = {
        "data": "<b><u>it is ",
        "plan": "Settings chosen for you",
        "diagnose": "verdict",
        "chat": "prompt format",
    }
    for name, says in results.items():
        *others, (kind, html) = outputs(getattr(notebook, name))
        assert kind == "execute_result" and "<table>" in html
        assert says in html
        assert all(one == ("display_data", "") for one in others), "progress, which is taken away at the end"
    ((_, history),) = outputs(notebook.history)
    assert "eval_loss" in history and "tokens_per_second" in history


def test_a_run_has_one_output_that_ends_with_its_log_and_its_result_shows_answers(notebook):
    (run, progress), (result, html) = outputs(notebook.train)
    assert (run, result) == ("display_data", "execute_result")
    assert "held-out loss</th>" in progress and "training for 4 steps" in progress and "step 4/4  loss" in progress
    assert "<progress" not in progress and "\x1b" not in progress
    assert "Answers</caption>" in html and "twice" in html
    (log,) = (notebook.folder / "runs").glob("*/log.txt")
    assert "training for 4 steps" in (text := log.read_text()) and "\x1b" not in text


def test_the_stop_button_saves_and_says_how_to_continue_and_the_kernel_lives(notebook):
    *_, error = notebook.stopped.outputs
    (said,) = error.traceback
    step = int(said.split()[3].rstrip(";"))
    call = 'solotune.train("stopped/config.yaml", output_dir="stopped", resume=True)'
    assert said == f"Stopped after step {step}; checkpoint saved. Continue with: {call}"
    assert outputs(notebook.alive) == [("stream", f"{step} ['step-{step:06}']\n")]
