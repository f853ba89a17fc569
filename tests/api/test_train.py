"""The whole job on a tiny model: data, train, evaluate, resume, chat, runs; what they write and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
import sys
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from tiny import CHATML, chat_rows, metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import solotune
from solotune import cli
from solotune.config.load import load_config
from solotune.display.progress import SilentDisplay
from solotune.errors import DirectoryInUseError, InputError, IntegrityError
from solotune.run.run_dir import RunDirectory


@pytest.fixture
def config(chat_config):
    return chat_config


def test_train_and_data_name_the_keys_that_nothing_reads(config, tmp_path):
    rows = chat_rows(60)
    for row in rows:
        row["messages"][-1]["lang"] = "en"
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({**row, "topic": "t"}) + "\n" for row in rows))
    notes: list[str] = []

    class Notes(SilentDisplay):
        def note(self, text: str) -> None:
            notes.append(text)

    solotune.train(config, display=Notes())
    line = "lang in 60 of 60 assistant messages, topic in 60 of 60 rows"
    assert [note for note in notes if note.startswith("not used")] == [f"not used: {line}"]
    assert solotune.data(config).report.unused_in_words() == line
    assert json.loads((tmp_path / "run/data.json").read_text())["unused_keys"] == {"lang": 60, "topic": 60}


def test_a_run_leaves_every_file_of_the_design(config, tmp_path):
    result = solotune.train(config)
    run = tmp_path / "run"
    assert result.run_dir.resolve() == run.resolve()
    expected = {
        "config.yaml",
        "environment.json",
        "data.json",
        "split.json",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "adapter",
        "evaluation.json",
        "report.html",
        "plan.json",
    }
    assert expected <= {path.name for path in run.iterdir()}
    adapter = {"adapter_model.safetensors", "adapter_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert adapter | tokenizer <= {path.name for path in (run / "adapter").iterdir()}
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation == json.loads(json.dumps(result.evaluation.to_json()))
    assert (evaluation["verdict"], evaluation["difference"]["p_value"] < 0.05) == ("better", True)
    assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"] - 5 * evaluation["difference"]["stderr"]
    assert set(evaluation["base"]) == {"loss", "stderr", "tokens"}
    assert set(evaluation["scores"]["exact_match"]) == set("base tuned difference stderr p_value verdict rows".split())
    assert [set(sample) for sample in evaluation["samples"]] == [{"where", "prompt", "reference", "base", "tuned"}] * 2
    log = (run / "log.txt").read_text()
    assert "training for 6 steps" in log and "step 6/6  held-out loss" in log
    choices = {c["key"]: c for c in json.loads((run / "environment.json").read_text())["choices"]}
    assert choices["optim"]["value"] == "adamw_torch"
    assert "CUDA" in choices["optim"]["because"]
    data = json.loads((run / "data.json").read_text())
    assert data["rows"]["read"] == 60 == data["rows"]["kept"] + sum(data["rows"]["dropped"].values())
    assert data["split"]["validation"] == 10


def test_a_preflight_stands_beside_the_plan_and_changes_nothing(config, tmp_path):
    solotune.train(config)
    tried = solotune.train({**config, "output_dir": "tried", "preflight": True})
    plain, with_it = (metrics_of(RunDirectory(tmp_path / name)) for name in ("run", "tried"))
    losses = [[e["loss"] for e in events if e["event"] == "step"] for events in (plain, with_it)]
    assert losses[0] == losses[1]
    (seen,) = [event for event in with_it if event["event"] == "preflight"]
    assert seen["step_seconds"] > 0 and seen["rows"] == 4
    plan = json.loads((tried.run_dir / "plan.json").read_text())
    assert plan["preflight"]["peak_bytes"] == seen["peak_bytes"]
    assert plan["measured"]["step_seconds"] > 0 and plan["predicted"]["fits"]
    log = (tried.run_dir / "log.txt").read_text()
    assert "preflight: the largest step (4 rows, " in log
    size = r"[\d.,]+ [GM]iB"
    planned = rf"plan: {size} peak memory of an evaluation \(budget {size}\), [\d.e-]+ s per step, \d+:\d\d in total"
    assert re.search(planned, log)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["preflight"] is None


def test_a_run_is_read_with_memory_for_its_weights_settled_anew(config, tmp_path):
    """A card with room for expanded weights may have trained what a laptop now evaluates."""
    from solotune.training.trained_run import TunedRun

    solotune.train({**config, "max_steps": 1, "save_steps": 1})
    assert load_config(tmp_path / "run" / "config.yaml").base_residency == "dequantized"  # by the plan
    assert TunedRun.open(tmp_path / "run").config.base_residency == "auto"


def test_the_adapter_is_pefts_and_gives_the_same_logits_on_the_base_it_was_trained_on(config, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import BitsAndBytesConfig

    solotune.train(config)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        config["model_name_or_path"], quantization_config=quantised, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in base.modules():  # on CPUs with AVX512-BF16, eval would repack the weights for a kernel that needs
        if hasattr(module, "support_avx512bf16_for_cpu"):  # layers 64 wide at least
            module.support_avx512bf16_for_cpu = False
    theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    loaded = get_peft_model_state_dict(theirs)
    written = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()  # PEFT only warns of keys that are missing, and drops others in silence
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    session = solotune.chat(tmp_path / "run")
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").encode("twice 7 is")])
    with torch.no_grad():
        ours = session._model.module.eval()(ids).logits
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_evaluate_gives_the_runs_figures_again(config):
    trained = solotune.train(config).evaluation
    again = solotune.evaluate("run")
    assert again.to_json() == trained.to_json()


def test_evaluate_refuses_data_that_has_changed(config, tmp_path):
    solotune.train(config)
    rows = (tmp_path / "chats.jsonl").read_text().replace("it is", "that is")
    (tmp_path / "chats.jsonl").write_text(rows)
    with pytest.raises(IntegrityError, match="the held-out rows have changed since the run"):
        solotune.evaluate("run")


class Killed(BaseException):
    """Past every handler, as a power cut."""


class KilledAt(SilentDisplay):
    """Dies after a step, as a power cut would: nothing is saved that was not saved already."""

    def __init__(self, step):
        self.when = step

    def step(self, metrics):
        if metrics.step == self.when:
            raise Killed


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("killed_at", [2, 5])  # before and after the first checkpoint
def test_resume_needs_no_hands_and_ends_bit_equal(config, tmp_path, killed_at):
    solotune.train({**config, "output_dir": "whole"})
    with pytest.raises(Killed):
        solotune.train(config, display=KilledAt(killed_at))
    with pytest.raises(DirectoryInUseError):
        solotune.train(config)
    solotune.train(config, resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    losses = [
        [event["loss"] for event in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
         if event["event"] == "step"] for name in ("whole", "run")
    ]  # fmt: skip
    assert losses[0] == losses[1]


RENDERING = ("solotune.dataset.prepare", "solotune.api.setup")


class Then(date):
    """The day of a run."""

    @classmethod
    def today(cls):
        return cls(2026, 2, 3)


class Later(date):
    """A day long after it."""

    @classmethod
    def today(cls):
        return cls(2099, 12, 31)


def test_a_run_keeps_its_date(config, chat_model, tmp_path, monkeypatch):
    """A template that writes the date: resumed and evaluated on another day, the run's rows are the same."""
    written = CHATML.replace("{% for", "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n{% for", 1)
    (tmp_path / "dated.jinja").write_text(written)
    config["chat_template_path"] = "dated.jinja"
    for module in RENDERING:
        monkeypatch.setattr(sys.modules[module], "date", Then)
    solotune.train({**config, "output_dir": "whole"})
    with pytest.raises(Killed):
        solotune.train(config, display=KilledAt(5))
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())["rendered_on"]
    assert recorded == "2026-02-03"
    for module in RENDERING:
        monkeypatch.setattr(sys.modules[module], "date", Later)
    solotune.train(config, resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["rendered_on"] == recorded
    again = solotune.evaluate("run").to_json()
    assert again["base"] == json.loads((tmp_path / "whole" / "evaluation.json").read_text())["base"]
    explicit = {**config, "output_dir": "other", "resume_from_checkpoint": "whole/checkpoints/step-000003"}
    solotune.train(explicit)
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "whole")
    assert "31 Dec 2099" in solotune.data(config).shown[0].pieces[0][0]  # a new run has the new date
    (tmp_path / "run" / "data.json").write_text('{"rendered_on": "yesterday"}')
    with pytest.raises(IntegrityError, match="rendered_on is not a date"):
        solotune.evaluate("run")


