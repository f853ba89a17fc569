"""The quality bench: its configs are ones that solotune takes, and its arithmetic is right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import quality
from bench.quality import BASES, TASKS, Run
from solotune.config.load import load_config


def made(task: str, base: str, seed: int, before: float, after: float) -> dict:
    return {**Run(task, base, seed)._asdict(), "before": before, "after": after, "exact_match": 0.5, "rows": 9}


RUNS = [
    *(made("chats", "bf16", seed, 2.0, after) for seed, after in enumerate((1.0, 2.0, 4.0))),
    *(made("chats", "fp8", seed, 2.1, after) for seed, after in enumerate((1.01, 2.02, 4.04))),  # always 1 % above
    *(made("chats", "nf4", seed, 2.5, after) for seed, after in enumerate((1.5, 2.5, 4.5))),
]


def test_every_run_is_a_config_that_differs_only_in_what_is_compared(tmp_path):
    configs = {}
    for task in TASKS:
        for base in BASES:
            keys = quality.keys_of(Run(task, base, 1), tmp_path, tmp_path / "rows.jsonl", 1.0, 80, tmp_path / "run")
            configs[task, base] = load_config(keys)
    precisions = {base: (c.base_precision, c.matmul_precision) for (task, base), c in configs.items() if task == "demo"}
    assert precisions == {
        "bf16": ("bf16", "auto"),
        "fp8": ("fp8", "auto"),
        "nf4": ("nf4", "auto"),
        "nf4+fp8": ("nf4", "fp8"),
    }
    for (task, _), config in configs.items():
        same = {"base_precision", "matmul_precision"}
        assert config.model_dump(exclude=same) == configs[task, "bf16"].model_dump(exclude=same)
    assert configs["demo", "bf16"].split_by == "shop"


def test_a_part_of_the_rows_comes_from_all_over_the_file(tmp_path):
    source = tmp_path / "all.jsonl"
    source.write_text("".join(f"{i}\n" for i in range(100)))
    path, share = quality.thinned(source, 10, tmp_path / "part.jsonl")
    assert (path.read_text().split(), share) == ([str(i) for i in range(0, 100, 10)], 0.1)
    assert quality.thinned(source, None, tmp_path / "part.jsonl") == (source, 1.0)
    keys = quality.keys_of(Run("chats", "nf4", 0), Path("m"), path, share, 3, Path("run"))
    assert keys["validation_size"] == 20


def test_seeds_are_compared_one_by_one():
    """The losses of the seeds are far apart, the ratio of the bases is not: only pairing shows it."""
    assert quality.in_percent(RUNS, "chats", "fp8") == pytest.approx([1, 1, 1])
    assert quality.paired(RUNS, "chats", "nf4", "bf16") == pytest.approx([0.5, 0.5, 0.5])
    without = [one for one in RUNS if (one["base"], one["seed"]) != ("bf16", 1)]  # a run that failed
    assert quality.in_percent(without, "chats", "nf4") == pytest.approx([50, 12.5])


def test_the_standard_error_is_that_of_the_mean():
    mean, stderr = quality.mean_and_stderr([1.0, 2.0, 4.0])
    assert (mean, stderr) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3 / 3)))
    assert math.isnan(quality.mean_and_stderr([1.0])[1])


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ([0.1, 0.2, 0.3], "yes (+0.2 ± 0.058 %)"),
        ([0.8, 0.9, 1.0], "no (+0.9 ± 0.058 %)"),
        ([0.2, 0.5, 0.7], "within the error (+0.4667 ± 0.15 %)"),
        ([0.1], "not to be told from one seed (+0.1 %)"),
        ([], "not measured"),
    ],
)
def test_a_bar_is_met_missed_or_undecided(values, answer):
    assert quality.verdict(values, 0.5, "%") == answer


def test_the_page_says_what_was_found_and_what_failed():
    result = {"runs": RUNS, "summary": quality.summarise(RUNS), "machine": {"card": "H100"}, "command": "`c`"}
    page = quality.markdown({**result, "seconds": 9.0, "errors": ["chats nf4 seed 2: no"]})
    assert "| chats | bf16 | 3 | 9 | 2.0000 ± 0.0000 | 2.3333 ± 0.8819 | 50.0 ± 0.0 |  |  |  |" in page
    assert "2.3567 ± 0.8907 | 50.0 ± 0.0 | +5.00 ± 0.00 | +1.00 ± 0.00 | +0.0233 ± 0.0088 |" in page
    assert "- chats: after tuning, fp8 less than 0.5 % above bf16: no (+1 ± " in page
    assert "- chats: after tuning, fp8 below nf4: yes (-0.4767 ± 0.0088 nats)" in page
    assert "- failed: chats nf4 seed 2: no" in page
