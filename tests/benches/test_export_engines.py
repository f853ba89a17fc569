"""Exports in the real engines: llama.cpp's converters and engine, Go's templates. `sh scripts/test_export` runs these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import solotune
from bench import export_engines
from bench.export_engines import BASE, CONFIGS, ids_in_llama_cpp, prompts_in_go
from bench.real_tokenizers import FOLDER
from solotune.errors import InputError
from solotune.exporters import gguf
from solotune.exporters.llama_cpp import LlamaCpp
from solotune.exporters.ollama import PASS_THROUGH
from solotune.exporters.serve import Server, free_port
from solotune.run.atomic_io import whole_folder

pytestmark = [
    pytest.mark.export,
    pytest.mark.skipif(not BASE.is_dir(), reason="no SmolLM2: `python examples/smollm2.py` makes it"),
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def find(name: str) -> Path:
        if name == "smollm2":
            folder = tmp_path_factory.mktemp("tok") / name
            transformers.AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
            return folder
        if not (FOLDER / name).is_dir():
            pytest.skip("no tokenizers: `python -m bench.real_tokenizers` makes them")
        return FOLDER / name

    return find


@pytest.mark.parametrize("name", CONFIGS)
def test_token_ids_in_llama_cpp_are_those_of_training(name: str, folder_of: Any) -> None:
    found = ids_in_llama_cpp(folder_of(name))
    assert found["conversations"] >= 200 and found["unexplained"] == []
    assert found["differ"] == 0, found["shown"]


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go")
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_the_modelfile_in_go_are_those_of_training(name: str, folder_of: Any) -> None:
    found = prompts_in_go(folder_of(name))
    assert found["conversations"] >= 180
    assert all("tag" in conversation for conversation in found["shown"]), found["shown"]


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go")
def test_a_text_is_passed_through() -> None:
    asked = [[{"role": "user", "content": "word: "}], [{"role": "user", "content": "{{ .Prompt }}"}]]
    assert export_engines.rendered_by_go(PASS_THROUGH, asked) == ["word: ", "{{ .Prompt }}"]


def test_log_probabilities_are_those_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_engines, "QUANTIZATIONS", ("f32", "f16", "q4_k_m"))
    found = {one["artifact"]: one for one in export_engines.logits(count=2, positions=2)}
    assert found["f32"]["max_logprob_diff"] <= 1e-3
    assert found["adapter beside f32 base"]["max_logprob_diff"] <= 1e-3
    assert found["f16"]["mean_kl"] <= 1e-3
    assert found["q4_k_m"]["bytes"] < found["f16"]["bytes"] / 2 and 0 < found["q4_k_m"]["mean_kl"] < 1


def test_an_adapter_as_gguf_beside_its_base_is_what_was_trained(tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    export_engines.adapter_of(base, tmp_path / "adapter")
    result = solotune.export(tmp_path / "adapter", "adapter-gguf", base=str(BASE), quantization="f32")
    (parity,) = result.artifacts[0].parity
    assert result.ok and parity.token_ids_equal and parity.conversations >= 200
    assert parity.positions > 20 and 0 < parity.max_logprob_diff <= 1e-3


def test_what_llama_cpp_does_not_know_is_refused(tmp_path: Path, model_folder: Any) -> None:
    opt = model_folder("opt")
    with pytest.raises(InputError, match="does not know this architecture"):
        gguf.check_convertible(_with_tokenizer(opt, tmp_path / "opt"), None)
    with pytest.raises(InputError, match="does not recognise this tokenizer"):
        gguf.check_convertible(_with_tokenizer(model_folder("llama"), tmp_path / "llama", is_own=True), None)
    gguf.check_convertible(BASE, None)


def _with_tokenizer(model: Path, folder: Path, *, is_own: bool = False) -> Path:
    shutil.copytree(model, folder)
    if is_own:
        from tiny import save_tokenizer

        save_tokenizer(folder)
    else:
        transformers.AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def test_greedy_text_of_a_file_is_that_of_transformers_and_is_served(tmp_path: Path) -> None:
    """In the engine as it is compared, and through `solotune serve --engine llama.cpp`, asked by the `openai` client."""
    with whole_folder(tmp_path / "out") as target:
        path = gguf.write_gguf(BASE, target, "f32")
    openai = pytest.importorskip("openai")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with LlamaCpp(tmp_path / "out" / path.name) as engine:
        ids = engine.token_ids(QUESTION)
        continued = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        expected = [token for token in continued if token != tokenizer.eos_token_id]
        assert engine.generate(ids, 12) == expected
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["files"].keys() == {path.name}
    asked = {"model": path.name, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    with Server("llama.cpp", tmp_path / "out" / path.name, "127.0.0.1", free_port("127.0.0.1", 0)) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        assert [one.id for one in client.models.list()] == [path.name]
        whole = client.chat.completions.create(**asked)
        pieces = list(client.chat.completions.create(**asked, stream=True))
        stopped = client.chat.completions.create(**asked, logit_bias={str(tokenizer.eos_token_id): 100})
    assert whole.choices[0].message.content == tokenizer.decode(expected) and whole.usage.prompt_tokens == len(ids)
    said = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert len(said) > 2 and "".join(said) == whole.choices[0].message.content
    assert stopped.choices[0].finish_reason == "stop" and not stopped.choices[0].message.content