def test_resume_refuses_another_config_or_other_rows(config, tmp_path):
    with pytest.raises(Killed):
        solotune.train(config, display=KilledAt(4))
    with pytest.raises(IntegrityError, match="learning_rate has changed since this checkpoint"):
        solotune.train(config, ["learning_rate=1e-3"], resume=True)
    with open(tmp_path / "chats.jsonl", "a") as file:
        file.write(json.dumps(chat_rows(70)[69]) + "\n")
    with pytest.raises(IntegrityError, match="the training rows have changed"):
        solotune.train(config, resume=True)


def test_data_shows_what_is_learned(config):
    preview = solotune.data(config, show=2)
    assert preview.report.to_json()["split"]["train"] == 50
    for row in preview.shown:
        learned = [text for text, supervised, _ in row.pieces if supervised]
        assert len(learned) == 1
        assert learned[0].startswith("it is ") and learned[0].endswith("<|im_end|>")
        assert "".join(row.tokens) == "".join(text for text, *_ in row.pieces)


def test_data_with_packing_says_what_it_makes_of_the_rows(config):
    found = solotune.data(config, ["packing=true", "max_length=256"]).to_json()
    packing = found["packing"]
    assert packing["rows"] == found["split"]["train"] == 50
    assert packing["sequence_tokens"] == 256
    assert 1 < packing["sequences"] < 50
    assert "packing" not in solotune.data(config).to_json()


