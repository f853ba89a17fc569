"""The paired test where nothing differs, and its power where something does.

    python -m bench.paired_test              # from the losses in bench/results/paired_test.json: minutes
    python -m bench.paired_test --measure    # measures these losses again: SmolLM2-135M, two seeds; in 15 minutes

Losses
------
Two adapters are trained from different seeds on half of the shops of examples/tickets.jsonl. The losses of both, and of
the base, on rows of the other shops are cut into four pieces a row (as `overflow: split` would cut them).

A/A: nothing differs
--------------------
Drawn with replacement from these losses, so that their skew, their tails and the likeness of a group's members are
real ones. The difference between the seeds, or to the base, is centred: its mean over all rows, per token, is taken
away. What is left has a true difference of zero.

    rows        each observation is a row
    pieces      groups are rows, members are their four pieces
    copies      groups are rows given four times: near-duplicates
    hits        one model, sampled twice: a row is right if its first piece is, with probability exp(-loss)
    shares      the same of all four pieces: a score between 0 and 1

Found `better` by chance should be 2.5 % (the level is 5 %, two-sided), `worse` as well.

Power
-----
The centred difference between the seeds, moved by a known amount. Beside the paired test, the unpaired one that
lm-evaluation-harness's `model_comparator.py` makes: z = difference / sqrt(stderr_a^2 + stderr_b^2).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.machine import RESULTS, machine, table, write_result
from solotune.evaluation.statistics import (
    LEVEL,
    independent,
    loss_difference_p,
    mcnemar_p,
    ratio_and_stderr,
    sign_flip_p,
    verdict,
)

ROOT = Path(__file__).parents[1]
MODEL, TICKETS = "~/.cache/solotune/smollm2-135m-instruct", ROOT / "examples" / "tickets.jsonl"
PIECES, SEEDS, STEPS, HELD_OUT_ROWS = 4, (0, 1), 12, 240
SIZES, COMPARISONS, FIRST = (20, 60, 200), 1_000, 200
TRAINING = {
    "model_name_or_path": MODEL,
    "max_length": 256,
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "torch_compile": False,
    "lora_target_modules": "all-linear",
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "save_strategy": "no",
    "validation_size": 0,
}


# --- real losses


def measure() -> dict[str, Any]:
    """Train two seeds and measure the losses of each piece of each held-out row."""
    import solotune
    from solotune.training.trained_run import TunedRun

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train, held_out = _halves(folder)
        losses: dict[str, Any] = {}
        for seed in SEEDS:
            keys = {**TRAINING, "dataset": str(train), "seed": seed, "output_dir": str(folder / f"seed-{seed}")}
            solotune.train(keys)
            run = TunedRun.open(folder / f"seed-{seed}")
            rows = _rows(held_out, run.tokenizer)
            model = run.load()
            losses[f"seed {seed}"] = _piece_losses(model, rows)
            if seed == SEEDS[0]:
                from solotune.model.lora import adapters_off

                with adapters_off(model.module):
                    losses["base"] = _piece_losses(model, rows)
        tokens = [[len(part) for part in np.array_split(row.loss_mask[1:].nonzero()[0], PIECES)] for row in rows]
    return {"machine": machine("solotune", "torch"), "model": "SmolLM2-135M-Instruct", "steps": STEPS, "tokens": tokens,
            "losses": losses}  # fmt: skip


def _halves(folder: Path) -> tuple[Path, Path]:
    """The rows of half of the shops to train on, and rows of the others."""
    rows = [json.loads(line) for line in TICKETS.read_text().splitlines()]
    shops = sorted({row["shop"] for row in rows})
    sides = [[row for row in rows if (row["shop"] in shops[::2]) == side] for side in (True, False)]
    sides[1] = sides[1][:: len(sides[1]) // HELD_OUT_ROWS][:HELD_OUT_ROWS]
    paths = (folder / "train.jsonl", folder / "held_out.jsonl")
    for path, side in zip(paths, sides, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in side))
    return paths


def _rows(file: Path, tokenizer: Any) -> Any:
    from solotune.config.load import load_config
    from solotune.dataset import prepare

    config = load_config({**TRAINING, "dataset": str(file), "dataset_exact_deduplication": False})
    return prepare(config, tokenizer, use_cache=False).train


def _piece_losses(model: Any, rows: Any) -> list[list[float]]:
    import torch

    from solotune.dataset.collate import collate

    model.module.eval()
    found = []
    with torch.no_grad():
        for begin in range(0, len(rows), 8):
            batch = rows[begin : begin + 8]
            losses_N = model.token_losses(collate(batch, model.device))[0]
            for row in losses_N.split([int(one.loss_mask[1:].sum()) for one in batch]):
                found.append([round(float(part.sum()), 4) for part in np.array_split(row.double().numpy(), PIECES)])
            print(f"{begin + len(batch)}/{len(rows)} rows", file=sys.stderr)
    return found


# --- samples of them


class Sample(NamedTuple):
    """Rows drawn with replacement: the difference of each row (of its loss, or of what it got right)."""

    differences: np.ndarray
    weights: np.ndarray
    groups: list[str] | None


class Losses:
    """Loss and tokens of each piece, (rows, PIECES), and the centred difference of two models."""

    def __init__(self, found: dict[str, Any], one: str, other: str) -> None:
        self.tokens = np.asarray(found["tokens"], float)
        self.one, self.other = (np.asarray(found["losses"][name]) for name in (one, other))
        difference = self.other - self.one
        self.centred = difference - difference.sum() / self.tokens.sum() * self.tokens

    def rows(self, rng: np.random.Generator, n: int) -> Sample:
        chosen = rng.integers(0, len(self.tokens), n)
        return Sample(self.centred[chosen].sum(1), self.tokens[chosen].sum(1), None)

    def pieces(self, rng: np.random.Generator, n: int) -> Sample:
        chosen = rng.integers(0, len(self.tokens), n // PIECES)
        names = [str(number) for number in range(n // PIECES) for _ in range(PIECES)]
        return Sample(self.centred[chosen].ravel(), self.tokens[chosen].ravel(), names)

    def copies(self, rng: np.random.Generator, n: int) -> Sample:
        once = self.rows(rng, n // PIECES)
        names = [str(number) for number in range(n // PIECES) for _ in range(PIECES)]
        return Sample(np.repeat(once.differences, PIECES), np.repeat(once.weights, PIECES), names)

    def hits(self, rng: np.random.Generator, n: int) -> Sample:
        return Sample(self._sampled(rng, n)[:, 0], np.ones(n), None)

    def shares(self, rng: np.random.Generator, n: int) -> Sample:
        return Sample(self._sampled(rng, n).mean(1), np.ones(n), None)

    def _sampled(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, PIECES): 1 where only the second sample of a piece is right, -1 where only the first is."""
        right = np.exp(-self.other[rng.integers(0, len(self.tokens), n)])
        return (rng.random(right.shape) < right).astype(float) - (rng.random(right.shape) < right)


