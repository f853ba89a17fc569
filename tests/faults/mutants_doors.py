"""Protections of the doors, taken out one at a time: the test that is named must then fail.

    python tests/faults/mutants_doors.py [WORD ...]     # all, or those whose name has one of the words

Each mutant is a copy of src/ with one text replaced, in a folder of its own, and one test run on it. A mutant that
survives means that the protection could be lost without anybody noticing; a text that is no longer found, that this
list is out of date (`test_doors_mutants` looks at that in the suite, since running all takes minutes).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    killed_by: str


def at(module: str, test: str) -> str:
    return f"tests/faults/test_doors_{module}.py::{test}"


DAMAGED, CONFIGS = "test_damaged_models_are_refused", "test_damaged_configs_are_refused"
HOSTILE = "test_hostile_trees_do_nothing"
MUTANTS = [
    Mutant("config.json may name code", "hub/hf_config.py", "    refuse_code(path, raw)\n", "",
           at("model_config", "test_88_the_reader_of_config_json_refuses_code_itself")),
    Mutant("code deep inside config.json", "hub/hf_config.py",
           '        refuse_code(path, item, f"{name}.", is_known)\n', "",
           at("model_config", f"{CONFIGS}[88 deep inside]")),
    Mutant("an attention of anybody's", "hub/hf_config.py", "value in IMPLEMENTATIONS", "bool(value)",
           at("model_config", f"{CONFIGS}[88 internal]")),
    Mutant("a config key may replace a method", "hub/hf_config.py", "callable(getattr(kind, key)) or", "False and",
           at("model_config", f"{CONFIGS}[88 a method replaced]")),
    Mutant("sizes without bounds", "hub/hf_config.py", "    _refuse_sizes(path, raw)\n", "",
           at("model_config", f"{CONFIGS}[89 10^12 words]")),
    Mutant("quantised checkpoints", "hub/hf_config.py", "    refuse_quantised(folder, raw)\n", "",
           at("model", f"{DAMAGED}[85 unknown method]")),
    Mutant("a key twice in JSON", "hub/safe_files.py", "len(made) < len(pairs)", "False",
           at("model_config", f"{CONFIGS}[89 key twice]")),
    Mutant("links out of the folder", "hub/safe_files.py", "not target.is_relative_to(root) and", "False and",
           at("model", f"{DAMAGED}[87 link out]")),
    Mutant("links that only libraries open", "hub/safe_files.py",
           "if path.suffix in READ and not is_plain and path.exists():", "if False:",
           at("adapter", "test_96_adapters_that_are_refused[a link]")),
    Mutant("names out of the folder", "model/weight_files.py", "Path(name).name != name or not", "not",
           at("model", f"{DAMAGED}[87 ../]")),
    Mutant("pickles in the index", "model/weight_files.py", 'or not name.endswith(".safetensors")', "",
           at("model", f"{DAMAGED}[87 a pickle]")),
    Mutant("index against files", "model/weight_files.py", "    if weight_map is None:\n        return\n", "    return\n",
           at("model", f"{DAMAGED}[80 index lacks a tensor]")),
    Mutant("holes in a file", "hub/safetensors_header.py", "if entry.begin != offset:", "if entry.begin < offset:",
           at("model", f"{DAMAGED}[77 hole]")),
    Mutant("overlaps in a file", "hub/safetensors_header.py", "if entry.begin != offset:", "if entry.begin > offset:",
           at("model", f"{DAMAGED}[77 overlap]")),
    Mutant("cut files", "hub/safetensors_header.py", "    if offset != size:", "    if False:",
           at("model", f"{DAMAGED}[76 cut by a byte]")),
    Mutant("shapes", "model/weights.py", "    if entry.shape != expected:", "    if False:",
           at("model", f"{DAMAGED}[82 another shape]")),
    Mutant("dtypes", "model/weights.py", "    if entry.dtype not in kinds:", "    if False:",
           at("model", f"{DAMAGED}[84 fp8]")),
    Mutant("missing tensors", "model/weights.py", "    if missing or unknown:", "    if unknown:",
           at("model", f"{DAMAGED}[80 tensor gone from file and index]")),
    Mutant("extra tensors", "model/weights.py", "    if missing or unknown:", "    if missing:",
           at("model", f"{DAMAGED}[81 extra tensor]")),
    Mutant("numbers that are not finite", "model/loading.py",
           "        check_finite(where, name, tensor, may_be_infinite=not isinstance(wanted, nn.Parameter))\n", "",
           at("model", f"{DAMAGED}[79 NaN]")),
    Mutant("what a generation config may say", "model/loading.py",
           "if any(type(number) is not int or number < 0 for number in numbers):", "if False:",
           at("model_config", f"{CONFIGS}[89 generation config]")),
    Mutant("a tokenizer's class", "dataset/chat/tokenizer_files.py", "_CLASS.fullmatch(kind)", "True",
           at("hostile", f"{HOSTILE}[tokenizer's class a trainer]")),
    Mutant("a tokenizer's code", "dataset/chat/tokenizer_files.py", "        refuse_code(path, raw)\n", "",
           at("hostile", f"{HOSTILE}[adapter's tokenizer]")),
    Mutant("a template's size", "dataset/chat/tokenizer_files.py", "(size := path.stat().st_size) > limit", "False",
           at("template", "test_93_templates_that_are_wrong")),
    Mutant("a template's time", "dataset/chat/template_process.py", "signal.setitimer(signal.ITIMER_PROF, cpu_seconds)",
           "pass", at("template", "test_what_takes_too_much_is_ended_and_the_next_works[power of a power]")),
    Mutant("a template's memory", "dataset/chat/template_process.py", "(resource.RLIMIT_AS, max_bytes),", "",
           at("template", "test_the_process_has_nothing_and_ends_with_its_parent")),
    Mutant("a template's files", "dataset/chat/template_process.py", "(resource.RLIMIT_NOFILE, 0),", "",
           at("template", "test_the_process_has_nothing_and_ends_with_its_parent")),
    Mutant("a template's text", "dataset/chat/template_process.py", "len(text) > max(self._max_characters, 4 * num_bytes)",
           "False", at("template", "test_what_takes_too_much_is_ended_and_the_next_works"
                                  "[string multiplied, below the memory]")),
    Mutant("a template's environment", "dataset/chat/template_sandbox.py",
           'env={name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ},', "",
           at("template", "test_the_process_has_nothing_and_ends_with_its_parent")),
    Mutant("Jinja's sandbox", "dataset/chat/template_process.py", "made = ImmutableSandboxedEnvironment(",
           "made = jinja2.Environment(", at("template", "test_what_is_refused")),
    Mutant("forged control tokens", "dataset/chat/control_tokens.py",
           'return pattern.sub(f"{marks.begin}\\\\g<0>{marks.end}", value)', "return value",
           at("tokens", "test_no_control_id_comes_out_of_a_row[chatml]")),
    Mutant("YAML's tags", "config/yaml_reader.py", "elif tag is not None:", "elif False:",
           at("config", "test_configs_that_are_refused[65 unknown tag]")),
    Mutant("YAML's aliases", "config/yaml_reader.py",
           'if isinstance(event, AliasEvent) or getattr(event, "anchor", None):', "if False:",
           at("config", "test_configs_that_are_refused[66 alias]")),
    Mutant("YAML's depth", "config/yaml_reader.py", "elif depth > max_depth:", "elif False:",
           at("config", "test_configs_that_are_refused[67 deep flow]")),
    Mutant("secrets in a config", "config/load.py", "    _refuse_secrets(values, sources)\n", "",
           at("config", "test_configs_that_are_refused[69 hub token]")),
    Mutant("secrets in an error", "cli/main.py", "    message = without_secrets(message)\n", "",
           at("config", "test_69_a_secret_is_not_shown_wherever_it_stands")),
    Mutant("secrets in a crash file", "cli/main.py", 'without_secrets(f"solotune {', '(f"solotune {',
           at("shown", "test_no_secret_of_the_environment_is_in_a_crash_file_an_error_or_the_machines_record")),
    Mutant("line breaks in a config's name", "config/yaml_reader.py", "return name if name.isprintable() else ascii(name)",
           "return name", at("config", "test_a_configs_name_cannot_write_keys_into_the_saved_config")),
    Mutant("upper bounds", "config/run_config.py", "Field(ge=1, le=1_000_000_000)", "Field(ge=1)",
           at("config", "test_wrong_values_are_refused_with_the_key[logging_steps]")),
    Mutant("escape sequences", "units.py", "return text.translate(_INERT)", "return text",
           at("shown", "test_text_is_inert_and_markup_stays_text[escape]")),
    Mutant("an adapter's config", "training/trained_run.py", "_check_adapter_config(folder, expected)", "pass",
           at("adapter", "test_96_adapters_that_are_refused[alpha]")),
    Mutant("an adapter's numbers", "model/adapter.py", "        check_finite(str(path), name, tensor)\n", "        pass\n",
           at("adapter", "test_96_adapters_that_are_refused[NaN]")),
    Mutant("links where the run writes", "run/output_dir.py", "if entry.is_symlink():", "if False:",
           at("output", "test_links_planted_for_files_of_the_run[log.txt]")),
    Mutant("somebody's folder", "run/output_dir.py", 'if entry.name not in OF_A_RUN and not entry.name.startswith("."):',
           "if False:", at("output", "test_places_that_are_refused[72 somebody's folder]")),
    Mutant("the base model's folder", "run/output_dir.py", "real.is_relative_to(os.path.realpath(model)):",
           "False:", at("output", "test_places_that_are_refused[72 below the base model]")),
    Mutant("the working directory's modules", "__main__.py", "        del sys.path[0]\n", "        pass\n",
           at("hostile", "test_python_files_in_the_working_directory_are_not_imported")),
    Mutant("kernels of bitsandbytes", "hardware/bnb.py", 'sys.modules["kernels"] = None', 'sys.modules.get("kernels")',
           at("hostile", "test_bitsandbytes_is_imported_without_fetching_kernels")),
    Mutant("versions with holes", "hardware/doctor.py", "            *_check_floors(),\n", "",
           "tests/hardware/test_doctor.py::test_versions_with_known_holes_fail"),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Runs the mutant's test on a copy with the protection taken out.

    In a fork of this process, which has imported the large libraries once; solotune itself comes from the copy.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("src", "tests", "bench", "examples", "pyproject.toml"):
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, copy / part)
        path = copy / "src" / "solotune" / mutant.file
        source = path.read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.name}: {source.count(mutant.old)} times in {mutant.file}"
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        output = copy / "output.txt"
        if (child := os.fork()) == 0:
            os._exit(_run(copy, mutant.killed_by, output))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 1), f"{mutant.name}: exit {code}\n{output.read_text()[-3000:]}"
        return code == 0


def _run(copy: Path, test: str, output: Path) -> int:
    """pytest's exit code, in the fork."""
    import pytest

    handle = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.chdir(copy)
    mine = {str(ROOT), str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "faults"), ""}
    sys.path[:] = [str(copy / "src"), str(copy), str(copy / "tests"), *(p for p in sys.path if p not in mine)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
    return int(pytest.main(["-q", "-x", "--rootdir", str(copy), "-p", "no:cacheprovider", test]))


def main(words: list[str]) -> int:
    """Prints one line a mutant; 1 if one survives."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    assert "solotune" not in sys.modules
    torch.set_num_threads(1)
    left = []
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        lives = survives(mutant)
        left += [mutant.name] if lives else []
        print(f"{'SURVIVES' if lives else 'killed'}  {mutant.name}  ({mutant.killed_by})", flush=True)
    print(f"{len(left)} survive" if left else "all killed")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
