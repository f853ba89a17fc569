"""The layout of src and tests: tests mirror the packages, files and functions are short, private names stay private."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SRC = ROOT / "src" / "solotune"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path for path in SRC.rglob("*.py")
}

ACROSS_PACKAGES = {
    "benches",
    "docs",
    "examples",
    "faults",
    "gpu",
}  # folders of tests of something else than one package
OF_THE_PROJECT = {"test_docs.py", "test_layout.py", "test_scripts.py"}
SHORT = 40  # lines of a module that needs no test file of its own
MAX_FUNCTION, MAX_FILE = 60, 400  # lines
TABLES = {"config/run_config.py", "diagnosis/catalogue.py"}  # files that may be longer
REASON = re.compile(r"\blong because\b")

TESTED_IN = {
    "api/test_export.py": [
        "cli.export_command",
        "cli.export_result",
        "exporters.adapter_folder",
        "exporters.artifact",
        "exporters.export_folder",
        "exporters.export_plan",
        "exporters.parity",
        "exporters.write_artifacts",
    ],
    "api/test_report.py": ["cli.report_command"],
    "report_page/test_build.py": [
        "report_page.curves_section",
        "report_page.data_section",
        "report_page.evaluation_section",
        "report_page.json_values",
        "report_page.pages",
        "report_page.resources_section",
        "report_page.settings_sections",
        "report_page.verdict_section",
    ],
    "api/test_serve.py": ["cli.serve_command"],
    "api/test_evaluate.py": ["cli.evaluate_command"],
    "evaluation/test_standard_tasks_real.py": ["evaluation.lm_eval_model"],
    "exporters/test_serve.py": ["exporters.serve_process"],
    "exporters/test_source.py": ["exporters.base_tensors"],
    "model/test_layer_blocks.py": ["model.host_blocks"],
    "exporters/test_merge_choice.py": ["exporters.measure", "exporters.probe_texts"],
    "api/test_train.py": ["api.data", "api.evaluate", "config.settings"],
    "runtime/test_world.py": ["runtime.rendezvous"],
    "cli/test_commands.py": ["__init__", "api.plan", "cli.main", "cli.output"],
    "config/test_run_config.py": ["config.describe", "config.key_aliases", "config.load", "config.write", "errors"],
    "api/test_init.py": ["api.propose", "config.translate", "config.yaml_reader"],
    "faults/test_doors_shown.py": ["config.secrets"],
    "faults/test_doors_template.py": ["dataset.chat.template_process", "dataset.chat.template_sandbox"],
    "dataset/chat/test_tokenizer.py": ["dataset.chat.tokenizer_files"],
    "faults/test_doors_model.py": ["hub.hf_config", "hub.safe_files", "hub.safetensors_header", "model.weights"],
    "faults/test_doors_output.py": ["run.output_dir"],
    "exporters/test_gguf.py": ["exporters.gguf_process"],
    "exporters/test_gguf_artifacts.py": ["exporters.adapter_gguf"],
    "exporters/test_llama_cpp.py": ["exporters.llama_cpp_process"],
    "faults/test_running_before.py": ["api.setup", "training.disk_space"],
    "dataset/chat/test_messages_weights.py": ["dataset.chat.weights"],
    "dataset/readers/test_files.py": ["dataset.readers.json_records", "dataset.readers.row", "dataset.readers.tables"],
    "dataset/test_prepare_choices.py": ["dataset.readers.column_mapping", "dataset.render"],
    "dataset/test_prepare.py": ["dataset.data_report"],
    "dataset/test_row_store.py": ["dataset.example", "dataset.records"],
    "dataset/split/test_holdout.py": ["dataset.split.groups", "dataset.split.near_duplicates"],
    "training/test_loop.py": ["dataset.collate", "training.optimizer"],
    "training/test_loop_packing.py": ["dataset.sampler"],
    "training/test_resume.py": ["model.base_fingerprint", "training.checkpoint"],
    "display/test_progress.py": ["cli.results"],
    "cli/test_results.py": ["cli.run_list", "cli.task_table"],
    "training/test_chat_session.py": ["api.chat"],
    "evaluation/test_scores.py": ["evaluation.generation"],
    "display/test_observer.py": ["run.run_log"],
    "model/test_loading.py": ["model.empty_model", "model.lm_head"],
    "planning/test_model_shape.py": [
        "planning.curve_fit",
        "planning.layer_profile",
        "planning.profile_compiled",
        "planning.profile_eager",
    ],
    "planning/test_planner.py": [
        "planning.constants",
        "planning.gpus",
        "planning.memory",
        "planning.throughput",
    ],
    "hub/test_model_files.py": ["hub.download"],
    "run/test_atomic_io.py": ["run.fs_ops", "run.manifest"],
    "runtime/test_watchdog.py": ["runtime.watchdog_process"],
    "diagnosis/test_verdict.py": ["diagnosis.evidence"],
    "diagnosis/test_run_diagnosis.py": ["diagnosis.run_facts"],
    "diagnosis/test_data_checks.py": ["diagnosis.facts.row_facts", "diagnosis.findings"],
    "diagnosis/rules/test_rules_samples.py": ["diagnosis.facts.row_arrays"],
    "diagnosis/rules/test_rules_other_forms.py": ["diagnosis.facts.step_size"],
    "diagnosis/rules/test_leaks.py": ["diagnosis.facts.text_overlap"],
    "diagnosis/rules/test_rows.py": [
        "diagnosis.rules.duplicates",
        "diagnosis.rules.misaligned",
        "diagnosis.rules.roles",
    ],
    "diagnosis/rules/test_order.py": ["diagnosis.facts.row_order"],
    "diagnosis/rules/test_turns.py": ["diagnosis.facts.row_labels"],
    "diagnosis/rules/test_rules.py": [
        "diagnosis.catalogue",
        "diagnosis.facts.out_of_memory",
        "diagnosis.facts.rendered_chats",
        "diagnosis.facts.rows",
        "diagnosis.rules.adapter",
        "diagnosis.rules.environment",
        "diagnosis.rules.loop",
        "diagnosis.rules.order",
        "diagnosis.rules.precision",
        "diagnosis.rules.quantisation",
        "diagnosis.rules.schedule",
        "diagnosis.rules.serving",
    ],
    "diagnosis/probes/test_probes_batches.py": [
        "diagnosis.facts.labels",
        "diagnosis.facts.roles",
        "diagnosis.facts.texts",
        "diagnosis.probes.batch_isolation",
    ],
    "diagnosis/probes/test_probes_plateau.py": ["diagnosis.plateau"],
    "diagnosis/probes/test_probes_model.py": [
        "diagnosis.probes.adapter_scale",
        "diagnosis.probes.adapter_gradients",
        "diagnosis.probes.eval_determinism",
        "diagnosis.probes.generation",
        "diagnosis.probes.grad_accumulation",
        "diagnosis.probes.initial_loss",
        "diagnosis.probes.longest_batch",
        "diagnosis.probes.lr_range_test",
        "diagnosis.probes.probed_model",
        "diagnosis.probes.prompt_use",
        "diagnosis.probes.saved_adapter",
    ],
    "diagnosis/sources/test_found.py": [
        "diagnosis.sources.folder_settings",
        "diagnosis.sources.folder_steps",
        "diagnosis.sources.found_config",
        "diagnosis.sources.found_rows",
        "diagnosis.sources.surroundings",
        "diagnosis.sources.tokenized_rows",
    ],
    "diagnosis/sources/test_trainer_logs.py": [
        "diagnosis.sources.binary_logs",
        "diagnosis.sources.console_log",
        "diagnosis.sources.model_card",
        "diagnosis.sources.step_log",
    ],
    "diagnosis/sources/test_hf_trainer.py": [
        "diagnosis.sources.hf_rows",
        "diagnosis.sources.hf_settings",
        "diagnosis.sources.pickle_reader",
        "diagnosis.sources.raw_rows",
        "diagnosis.sources.trainer_defaults",
        "diagnosis.sources.trl_preprocessing",
    ],
    "diagnosis/sources/test_solotune_run.py": ["diagnosis.sources.live_model", "diagnosis.sources.run_files"],
    "api/test_diagnose.py": ["diagnosis.sources.detect", "diagnosis.sources.not_a_run"],
}
"""Test file -> the modules without a test file of their own that it tests."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules of solotune that a file imports, anywhere in it; the rules come with their package."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "solotune":
            package = node.module.removeprefix("solotune").removeprefix(".")
            found |= {package, *(f"{package}.{name.name}".removeprefix(".") for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {
                name.name.removeprefix("solotune").removeprefix(".") or "__init__"
                for name in node.names
                if name.name.split(".")[0] == "solotune"
            }
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "solotune":
            found.add(f"api.{node.attr}")
    if "diagnosis.rules" in found:
        found |= {module for module in MODULES if module.startswith("diagnosis.rules.")}
    return frozenset(found & set(MODULES))


def own_tests(module: str) -> list[Path]:
    """tests/run/test_events.py and tests/run/test_events_TOPIC.py of `run.events`."""
    folder, _, name = module.replace(".", "/").rpartition("/")
    there = sorted((TESTS / folder).glob(f"test_{name}*.py"))
    if (SRC / module.replace(".", "/")).is_dir():  # a package: also among the tests of its modules
        there += sorted((TESTS / module.replace(".", "/")).glob(f"test_{name}*.py"))
    return [path for path in there if path.stem == f"test_{name}" or path.stem.startswith(f"test_{name}_")]


def test_test_files_bear_the_names_of_modules():
    named = {path for module in MODULES for path in own_tests(module)}
    strays = [
        str(path.relative_to(TESTS))
        for path in sorted(TESTS.rglob("test_*.py"))
        if path not in named
        and path.relative_to(TESTS).parts[0] not in ACROSS_PACKAGES
        and str(path.relative_to(TESTS)) not in OF_THE_PROJECT
    ]
    assert "\n".join(strays) == ""


def test_every_module_has_a_test_file():
    elsewhere = {module for modules in TESTED_IN.values() for module in modules}
    long = [module for module, path in MODULES.items() if len(path.read_text(encoding="utf-8").splitlines()) > SHORT]
    untested = [module for module in sorted(long) if not own_tests(module) and module not in elsewhere]
    assert "\n".join(untested) == ""


def imports_of_test(path: Path) -> frozenset[str]:
    """What it and the files of helpers that it imports import."""
    helpers = re.findall(r"^from tests\.([\w.]+) import", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    files = [TESTS / f"{helper.replace('.', '/')}.py" for helper in helpers]
    return imports_of(path).union(*(imports_of(helper) for helper in files if helper.is_file()))


@pytest.mark.parametrize("name", TESTED_IN)
def test_a_file_that_tests_other_modules_reaches_them(name: str):
    """It runs the command line, or each is at most two imports behind one of its own."""
    direct = reached = imports_of_test(TESTS / name)
    for _ in range(2):
        reached = reached.union(*(imports_of(MODULES[module]) for module in reached))
    assert set(TESTED_IN[name]) <= set(MODULES), "no such module"
    assert "cli" in direct or set(TESTED_IN[name]) <= reached, set(TESTED_IN[name]) - reached


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_long_functions_and_files_say_why():
    too_long = []
    for path in MODULES.values():
        where = str(path.relative_to(SRC))
        says_why = REASON.search(ast.get_docstring(parsed(path)) or "")
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE and not (where in TABLES and says_why):
            too_long.append(where)
        for function in functions(parsed(path)):
            reason = says_why or REASON.search(ast.get_docstring(function) or "")
            if num_lines(function) > MAX_FUNCTION and not reason:
                too_long.append(f"{where}: {function.name}")
    assert "\n".join(too_long) == ""


def test_private_names_stay_in_their_package():
    taken = [
        f"{module}: {node.module}.{name.name}"
        for module, path in MODULES.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("solotune.")
        for name in node.names
        if name.name.startswith("_")
        and not name.name.startswith("__")
        and (node.module or "").split(".")[1] != module.split(".")[0]
    ]
    assert "\n".join(taken) == ""


def names_in(module: str) -> set[str]:
    """What can be imported from a module: its own names, what it imports, and the modules of a package."""
    path, found = MODULES[module], set[str]()
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    prefix = "" if module == "__init__" else f"{module}."
    return found | {one.removeprefix(prefix).split(".")[0] for one in MODULES if one.startswith(prefix)}


@pytest.mark.parametrize("folder", ["bench", "docs", "examples", "scripts", "src", "tests"])
def test_imports_in_texts_exist(folder: str):
    """Programs that tests and benches write into strings are not checked by a type checker."""
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for package, names in re.findall(r"from solotune((?:\.\w+)*) import (\w+(?:, \w+)*)", text):
            module = package.removeprefix(".") or "__init__"
            known = names_in(module) if module in MODULES else set()
            wrong += [f"{path.name}: solotune{package}.{name}" for name in names.split(", ") if name not in known]
    assert "\n".join(wrong) == ""
