"""Hostile trees: models, tokenizers, adapters, runs, data, configs and working directories that try to run code.

Each tries to make a file called MARKER, to reach the network, or to have a file outside read or written. They run
through the real command line under an audit hook (`watched`). What must hold for every one of them: no marker, no
connection, no process but the template's, nothing unpickled, nothing imported out of the tree, nothing outside opened.
(E1, E3 and E10 of the reliability notes, H6 and H7.)
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from inline_snapshot import snapshot
from safetensors.torch import save_file
from tiny import FAMILIES, SHORT_RUN, chat_rows, save_tokenizer

from tests.faults.damaged_models import FIRST, INDEX, Q, config, index
from tests.messages import error_in

ROOT = Path(__file__).parents[2]
EVIL = "import os\nopen(os.path.join({here!r}, 'MARKER'), 'w')\nclass Evil:\n    pass\n"


class Touch:
    """Unpickled, it makes the marker."""

    def __init__(self, here: Path) -> None:
        self.here = here

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.here}/MARKER'",)


Change = Callable[[Path], Any]


def python(*names: str) -> Change:
    """Python files that make the marker when they are imported."""

    def make(here: Path) -> None:
        for name in names:
            path = here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(EVIL.format(here=str(here)))

    return make


def pickled(*names: str) -> Change:
    def make(here: Path) -> None:
        for name in names:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(pickle.dumps(Touch(here)))

    return make


def both(*changes: Change) -> Change:
    def make(here: Path) -> None:
        for change in changes:
            change(here)

    return make


def model(change: Change) -> Change:
    """A change of the model folder alone."""
    return lambda here: change(here / "model")


def tokenizer(**values: Any) -> Change:
    def make(here: Path) -> None:
        path = here / "model" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return make


def settings(**values: Any) -> Change:
    def make(here: Path) -> None:
        path = here / "run.yaml"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return make


def file(name: str, content: str | bytes) -> Change:
    def make(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def link(name: str, target: str) -> Change:
    def make(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        (here / name).symlink_to(target)

    return make


def mixture(here: Path) -> None:
    """A model that goes through transformers' own loader."""
    shutil.rmtree(here / "model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES["mixtral"]()).save_pretrained(here / "model")
    save_tokenizer(here / "model")


def arrow_of_pickles(here: Path) -> None:
    from tests.dataset.readers.test_files_bad_input import arrow_extension

    arrow_extension(here / "chats.arrow")
    content = (here / "chats.arrow").read_bytes()
    (here / "chats.arrow").write_bytes(content.replace(b"touch unpickled", b"touch MARKER   "))


RUN = """model_name_or_path: model
dataset: chats.jsonl
use_cpu: true
max_length: 64
base_precision: fp32
"""


def a_run(here: Path) -> None:
    """A run directory as somebody might send it."""
    (here / "run" / "adapter").mkdir(parents=True)
    (here / "run" / "config.yaml").write_text(RUN)
    (here / "run" / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    save_tokenizer(here / "run" / "adapter")
    (here / "run" / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    save_file({"x": torch.zeros(2)}, here / "run" / "adapter" / "adapter_model.safetensors")


TRAIN, DATA, PLAN = ["train", "run.yaml"], ["data", "run.yaml"], ["plan", "run.yaml"]
CHAT = ["chat", "run", "--prompt", "hi"]
SECRET = "../outside/secret.json"
GENERATE = "def generate(model, **kwargs): pass\n"
ESCAPE = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
REACH = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
JUNK = '{"event": "step", "step": 1, "total_steps": 2, "peak_bytes": 1, "loss": 2, "x": "\\u001b]", "__reduce__": 1}\n'

TREES: dict[str, tuple[Change, list[str], tuple[int, ...]]] = {
    # --- models
    "auto_map": (model(both(config(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
                            python("evil.py"))), TRAIN, (0,)),
    "auto_map of an unknown type": (model(both(config(auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"),
                                               python("evil.py"))), PLAN, (2,)),
    "auto_map elsewhere": (model(config(auto_map={"AutoConfig": "org/evil--evil.Evil"})), DATA, (0,)),
    "trust_remote_code": (model(both(config(trust_remote_code=True), python("modeling_llama.py"))), TRAIN, (2,)),
    "attention kernel": (model(config(attn_implementation="org/kernel")), TRAIN, (2,)),
    "internal kernel": (model(config(_attn_implementation_internal="org/kernel")), TRAIN, (2,)),
    "kernel config": (model(config(kernel_config={"RMSNorm": "org/kernel:Evil"})), PLAN, (2,)),
    "python beside the weights": (model(python("modeling_llama.py", "tokenization_llama.py", "configuration_llama.py",
                                               "__init__.py", "setup.py", "conftest.py")), DATA, (0, 3)),
    "custom generate": (model(both(file("custom_generate/generate.py", GENERATE), python("custom_generate/evil.py"),
        file("generation_config.json", '{"custom_generate": "evil", "cache_implementation": "evil.E"}'))), TRAIN, (0,)),
    "line break in model_type": (model(config(model_type="llama\nimport os; os.system('touch MARKER')")), TRAIN, (2,)),
    "pickle alone": (model(both(pickled("pytorch_model.bin"), lambda f: [p.unlink() for p in f.glob("*safetensors*")])),
                     TRAIN, (2,)),
    "pickle in the index": (model(both(pickled("pytorch_model.bin"), index(lambda m: m.update({Q: "pytorch_model.bin"})
                                                                           ))), TRAIN, (2,)),
    "pickles beside": (model(pickled("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth",
                                     "scheduler.pt", "vhead_file.bin", "value_head.bin")), TRAIN, (0,)),
    "index of pickles": (model(both(pickled("a.bin"), file("pytorch_model.bin.index.json",
        '{"weight_map": {"a": "a.bin"}}'), lambda f: [(f / name).unlink() for name in (INDEX, FIRST)])), TRAIN, (2,)),
    "weights outside": (model(index(lambda m: m.update({Q: "../../outside/secret.safetensors"}))), TRAIN, (2,)),
    "weights by link": (model(link(FIRST, "../../outside/secret.safetensors")), TRAIN, (2,)),
    "config by link": (model(link("config.json", "../../outside/secret.json")), TRAIN, (2,)),
    "index by link": (model(link(INDEX, "../../outside/secret.json")), TRAIN, (2,)),
    "generation config by link": (model(link("generation_config.json", "../../outside/secret.json")), TRAIN, (2,)),
    "adapter beside a mixture": (both(mixture, model(both(pickled("adapter_model.bin", "corda.pt"), python("evil.py"),
        file("adapter_config.json", json.dumps({"peft_type": "LORA", "auto_mapping": {"base_model_class": "Evil",
        "parent_library": "evil"}, "base_model_name_or_path": "../outside", "corda_config": {"cache_file": "corda.pt"}})
        )))), TRAIN, (0, 2)),
    # --- tokenizers
    "tokenizer's auto_map": (both(tokenizer(auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"),
                                  model(python("evil.py"))), DATA, (2,)),
    "tokenizer's class a model": (both(tokenizer(tokenizer_class="LlamaForCausalLM"),
                                       model(pickled("pytorch_model.bin"))), DATA, (2,)),
    "tokenizer's class a trainer": (tokenizer(tokenizer_class="Trainer"), DATA, (2,)),
    "tokenizer's class unknown": (both(tokenizer(tokenizer_class="EvilTokenizer"),
                                       model(python("tokenization_evil.py"))), DATA, (0, 2, 3)),
    "tokenizer's files outside": (tokenizer(vocab_file=SECRET, tokenizer_file=SECRET, merges_file=SECRET), DATA,
                                  (0, 2, 3)),
    "tokenizer by link": (model(link("tokenizer.json", "../../outside/secret.json")), DATA, (2,)),
    "template by link": (model(link("chat_template.jinja", "../../outside/secret.json")), DATA, (2,)),
    "template runs a command": (model(file("chat_template.jinja", ESCAPE)), DATA, (2,)),
    "template walks the classes": (model(file("chat_template.jinja", REACH)), DATA, (2,)),
    "template includes": (model(file("chat_template.jinja", "{% include '../outside/secret.json' %}")), DATA, (2,)),
    "template beside": (both(settings(chat_template_path="evil.jinja"), file("evil.jinja", ESCAPE)), DATA, (2,)),
    # --- data
    "dataset with a script": (both(settings(dataset="rows"), python("rows/rows.py", "rows/__init__.py"),
        file("rows/dataset_infos.json", '{"_target_": "os.system"}'),
        lambda f: shutil.copy(f / "chats.jsonl", f / "rows" / "train.jsonl")), DATA, (0, 3)),
    "dataset of pickles": (both(settings(dataset="rows.pkl"), pickled("rows.pkl")), DATA, (2,)),
    "dataset of torch": (both(settings(dataset="rows"), pickled("rows/train.pt", "rows/train.bin")), DATA, (2,)),
    "arrow with a Python type": (both(settings(dataset="chats.arrow"), arrow_of_pickles), DATA, (2,)),
    "rows that name code": (file("chats.jsonl", json.dumps({"messages": [{"role": "user", "content": "!!python/object "
        "{{ 1 }} ${x} `touch MARKER` $(touch MARKER)", "__reduce__": "os.system", "_target_": "os.system"},
        {"role": "assistant", "content": "=cmd|' /C touch MARKER'!A0"}]}) + "\n"), DATA, (0, 2, 3)),
    "a name that is a command": (both(settings(dataset="$(touch MARKER);.jsonl"),
        lambda f: shutil.copy(f / "chats.jsonl", f / "$(touch MARKER);.jsonl")), DATA, (0, 3)),
    # --- configs
    "config with Python": (file("run.yaml", "seed: !!python/object/apply:os.system ['touch MARKER']\n"), TRAIN, (2,)),
    "config with a target": (settings(_target_="os.system", args=["touch MARKER"]), TRAIN, (2,)),
    "config with an interpolation": (settings(output_dir="${oc.env:HOME}/$(touch MARKER)", dataset="none.jsonl"),
                                     TRAIN, (2,)),
    "config that trusts": (both(settings(trust_remote_code=True), model(python("evil.py"))), TRAIN, (2,)),
    # --- runs
    "adapter a pickle": (both(a_run, pickled("run/adapter/adapter_model.bin"),
        lambda f: (f / "run/adapter/adapter_model.safetensors").unlink()), CHAT, (5,)),
    "adapter that names code": (both(a_run, python("run/adapter/evil.py"), file("run/adapter/adapter_config.json",
        json.dumps({"peft_type": "LORA", "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
                    "megatron_core": "evil", "r": 16}))), CHAT, (5,)),
    "adapter's tokenizer": (both(a_run, python("run/adapter/evil.py"), file("run/adapter/tokenizer_config.json",
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))), CHAT, (2,)),
    "adapter by link": (both(a_run, link("run/adapter/adapter_model.safetensors",
                                         "../../../outside/secret.safetensors")), CHAT, (2,)),
    "checkpoint of pickles": (both(a_run, pickled("run/checkpoints/step-000001/rng_state.pth",
        "run/checkpoints/step-000001/optimizer.pt", "run/checkpoints/step-000001/optimizer.safetensors")),
        [*TRAIN, "output_dir=run", "--resume"], (0, 2, 4, 5)),
    "records that name code": (both(a_run, file("run/metrics.jsonl", JUNK * 3)), ["runs", "--root", "."], (0,)),
}  # fmt: skip


MESSAGES = {
    "tokenizer's auto_map": snapshot("""\
model/tokenizer_config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {'AutoTokenizer': ['evil.Evil', None]}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
"""),
    "adapter's tokenizer": snapshot("""\
run/adapter/tokenizer_config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {'AutoTokenizer': ['evil.Evil', None]}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
"""),
    "tokenizer's class a model": snapshot("""\
model/tokenizer_config.json: tokenizer_class is not a tokenizer class
  seen:    'LlamaForCausalLM'
  allowed: a tokenizer class of transformers\
"""),
    "tokenizer's class a trainer": snapshot("""\
model/tokenizer_config.json: tokenizer_class is not a tokenizer class
  seen:    'Trainer'
  allowed: a tokenizer class of transformers\
"""),
    "tokenizer by link": snapshot("""\
model/tokenizer.json: a link to a file outside the folder
  seen:    <tmp>/outside/secret.json
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
"""),
    "template by link": snapshot("""\
model/chat_template.jinja: a link to a file outside the folder
  seen:    <tmp>/outside/secret.json
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
"""),
    "adapter that names code": snapshot("""\
run/adapter/manifest.json: the manifest cannot be used: the file does not exist
  change:  solotune verify run lists all damaged files\
"""),
    "dataset of pickles": snapshot("""\
rows.pkl: not a data file
  seen:    .pkl
  allowed: jsonl, json, csv, tsv, parquet, arrow; the text formats also as .gz or .zst\
"""),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory, sharded: Path) -> dict[str, Any]:
    """All trees, run one after the other in one watched process: name -> what it did."""
    base = tmp_path_factory.mktemp("hostile")
    outside = base / "outside"
    outside.mkdir()
    for name in ("secret.json", "secret.safetensors"):
        (outside / name).write_text("{}")
    places = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(ROOT / "src"), "/usr", "/proc", "/sys"]
    places += ["/dev", "/etc/mime.types", "/etc/localtime", "/lib", str(base / "home"), str(base / "scratch")]
    places += [os.path.realpath(sys.prefix), os.path.realpath(str(ROOT / ".venv"))]
    runs = []
    for number, (_, (change, argv, _)) in enumerate(TREES.items()):
        here = base / f"tree-{number}"
        shutil.copytree(sharded, here / "model")
        (here / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(8)))
        usual = {"model_name_or_path": "model", "dataset": "chats.jsonl", "validation_size": 0, "max_length": 64,
                 "base_precision": "fp32", "use_cpu": True, "output_dir": "made", "lora_r": 4, "max_steps": 1,
                 "lora_target_modules": ["q_proj"]}  # fmt: skip
        (here / "run.yaml").write_text(json.dumps(usual))
        change(here)
        runs.append({"folder": str(here), "argv": argv})
    (base / "scratch").mkdir()
    plan = {"allowed": sorted(set(places)), "source": str(ROOT / "src"), "runs": runs}
    (base / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "HOME": str(base / "home"), "XDG_CACHE_HOME": str(base / "home"),
                   "HF_HOME": str(base / "home"), "TMPDIR": str(base / "scratch"), "HF_HUB_OFFLINE": "1",
                   "TORCHINDUCTOR_CACHE_DIR": str(base / "scratch")}  # fmt: skip
    program = str(Path(__file__).with_name("watched.py"))
    done = subprocess.run([sys.executable, program, str(base / "plan.json")], env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(zip(TREES, map(json.loads, done.stdout.splitlines()), strict=True))
    for one, run in zip(found.values(), runs, strict=True):
        one["markers"] = [str(path) for path in Path(run["folder"]).rglob("MARKER*")]
    for name in ("secret.json", "secret.safetensors"):
        assert (outside / name).read_text() == "{}"
    assert sorted(os.listdir(outside)) == ["secret.json", "secret.safetensors"]
    return found


@pytest.mark.parametrize("name", TREES)
def test_hostile_trees_do_nothing(name: str, trees: dict[str, Any]) -> None:
    found, codes = trees[name], TREES[name][2]
    assert found["code"] in codes, found["shown"]
    assert not found["markers"] and not found["found"], found
    assert "Traceback" not in found["shown"]
    if name in MESSAGES:  # refused by ourselves, not by luck in a library
        assert error_in(found["shown"]) == MESSAGES[name]


def test_there_are_at_least_thirty_and_the_watch_sees_what_it_watches(tmp_path: Path) -> None:
    """The trees, done by hand as another tool would: each kind of event is seen."""
    assert len(TREES) >= 30
    from tests.faults import watched

    before = watched.watching, watched.ALLOWED
    sys.addaudithook(watched.hook)  # cannot be taken off again, and does nothing unless it watches
    (tmp_path / "secret").write_text("x")
    watched.FOUND.clear()
    watched.ALLOWED, watched.watching = ("/nowhere/",), True
    try:
        (tmp_path / "secret").read_text()
        subprocess.run(["true"], check=True)
        pickle.loads(pickle.dumps(Touch))
    finally:
        watched.watching, watched.ALLOWED = before
    assert set(watched.FOUND) >= {"opened", "started", "pickle.find_class"}


PLANTED = ("torch", "json", "transformers", "jinja2", "safetensors", "sitecustomize", "usercustomize", "click", "rich",
           "pydantic", "yaml", "numpy", "markupsafe", "readline")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sharded: Path) -> SimpleNamespace:
    """`python -m solotune train --json` in a process of its own, in a folder of Python files that nobody should import.

    Where Python looks for packages lies one called `kernels`, which bitsandbytes would ask for native code from the
    hub. One process for the three tests: what it imports takes most of its time.
    """
    here, packages = tmp_path_factory.mktemp("planted"), tmp_path_factory.mktemp("packages")
    python(*(f"{name}.py" for name in PLANTED), "solotune_plugin/__init__.py")(here)
    (packages / "kernels.py").write_text(f"def get_kernel(*_, **__):\n    open({str(packages / 'MARKER')!r}, 'w')\n")
    shutil.copytree(sharded, here / "model")
    (here / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    keys = {**SHORT_RUN, "model_name_or_path": "model", "dataset": "chats.jsonl", "validation_size": 10,
            "output_dir": "run", "max_steps": 1, "num_samples": 2, "max_new_tokens": 2}  # fmt: skip
    (here / "run.yaml").write_text(json.dumps(keys))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{packages}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-X", "importtime", "-m", "solotune", "train", "run.yaml", "--json"]
    done = subprocess.run(command, cwd=here, env=environment, text=True, stdin=subprocess.DEVNULL, capture_output=True)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    assert done.returncode == 0, said[-3000:]
    return SimpleNamespace(here=here, packages=packages, out=done.stdout, said=said, imported=imported)


def test_python_files_in_the_working_directory_are_not_imported(trained: SimpleNamespace) -> None:
    """Not even by `python -m`, which looks there first; the `solotune` command does not look there at all."""
    assert {"torch", "transformers", "safetensors", "pydantic"} <= trained.imported
    assert not list(trained.here.rglob("MARKER"))


def test_bitsandbytes_is_imported_without_fetching_kernels(trained: SimpleNamespace) -> None:
    """Where the package `kernels` is installed it would be asked for native code from the hub."""
    assert "bitsandbytes" in trained.imported
    assert not (trained.packages / "MARKER").exists()


def test_json_is_one_object_on_stdout(trained: SimpleNamespace) -> None:
    """Of a whole process, with what its libraries write there."""
    assert "Trainable parameters: " in trained.said
    result = json.loads(trained.out)
    assert result["run"] == "run"
    assert result["evaluation"]["tuned"]["tokens"] > 0
    assert result["trainable_fits"][0] == {
        "r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