# --- tests


def paired(sample: Sample) -> float:
    """The product's test."""
    differences = sample.differences.tolist()
    groups = independent(sample.groups) if sample.groups else None
    if set(differences) <= {-1.0, 0.0, 1.0}:
        return mcnemar_p([d < 0 for d in differences], [d > 0 for d in differences], groups)
    return loss_difference_p(differences, sample.weights.tolist(), groups)


def by_row(sample: Sample) -> float:
    """The same, as if the members of a group were independent."""
    return sign_flip_p(sample.differences.tolist())


def bootstrap(sample: Sample, rng: np.random.Generator) -> float:
    """Paired percentile bootstrap over groups: twice the smaller share of resamples on one side of 0."""
    sums = sample.differences
    if sample.groups:
        sums = sums.reshape(-1, PIECES).sum(1)
    means = sums[rng.integers(0, len(sums), (1_000, len(sums)))].sum(1)
    return min(1.0, 2 * min(float((means <= 0).mean()), float((means >= 0).mean())))


def found(differences: np.ndarray, p: float) -> str:
    return verdict(float(differences.sum()), p)


def false_rates(losses: Losses, kind: str, n: int, seed: int) -> dict[str, Any]:
    """How often each test finds something where nothing differs."""
    rng = np.random.default_rng(seed)
    said: dict[str, list[str]] = {"paired": [], "by row": [], "bootstrap": []}
    for _ in range(COMPARISONS):
        sample = getattr(losses, kind)(rng, n)
        said["paired"].append(found(sample.differences, paired(sample)))
        said["bootstrap"].append(found(sample.differences, bootstrap(sample, rng)))
        if sample.groups:
            said["by row"].append(found(sample.differences, by_row(sample)))
    share = {test: [one.count(word) / len(one) for word in ("better", "worse")] for test, one in said.items() if one}
    return {"first": said["paired"][:FIRST].count("better"), **share}


def large_rates(losses: Losses, n: int) -> tuple[float, float]:
    """Share of 40,000 draws of rows with a sum 1.96 of its errors below and above 0: `better`, `worse`, nearly."""
    rng, z = np.random.default_rng(7), []
    rows = losses.centred.sum(1)
    for _ in range(20):
        drawn = rows[rng.integers(0, len(rows), (2_000, n))]
        z.append(drawn.sum(1) / np.sqrt((drawn**2).sum(1)))
    return tuple(float((side * np.concatenate(z) > 1.96).mean()) for side in (-1, 1))  # type: ignore[return-value]