def test_a_template_without_an_end_of_turn_is_a_finding_and_exit_3(config, tmp_path, command):
    """The model would never learn to stop, and no loss curve shows it."""
    (tmp_path / "endless.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "run.yaml").write_text("model_name_or_path: x\ndataset: y\n")
    healthy = command("data", "run.yaml", *as_arguments(config))
    assert healthy.returncode == 0, healthy.stdout
    done = command("data", "run.yaml", *as_arguments({**config, "chat_template_path": "endless.jinja"}), "--json")
    assert done.returncode == 3, done.stdout
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["code"], finding["suspect"], finding["severity"]) == ("F10", "S3", "error")
    assert finding["fix"] and finding["evidence"]


def test_chat_answers_and_keeps_the_conversation_apart_from_the_base(config):
    solotune.train(config)
    session = solotune.chat("run")
    heard = []
    answer = session.reply("twice 3", on_text=heard.append)
    base = session.reply("twice 3", base=True)
    assert "".join(heard).strip() == answer
    assert base != answer
    assert [message["role"] for message in session.history] == ["user", "assistant"]


def test_runs_lists_finished_and_broken_off_ones(config):
    solotune.train({**config, "output_dir": "runs/a"})
    with pytest.raises(Killed):
        solotune.train({**config, "output_dir": "runs/b"}, display=KilledAt(4))
    first, second = solotune.runs()
    assert (first.name, first.status, first.steps) == ("a", "finished", 6)
    assert first.tuned_loss < first.base_loss
    assert (second.name, second.status, second.steps, second.total_steps) == ("b", "unfinished", 4, 6)
    assert second.tuned_loss is None


