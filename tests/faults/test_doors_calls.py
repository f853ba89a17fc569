"""The list of banned calls: nothing in the package makes one, and each of them would be seen. (E2)"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = runpy.run_path(str(ROOT / "scripts" / "lint_calls.py"))

SEEN = [
    ("import pickle", "import of pickle"),
    ("from pickle import loads", "import of pickle"),
    ("import dill as d", "import of dill"),
    ("import marshal", "import of marshal"),
    ("import tarfile", "import of tarfile"),
    ("from zipfile import ZipFile", "import of zipfile"),
    ("import yaml", "import of yaml"),
    ("torch.load(path)", "call of torch.load"),
    ("torch.load(path, weights_only=True)", "call of torch.load"),
    ("np.load(path)", "call of np.load"),
    ("eval(text)", "call of eval"),
    ("exec(text)", "call of exec"),
    ("compile(text, 'x', 'exec')", "call of compile"),
    ("os.system(text)", "call of os.system"),
    ("os.popen(text)", "call of os.popen"),
    ("subprocess.run(text, shell=True)", "shell"),
    ("subprocess.run(text, shell=wanted)", "shell"),
    ("yaml.unsafe_load(text)", "call of yaml.unsafe_load"),
    ("YAML(typ='unsafe')", "YAML of another type than rt or safe"),
    ("YAML(typ=kind)", "YAML of another type than rt or safe"),
    ("shutil.unpack_archive(path)", "call of shutil.unpack_archive"),
    ("runpy.run_path(path)", "call of runpy.run_path"),
    ("input()", "call of input"),
    ("open(path)", "open opens a file past regular_files.py"),
    ("path.open('rb')", "path.open opens a file"),
    ("path.open()", "path.open opens a file"),
    ("path.open(mode='r')", "path.open opens a file"),
    ("(folder / 'x').read_text()", "read_text opens a file"),
    ("path.read_bytes()[:10]", "read_bytes opens a file"),
    ("os.open(path, os.O_RDONLY)", "os.open opens a file"),
    ("gzip.open(path)", "gzip.open opens a file"),
    ("load_dataset(name, trust_remote_code=True)", "trust_remote_code other than a written False"),
    ("AutoTokenizer.from_pretrained(x)", "AutoTokenizer.from_pretrained without trust_remote_code=False written out"),
    ("AutoTokenizer.from_pretrained(x, **options)", "without trust_remote_code=False written out"),
    ("AutoTokenizer.from_pretrained(x, trust_remote_code=flag)", "trust_remote_code other than a written False"),
    ("AutoConfig.from_pretrained(x)", "without trust_remote_code=False written out"),
    ("AutoModelForCausalLM.from_config(c, trust_remote_code=False)", "without attn_implementation"),
    ("AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False, attn_implementation='sdpa')",
     "without use_safetensors=True written out"),
    ("import jinja2", "import of jinja2"),
    ("from jinja2.sandbox import SandboxedEnvironment", "import of jinja2"),
    *((source, "a chat template outside the sandbox") for source in (
        "tokenizer.apply_chat_template(chat, tokenize=False)",
        "render = tokenizer.apply_chat_template",
        "getattr(tokenizer, 'apply_chat_template')(chat)",
        "processor.tokenizer.encode_message_with_chat_template(message)",
        "from transformers.utils.chat_template_utils import render_jinja_template",
        "from transformers.utils import chat_template_utils as utils",
        "import transformers.utils.chat_template_utils",
        "transformers.pipeline('text-generation', model)",
        "from transformers import TextGenerationPipeline",
    )),
]  # fmt: skip


def test_the_package_makes_none_of_them() -> None:
    assert LINT["main"]([str(ROOT / "src" / "solotune")]) == 0


@pytest.mark.parametrize(("source", "words"), SEEN)
def test_each_is_seen_with_its_line(source: str, words: str) -> None:
    found = list(LINT["problems"](f"x = 1\n{source}\n", "some.py"))
    assert any(line == 2 and words in what for line, what in found), found


def test_what_is_allowed_is_not_reported() -> None:
    for source in ("RunDirectory.open(path)", "read_bytes(path, 10)", "open_regular(path)",
                   "subprocess.run([x], shell=False)", "YAML(typ='rt')", "import json", "re.compile(x)", "model.eval()",
                   "render_chat(tokenizer, chat)", "tokenizer.get_chat_template()", "x = 'as apply_chat_template does'",
                   "AutoTokenizer.from_pretrained(x, trust_remote_code=False)"):  # fmt: skip
        assert not list(LINT["problems"](source, "some.py")), source