def power(losses: Losses, n: int, effect: float, seed: int) -> dict[str, float]:
    """How often the paired and the unpaired test find a true difference of `effect` nats per token."""
    rng, hits = np.random.default_rng(seed), {"paired": 0, "unpaired": 0}
    for _ in range(COMPARISONS // 4):
        chosen = rng.integers(0, len(losses.tokens), n)
        weights = losses.tokens[chosen].sum(1)
        base = losses.one[chosen].sum(1)
        tuned = base + losses.centred[chosen].sum(1) - effect * weights
        hits["paired"] += found(tuned - base, paired(Sample(tuned - base, weights, None))) == "better"
        (a, error_a), (b, error_b) = (ratio_and_stderr(side.tolist(), weights.tolist()) for side in (base, tuned))
        z = (a - b) / math.hypot(error_a, error_b)
        hits["unpaired"] += z > 0 and math.erfc(z / math.sqrt(2)) < LEVEL
    return {test: count / (COMPARISONS // 4) for test, count in hits.items()}


# --- the page


def _percent(shares: tuple[float, float]) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def page(losses: dict[str, Any]) -> str:
    """bench/results/paired_test.md."""
    pairs = {"seed 0, seed 1": ("seed 0", "seed 1"), "base, seed 0": ("base", "seed 0")}
    all_rates: list[list[list[float]]] = []
    false, compared = [], {name: Losses(losses, *pair) for name, pair in pairs.items()}
    for kind, groups in KINDS.items():
        for pair, found_losses in compared.items():
            if kind != "rows" and pair != "seed 0, seed 1":
                continue
            for n in SIZES:
                print(f"{kind}, {pair}, {n} rows", file=sys.stderr)
                rates = false_rates(found_losses, kind, n, seed=n + 1_000 * len(false))
                all_rates.append([rates["paired"], rates["bootstrap"]])
                shares = [" / ".join(f"{100 * share:.1f}" for share in rates[test]) if test in rates else ""
                          for test in ("paired", "by row", "bootstrap")]  # fmt: skip
                false.append([kind, pair, n, n // PIECES if groups else "", f"{rates['first']} of {FIRST}", *shares])
    powers = []
    for n in SIZES:
        for effect in EFFECTS:
            rates = power(compared["seed 0, seed 1"], n, effect, seed=n)
            powers.append([n, effect, *(f"{100 * rates[test]:.0f} %" for test in ("paired", "unpaired"))])
    level = [np.asarray(losses["losses"][name]).sum() / np.asarray(losses["tokens"]).sum() for name in losses["losses"]]
    means = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(losses["losses"], level, strict=True))
    mean = 100 * np.asarray(all_rates).mean(0)
    head = ["drawn", "models", "rows", "groups", "`better`", "paired, %", "by row, %", "bootstrap, %"]
    return PAGE.format(
        comparisons=f"{COMPARISONS:,}",
        error=100 * math.sqrt(0.025 * 0.975 / COMPARISONS),
        first=FIRST,
        means=means,
        steps=losses["steps"],
        rows=len(losses["tokens"]),
        false=table(head, false),
        large="; ".join(
            f"{pair}: {', '.join(_percent(large_rates(one, n)) for n in SIZES)}" for pair, one in compared.items()
        ),
        paired_mean=" / ".join(f"{one:.1f}" for one in mean[0]),
        bootstrap_mean=" / ".join(f"{one:.1f}" for one in mean[1]),
        power=table(["rows", "true difference", "paired", "unpaired"], powers),
        power_comparisons=COMPARISONS // 4,
    )


KINDS = {"rows": False, "pieces": True, "copies": True, "hits": False, "shares": False}
EFFECTS = (0.005, 0.01, 0.02, 0.05)
PAGE = """# The paired test where nothing differs

`python -m bench.paired_test`: {comparisons} comparisons a line, drawn from real losses of SmolLM2-135M on {rows}
held-out rows of examples/tickets.jsonl (per token: {means}; two seeds, {steps} steps).
The true difference is zero. The level is 5 % two-sided, so `better` may be found in 2.5 % by chance, and `worse`
in 2.5 %. What is drawn is said at the top of `bench/paired_test.py`.

## False `better` and `worse`

`better`: found by the product's test in the first {first} comparisons (5 are expected at the level). The shares are of
all {comparisons}, `better` / `worse`; their own standard error is {error:.2f}. "By row" takes the members of a group as
independent, "bootstrap" is the paired percentile bootstrap over groups.

{false}

Mean of all lines: paired {paired_mean}, bootstrap {bootstrap_mean}.

A line has chance errors of its own. With 40,000 draws of rows and the normal limits of this test, at 20, 60, 200 rows:
{large}.
Together they are at the level; `better` is a little above its half, since these differences are skewed. The halves
are exact where the two sides may be exchanged (one model sampled twice: hits and shares).

Few right or wrong rows differ between two samples, so McNemar's exact test ("hits") stays far below its level. The
bootstrap calls too much a difference where groups are few, so solotune takes sign flips (Student's t for two to five
groups) for losses and scores alike.

## Power

How often a true difference, in nats per token, is found (`better`), by {power_comparisons} comparisons a line: the
paired test, and the unpaired z-test that lm-evaluation-harness's `model_comparator.py` makes of the same figures.
Models: the two seeds.

{power}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure the losses again")
    if parser.parse_args().measure:
        write_result("paired_test", measure())
    text = page(json.loads((RESULTS / "paired_test.json").read_text()))
    (RESULTS / "paired_test.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
