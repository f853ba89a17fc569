"""Task files for lm_eval, and a record of what it logs: python -m tests.evaluation.task_files RUN

RUN is a finished run of examples/demo.yaml (`sh scripts/demo`), and lm_eval must be there (`sh scripts/test_lm_eval`
installs it). The record, tests/data/lm_eval_logged.json, has all that `evaluation.task_scores` reads: samples as they come,
without documents and texts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from solotune.evaluation.task_scores import Group, LoggedTask, Metric, TaskScore

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "data" / "lm_eval_logged.json"
_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
metadata:
  version: 1
"""
TASKS = {
    "kind": """\
output_type: multiple_choice
doc_to_text: "{{question}}\\nKind:"
doc_to_choice: "{{kinds}}"
doc_to_target: "{{kinds.index(kind)}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: brier_score
""",
    "hurry": """\
output_type: multiple_choice
doc_to_text: "{{question}}\\nUrgent:"
doc_to_choice: ["no", "yes"]
doc_to_target: "{{urgent}}"
metric_list:
  - metric: acc
  - metric: f1
""",
    "answer": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 60
metric_list:
  - metric: exact_match
  - metric: bleu
""",
    "next_word": """\
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{kind}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "text": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}
GROUP = """\
group: choices
task: [kind, hurry]
aggregate_metric_list:
  - metric: acc
    weight_by_size: {is_by_size}
"""
_READ = ("doc_id", "filter", "doc_hash", "prompt_hash", "metrics")


def write_tasks(folder: Path, rows: list[dict[str, Any]], is_by_size: bool = True) -> Path:
    """A folder with the tasks, their documents and a group."""
    folder.mkdir(exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(_HEAD.format(name=name, data=data) + text, encoding="utf-8")
    (folder / "choices.yaml").write_text(GROUP.format(is_by_size=str(is_by_size).lower()), encoding="utf-8")
    return folder


def tickets(number: int) -> list[dict[str, Any]]:
    """Documents made of the demo's chats, spread over all of them."""
    lines = (ROOT / "examples" / "tickets.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(lines[place * len(lines) // number])["messages"] for place in range(number)]
    answers = [json.loads(chat[2]["content"]) for chat in chosen]
    kinds = sorted({answer["intent"] for answer in answers})
    return [
        {"question": chat[1]["content"], "answer": chat[2]["content"], "kind": answer["intent"], "kinds": kinds}
        | {"urgent": int(answer["urgent"])}
        for chat, answer in zip(chosen, answers, strict=True)
    ]


def logged() -> tuple[list[LoggedTask], list[Group]]:
    """The record as `task_scores.score_tasks` takes it."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    return [_logged(task) for task in found["tasks"]], [Group(**group) for group in found["groups"]]


def _logged(task: dict[str, Any]) -> LoggedTask:
    metrics = {name: Metric(*how, _brier if how[0] == "brier_score" else None) for name, how in task["metrics"].items()}
    values = {name: (base, tuned) for name, (base, tuned) in task["values"].items()}
    return LoggedTask(task["name"], task["base"], task["tuned"], values, metrics)


def _brier(documents: list[Any]) -> float:
    """As lm_eval's, of lists that JSON has made of arrays."""
    ((gold, shares),) = documents
    return sum((share - (place == gold)) ** 2 for place, share in enumerate(shares))


def _as_json(task: LoggedTask) -> dict[str, Any]:
    sides = {
        side: [{key: sample[key] for key in (*_READ, *sample["metrics"])} for sample in getattr(task, side)]
        for side in ("base", "tuned")
    }
    metrics = {name: [how.aggregation, how.higher_is_better] for name, how in task.metrics.items()}
    return {"name": task.name, **sides, "values": task.values, "metrics": metrics}


def main(run: str) -> None:
    """Write the record."""
    import tempfile

    import solotune
    from solotune.evaluation import standard_tasks

    kept: list[Any] = []

    def record(tasks: list[LoggedTask], groups: list[Group]) -> list[TaskScore]:
        kept[:] = [[_as_json(task) for task in tasks], [vars(group) for group in groups]]
        return []

    standard_tasks.score_tasks = record
    with tempfile.TemporaryDirectory() as folder:
        tasks = ["choices", "answer", "next_word", "text"]
        solotune.evaluate(
            run, tasks=tasks, include_path=write_tasks(Path(folder), tickets(9)), chat_template=True, num_samples=0
        )
    text = json.dumps({"tasks": kept[0], "groups": kept[1]}, default=lambda value: value.tolist())
    RECORD.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
