"""Tokens per second by length, micro-batch, rank and model size, compared with the limit of matrix products.

    python -m bench.growth [--only TEXT ...] [--out FOLDER]

Models, weights and the step are those of `bench.plan_runs`; settings are the plan's choice for the card. The ceiling is
the time of the base's products and of the head's, forward and once backward, each size measured alone on random
numbers: a step that did nothing else would reach it. Attention is not in it, so long rows fall away from it. Writes
`growth.md` and `growth.jsonl`, a line a case as it is done. A case that does not fit has a line that says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.made_weights import make_weights_here
from bench.plan_cases import ALL, MODELS, Case
from bench.plan_runs import SETTLED, plan_of, run

REPEATS = 5
HEAD = "| grows | case | chosen | tokens/s | peak GiB | products alone | share |\n|---|---|---|--:|--:|--:|--:|\n"


def cases() -> Iterator[tuple[str, Case]]:
    """(what grows, case)"""
    for length in (512, 1024, 2048, 4096, 8192):
        yield "length, 8,192 tokens a micro-batch", Case("8B", 8192 // length, length, ())
    for length in (16384, 32768, 65536):
        yield "length, one row", Case("8B", 1, length, ())
    for rows in (1, 2, 8, 16):
        yield "rows of 2,048", Case("8B", rows, 2048, ())
    for rank in (8, 64, 256):
        yield "rank, all linears", Case("8B", 4, 2048, (ALL, f"lora_r={rank}"))
    for model in MODELS:
        yield "size", Case(model, 4, 2048, ())


def ceiling_tokens_per_second(model: str, tokens: int) -> float:
    """Of products alone: x W^T and dy W for every linear of the layers, and for the head, in bfloat16."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    sizes = MODELS[model]
    head = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    hidden, inner, depth = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    queries, keys = head * sizes["num_attention_heads"], head * sizes["num_key_value_heads"]
    shapes = Counter({(queries, hidden): depth, (keys, hidden): 2 * depth, (inner, hidden): 2 * depth})
    shapes.update({(hidden, inner): depth, (hidden, queries): depth, (sizes["vocab_size"], hidden): 1})
    total = 0.0
    for (out, into), count in shapes.items():
        x, weight = (torch.randn(n, into, device="cuda", dtype=torch.bfloat16) for n in (tokens, out))
        dy = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16)
        for first, second in ((x, weight.t()), (dy, weight)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.mm(first, second)
            begin.record()
            for _ in range(REPEATS):
                torch.mm(first, second)
            end.record()
            torch.cuda.synchronize()
            total += count * begin.elapsed_time(end) / REPEATS / 1e3
    return tokens / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="only cases with one of these texts in their name or varied quantity"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    from solotune.hardware import machine as environment

    environment.probe()  # lets the allocator's segments grow, as in a run; it is too late once torch is loaded
    from solotune.planning import plan_inputs

    make_weights_here()
    shapes = plan_inputs.shapes_of()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory(prefix="growth-") as folder, open(args.out / "growth.jsonl", "w") as file:
        for grows, case in cases():
            if any(text in f"{grows} {case.name}" for text in args.only):
                result = {"grows": grows, "case": case.name, **measure(case, Path(folder), shapes, args.steps)}
                file.write(json.dumps(result) + "\n")
                file.flush()
                lines.append(line_of(result))
                print(lines[-1], flush=True)
                (args.out / "growth.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def measure(case: Case, folder: Path, shapes: Any, steps: int) -> dict[str, Any]:
    """What the plan chooses, what the steps took, and the ceiling; or why there is nothing to measure."""
    import torch

    from solotune.errors import DeviceError

    plan = plan_of(case, folder, shapes, None)
    if not plan.fits:
        return {"error": "no setting fits"}
    chosen = {key: getattr(plan.resolved, key) for key in SETTLED}
    try:
        measured = run(case, plan.resolved, steps)
    except (torch.OutOfMemoryError, DeviceError) as error:
        return {"chosen": chosen, "error": str(error).split("\n")[0]}
    ceiling = ceiling_tokens_per_second(case.model, case.rows * case.tokens)
    return {"chosen": chosen, **measured, "ceiling": ceiling}


def line_of(result: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in result:
        return f"| {result['grows']} | {result['case']} | {result['error']} | | | | |"
    speed, ceiling, chosen = result["tokens_per_second"], result["ceiling"], result["chosen"]
    settings = [chosen["base_residency"]]
    for key, words in (("gradient_checkpointing", "checkpointed"), ("base_offload", "streamed")):
        if (count := chosen[key]) is not False:
            settings.append(f"{'all' if count is True else count} {words}")
    cells = [
        result["grows"],
        result["case"],
        ", ".join(settings),
        f"{speed:,.0f}",
        f"{result['peak_bytes'] / 2**30:.1f}",
    ]
    return "| " + " | ".join([*cells, f"{ceiling:,.0f}", f"{speed / ceiling:.0%}"]) + " |"


if __name__ == "__main__":
    main()
