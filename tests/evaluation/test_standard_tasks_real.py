"""Tasks of the real lm_eval on a run of a tiny model; `sh scripts/test_lm_eval` installs it.

The oracle is lm_eval itself: its own HFLM on the base's folder, without and with the adapter that PEFT loads.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import solotune
from solotune import cli
from solotune.display.progress import SilentDisplay
from solotune.errors import InputError
from solotune.evaluation.standard_tasks import TaskRequest, load_tasks, run_tasks
from solotune.evaluation.task_scores import TaskScore
from solotune.training.trained_run import TunedRun
from tests.evaluation.task_files import TASKS, write_tasks
from tests.tiny import chat_rows

pytestmark = pytest.mark.lm_eval
KINDS = ["blue", "red"]
ROWS = [
    {"question": f"Say {n}", "answer": f"it is {n}", "kind": KINDS[n % 2], "kinds": KINDS, "urgent": n % 2}
    for n in range(10)
]
NAMES = ["choices", "answer", "next_word", "text"]


@pytest.fixture(scope="module")
def run(chat_model, tmp_path_factory) -> Path:
    """A run whose base is stored in float32, as lm_eval loads it."""
    folder = tmp_path_factory.mktemp("lm-eval")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    keys = {
        "max_length": 64,
        "use_cpu": True,
        "lora_target_modules": "all-linear",
        "lora_r": 4,
        "max_steps": 12,
        "seed": 0,
    }
    keys |= {"base_precision": "fp32", "bf16": False, "learning_rate": 3e-2, "validation_size": 10, "num_samples": 0}
    keys |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    files = {
        "model_name_or_path": str(chat_model),
        "dataset": str(folder / "chats.jsonl"),
        "output_dir": str(folder / "run"),
    }
    solotune.train({**keys, **files})
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", ROWS)
    for name in TASKS:  # the tiny model reads 128 bytes
        path = folder / f"{name}.yaml"
        path.write_text(path.read_text().replace("max_gen_toks: 60", "max_gen_toks: 12"))
    return folder


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def by_lm_eval(chat_model: Path, tasks: Path, adapter: Path | None) -> dict[str, dict[str, float]]:
    """Scores as lm_eval's own command line gives them."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    module = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    lm = HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(chat_model), batch_size=3)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=NAMES, task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return found["results"]


def test_scores_are_those_of_lm_eval_itself(run: Path, tasks: Path, chat_model: Path):
    display = Notes()
    result = solotune.evaluate(run, display, tasks=NAMES, include_path=tasks)
    assert [one.name for one in result.tasks[:2]] == ["choices acc", "kind acc"] and len(result.tasks) == 12
    base, tuned = by_lm_eval(chat_model, tasks, None), by_lm_eval(chat_model, tasks, run / "adapter")
    for one in result.tasks:
        key = f"{one.metric},{one.filter}"
        assert one.base == pytest.approx(base[one.task][key], rel=1e-5), one.name
        assert one.tuned == pytest.approx(tuned[one.task][key], rel=1e-5), one.name
    found = {one.name: one for one in result.tasks}
    assert found["text bits_per_byte"].base != found["text bits_per_byte"].tuned
    assert found["text bits_per_byte"].p_value < 0.05 and found["answer bleu"].verdict == "not tested"
    saved = json.loads((run / "evaluation.json").read_text())["tasks"]
    assert saved == json.loads(json.dumps(result.to_json()["tasks"]))
    assert any("--apply-chat-template asks them through the chat template" in note for note in display.notes)
    assert logging.getLogger("lm_eval").propagate