def test_init_writes_a_config_that_loads_and_names_every_key(config, tmp_path):
    path = solotune.init("some/model", "chats.jsonl", tmp_path / "new.yaml", every_key=True)
    loaded = load_config(path)
    assert (loaded.model_name_or_path, loaded.dataset) == ("some/model", "chats.jsonl")
    text = path.read_text()
    for key in type(loaded).model_fields:
        assert f"\n{key}: " in text or f"\n# {key}:" in text
    defaults = [f"# {key}:" for key in type(loaded).model_fields]
    uncommented = "\n".join(
        line.removeprefix("# ") if line.startswith(tuple(defaults)) else line for line in text.splitlines()
    )
    (tmp_path / "all.yaml").write_text(uncommented)
    assert load_config(tmp_path / "all.yaml").model_dump() == loaded.model_dump()
    with pytest.raises(InputError, match="the file exists"):
        solotune.init("some/model", "chats.jsonl", path)


# --- bad input, by the command line, as a user meets it


@pytest.fixture
def command(capfd):
    """command(*arguments) -> exit code, stdout and stderr of the command line, in this process, which has imported torch.

    What the process itself adds is tested in tests/faults/test_doors_hostile.py and in tests/cli.
    """

    def run(*arguments):
        capfd.readouterr()
        code = cli.main(arguments)
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def as_arguments(config):
    return [f"{key}={json.dumps(value)}" for key, value in config.items()]


def without(folder, target, *names):
    shutil.copytree(folder, target)
    for name in names:
        (target / name).unlink()
    return str(target)


BAD = {
    "absent file": ({"dataset": "nope.jsonl"}, None, ["nope.jsonl", "no such file"]),
    "empty data": ({}, "", ["chats.jsonl: the file is empty"]),
    "no assistant turn": ({}, '{"messages": [{"role": "user", "content": "hi"}]}\n', ["chats.jsonl:1", "assistant"]),
    "cut-off JSON": ({}, '{"messages": [\n', ["chats.jsonl:1: not valid JSON", "column 15"]),
    "no such target": (
        {"lora_target_modules": ["nope"]},
        None,
        ["lora_target_modules", "nope", "q_proj", "all-linear"],
    ),
    "wrong type": ({"lora_r": "big"}, None, ["lora_r", "'big'", "a whole number, at least 1"]),
    "unknown key": ({"micro_batch_size": 2}, None, ["micro_batch_size", "did you mean per_device_train_batch_size"]),
    "no tokenizer": (
        {"model": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]},
        None,
        ["tokenizer"],
    ),
    "no template": ({"model": ["chat_template.jinja"]}, None, ["chat template", "chat_template_path"]),
    "not a model": ({"model": ["config.json"]}, None, ["config.json"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_exit_2_with_one_clear_message_and_no_run(case, config, tmp_path, chat_model, command):
    changes, content, words = BAD[case]
    keys = {**config, **changes}
    if removed := keys.pop("model", None):
        keys["model_name_or_path"] = without(chat_model, tmp_path / "model", *removed)
    if content is not None:
        (tmp_path / "chats.jsonl").write_text(content)
    (tmp_path / "run.yaml").write_text("model_name_or_path: x\ndataset: y\n")
    done = command("train", "run.yaml", *as_arguments(keys))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_the_summary_names_this_runs_targets_first_and_others_of_the_same_count(config, tmp_path):
    """q_proj and o_proj have one shape here, so the count alone cannot tell which of them was trained."""
    result = solotune.train({**config, "max_steps": 1, "lora_target_modules": ["k_proj", "v_proj", "o_proj"]})
    (line,) = [
        line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "Trainable parameters" in line
    ]
    assert line.endswith(": r=4 on k_proj, v_proj, o_proj")
    first, *others = result.summary["trainable_fits"]
    assert first == {"r": 4, "target_modules": ["k_proj", "v_proj", "o_proj"]}
    assert {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]} in others
