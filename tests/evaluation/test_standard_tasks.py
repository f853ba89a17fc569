"""Which tasks can be asked for, and what is said without lm_eval; `test_standard_tasks_real` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from solotune.errors import InputError
from solotune.evaluation.standard_tasks import TaskRequest, load_tasks
from tests.messages import stable


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"limit": 0}, "--limit: no documents can be chosen"),
        ({"limit": -3}, "--limit: no documents can be chosen"),
        ({"limit": 1.5}, "--limit: no documents can be chosen"),
        ({"limit": float("nan")}, "--limit: no documents can be chosen"),
        ({"limit": float("inf")}, "--limit: no documents can be chosen"),
        ({"num_fewshot": -1}, "--num-fewshot: must not be negative"),
        ({"include_path": "gone"}, "--include-path: no such folder"),
        ({"names": (), "limit": 3}, "--limit is for tasks of lm_eval, and none is named"),
        ({"names": (), "is_chat": True}, "--apply-chat-template is for tasks of lm_eval, and none is named"),
    ],
)
def test_a_request_that_cannot_be_met(asked: dict, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        TaskRequest(**{"names": ("arc_easy",), **asked})
    assert caught.value.problem == problem


@pytest.mark.parametrize("limit", [None, 1, 100, 0.25])
def test_a_request_that_can(limit: float | None):
    assert TaskRequest(("arc_easy",), limit=limit, num_fewshot=0).limit == limit
    assert not TaskRequest(()).names


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("solotune.evaluation.standard_tasks.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        load_tasks(TaskRequest(("arc_easy",)))
    assert stable(caught.value) == "--tasks: lm_eval is not installed\n  change:  pip install 'solotune[lm-eval]'"
    assert "lm_eval" not in sys.modules