def test_the_command_line(run: Path, tasks: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    command = ["evaluate", str(run), "--tasks", f"kind,{tasks / 'text.yaml'}", "--limit", "0.5"]
    assert cli.main([*command, "--include-path", str(tasks), "--apply-chat-template", "--num-fewshot", "1"]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"kind acc +5 +\S+% +\S+% +\S+ ± \S+ +inside the noise", out), out
    assert "it/s" not in out + err and "pretrained" not in out + err  # neither bars nor warnings of lm_eval
    assert cli.main([*command, "--include-path", str(tasks), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["tasks"]
    assert [(one["task"], one["metric"], one["rows"]) for one in found] == [
        *(("kind", metric, 5) for metric in ("acc", "acc_norm", "brier_score")),
        ("text", "word_perplexity", 5),
        ("text", "bits_per_byte", 5),
    ]


def scored(run: Path, names: list[str], tasks: Path, batch_size: int = 4, **more) -> list[TaskScore]:
    found = TunedRun.open(run)
    loaded = load_tasks(TaskRequest(names, str(tasks), is_chat=more.pop("is_chat", False)))
    return run_tasks(loaded, found.load(), found.tokenizer, stops=found.answer_ends, batch_size=batch_size, **more)


def test_prompts_are_those_of_the_chat_template(run: Path, tasks: Path):
    from solotune.evaluation.lm_eval_model import LmEvalModel

    found = TunedRun.open(run)
    lm = LmEvalModel(found.load(), found.tokenizer, 1, [], None, lambda done, total: None)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    render = lm.apply_chat_template
    assert render(chat) == found.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    begun = [*chat, {"role": "assistant", "content": "It is "}]
    assert render(begun, False) == found.tokenizer.apply_chat_template(
        begun, tokenize=False, continue_final_message=True
    )
    lm.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    )
    assert "Be brief" not in render(chat) and "2 + 2" in render(chat)
    chats, texts = (scored(run, ["kind"], tasks, is_chat=one, system_prompt="Be brief.") for one in (True, False))
    assert chats[2].base != texts[2].base  # the Brier score


def test_a_batch_that_does_not_fit_is_halved(run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    whole, sizes, progress = scored(run, ["kind", "answer"], tasks), [], []
    call, generate = HFLM._model_call, HFLM._model_generate

    def short(of):
        def model(self, batch, *args, **kwargs):
            sizes.append(len(batch))
            if len(batch) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return of(self, batch, *args, **kwargs)

        return model

    monkeypatch.setattr(HFLM, "_model_call", short(call))
    monkeypatch.setattr(HFLM, "_model_generate", lambda self, context, *a, **k: short(generate)(self, context, *a, **k))
    halved = scored(run, ["kind", "answer"], tasks, progress=lambda *shown: progress.append(shown))
    assert [one.base for one in halved] == pytest.approx([one.base for one in whole], rel=1e-4)
    assert sizes[:3] == [4, 2, 1] and progress[-1] == (10, 10, "answer, base")


def test_what_is_cut_is_said_and_an_answer_that_cannot_fit_is_refused(run: Path, tmp_path: Path):
    notes: list[str] = []
    long = write_tasks(tmp_path / "long", [{**row, "question": "word " * 40} for row in ROWS])
    scored(run, ["kind"], long, note=notes.append)
    assert notes == ["kind: what is longer than the model's 128 tokens is cut at its beginning"]
    (long / "answer.yaml").write_text((long / "answer.yaml").read_text().replace("toks: 60", "toks: 128"))
    with pytest.raises(InputError, match="--tasks answer: its answers are too long for this model"):
        scored(run, ["answer"], long)


BROKEN = {
    "no such task": ("kimd", "", "did you mean kind"),
    "not YAML": ("broken", "task: broken\n  dataset_path: json\n", "line 2: mapping values are not allowed here"),
    "no data": ("gone", "{kind}\ntask: gone\ndataset_kwargs: {{data_files: {{test: gone.jsonl}}}}\n", "Unable to find"),
    "data on the hub": ("far", "{kind}\ntask: far\ndataset_path: nobody/nothing\ndataset_kwargs: {{}}\n", "its data cannot be loaded"),
    "no documents": ("none", "{kind}\ntask: none\nprocess_docs: !function own.nothing\n", "the task has no documents"),
    "no function": ("own", "{kind}\ntask: own\nprocess_docs: !function own.gone\n", "has no function 'gone'"),
    "no metric": ("metric", "{kind}\ntask: metric\nmetric_list: [{{metric: mine}}]\n", "mine metric is not assigned"),
    "code of the model": ("unsafe", "{kind}\ntask: unsafe\nunsafe_code: true\n", "runs code that the model writes"),
    "fails": ("fails", "{kind}\ntask: fails\nprocess_results: !function own.fails\n", "ZeroDivisionError: division by zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_task_that_cannot_be_used(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name, text, said = BROKEN[case]
    folder = write_tasks(tmp_path / "tasks", ROWS[:2])
    if text:
        own = text.format(kind=f"include: {folder / 'kind.yaml'}") if "{kind}" in text else text
        (folder / f"{name}_.yaml").write_text(own)
    (folder / "own.py").write_text(
        "def fails(doc, results):\n    1 / 0\n\ndef nothing(docs):\n    return docs.select([])\n"
    )
    assert cli.main(["evaluate", str(run), "--tasks", name, "--include-path", str(folder), "num_samples=0"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_nobody_names_runs_no_code(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither the one that the command is called in, nor tasks of the named folder that are not asked for."""
    monkeypatch.chdir(tmp_path)
    folder = write_tasks(tmp_path / "tasks", ROWS)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\ndef nothing(docs):\n    return docs\n")
    (folder / "own.yaml").write_text(
        f"include: {folder / 'kind.yaml'}\ntask: own\nprocess_docs: !function own.nothing\n"
    )
    load_tasks(TaskRequest(["kind"], str(folder)))
    assert not (tmp_path / "was-run").exists()
    load_tasks(TaskRequest(["own"], str(folder)))
    assert (tmp_path / "was-run").exists()
