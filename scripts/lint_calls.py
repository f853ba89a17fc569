"""Find banned calls: python scripts/lint_calls.py [FOLDER ...]. Part of `sh scripts/check`.

solotune reads files from unknown sources, so some calls are banned, whatever their arguments: calls that run code from
a file or a text (pickle, torch.load, eval), pass text to a shell, or unpack an archive. Files are opened in
`regular_files` alone, which neither waits for a FIFO or a device nor reads without a limit. Loaders of transformers
must have a literal `trust_remote_code=False`, so that no variable can turn it on. A chat template is a program too: it
runs in the child process of `template_sandbox`, and what would run it here, without limits, may not even be named.
A comment (`# noqa`) makes no exception.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile"}
BANNED_IMPORTS |= {"zipfile", "yaml", "jinja2"}
ALLOWED_IMPORTS = {  # file -> module, with the reason
    "dataset/chat/template_sandbox.py": {"marshal", "jinja2"},  # only writes marshal; asks where Jinja lies
    "dataset/chat/template_process.py": {"marshal", "jinja2"},  # the child: reads what the parent process wrote
    "report_page/render.py": {"jinja2"},  # its own templates, with autoescape; never one out of data
    "diagnosis/sources/pickle_reader.py": {"zipfile"},  # reads one bounded member into memory; nothing is unpacked
    "exporters/engine_template.py": {"jinja2"},  # splits a template into tokens; renders none
}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.execve",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "numpy.load", "np.load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "pd.read_pickle",
    "shutil.unpack_archive", "runpy.run_path", "runpy.run_module", "YAML.unsafe", "input",
}  # fmt: skip
ALLOWED_CALLS = {"display/chat.py": {"input"}}  # the prompt of `solotune chat`; nothing else may wait for input
OPENS = ("open", "os.open", "io.open", "gzip.open", "bz2.open", "lzma.open", "codecs.open", "os.fdopen")
OPEN_METHODS = ("read_text", "read_bytes", "open")  # of a Path
ALLOWED_OPENS = {  # file -> the reason
    "regular_files.py": "the one place",
    "run/fs_ops.py": "writes, with O_NONBLOCK and O_NOFOLLOW",
    "run/atomic_io.py": "looks at a lock, with O_NONBLOCK and O_NOFOLLOW",
    "runtime/watchdog.py": "the end of a pipe, or the stacks file of its own run",
    "runtime/rank_processes.py": "/proc",
    "runtime/watchdog_process.py": "/proc of the process that it watches",
    "hardware/machine.py": "/proc",
    "hardware/ram.py": "/proc and /sys",
    "report_page/render.py": "templates and scripts of this package",
    "api/train.py": "files that it has just written",
    "cli/main.py": "writes a crash file that it has made",
    "cli/output.py": "a copy of its own stdout",
    "dataset/cache.py": "its own cache, and the package's source",
    "dataset/chat/tokenizer.py": "checks that the template is a file, and its size",
    "dataset/readers/files.py": "`readers/source.py` refuses what is no regular file before it is opened",
    "dataset/readers/source.py": "as above",
    "dataset/readers/tables.py": "as above",
    "dataset/readers/text_stream.py": "as above",
    "diagnosis/sources/pickle_reader.py": "a member of an archive that is in memory",
}
RENDERERS = {  # names of transformers that run a chat template in this process; `template.render_chat` is the door
    "apply_chat_template", "encode_message_with_chat_template", "render_jinja_template", "chat_template_utils",
    "_compile_jinja_template", "_cached_compile_jinja_template", "_render_with_assistant_indices",
    "TextGenerationPipeline", "ImageTextToTextPipeline", "pipeline",
}  # fmt: skip
ALLOWED_RENDERERS = {  # file -> the reason
    "exporters/served_ids.py": "a process of its own that its parent ends, of templates that the sandbox has rendered",
}
LOADERS = ("from_pretrained", "from_config")
WRITTEN_OUT = {"trust_remote_code": False}
OF_MODELS = {"use_safetensors": True}


def problems(source: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield (line, problem) for a file; `name` is its path below the package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in {found.split(".")[0] for found in names} & BANNED_IMPORTS:
                if module not in ALLOWED_IMPORTS.get(name, ()):
                    yield node.lineno, f"import of {module}"
            if "bitsandbytes.functional" in names or ("bitsandbytes" in names and name != "hardware/bnb.py"):
                yield node.lineno, "import of bitsandbytes, past hardware/bnb.py"
        elif isinstance(node, ast.Call):
            yield from _call(node, name)
        for name_in_it in _named(node):
            if name_in_it in RENDERERS and name not in ALLOWED_RENDERERS:
                yield getattr(node, "lineno", 0), f"{name_in_it}: a chat template outside the sandbox"


def _named(node: ast.AST) -> list[str]:
    """The names in a node: of an attribute, a variable, an import; or a whole text, which `getattr` could take."""
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [node.attr] if isinstance(node, ast.Attribute) else [node.id] if isinstance(node, ast.Name) else []


def _call(node: ast.Call, name: str) -> Iterator[tuple[int, str]]:
    called = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if called in BANNED_CALLS and called not in ALLOWED_CALLS.get(name, ()):
        yield node.lineno, f"call of {called}"
    if _opens_a_file(node, called) and name not in ALLOWED_OPENS:
        yield node.lineno, f"{called} opens a file past regular_files.py"
    if called.split(".")[-1] in ("full_load", "unsafe_load"):
        yield node.lineno, f"call of {called}"
    if called.split(".")[-1] == "YAML" and "typ" in given and _literal(given["typ"]) not in ("rt", "safe"):
        yield node.lineno, "YAML of another type than rt or safe"
    if "shell" in given and _literal(given["shell"]) is not False:
        yield node.lineno, "shell"
    if "trust_remote_code" in given and _literal(given["trust_remote_code"]) is not False:
        yield node.lineno, "trust_remote_code other than a written False"
    if called.split(".")[-1] in LOADERS:
        wanted = {**WRITTEN_OUT}
        if "Model" in called:
            wanted |= OF_MODELS if called.endswith("from_pretrained") else {}
            if "attn_implementation" not in given:
                yield node.lineno, f"{called} without attn_implementation"
        for key, value in wanted.items():
            if key not in given or _literal(given[key]) is not value:
                yield node.lineno, f"{called} without {key}={value} written out"


def _opens_a_file(node: ast.Call, called: str) -> bool:
    """Whether a call opens a file: a function, or a method of Path. `RunDirectory.open(path)` opens none: its first
    argument is no mode such as "rb"."""
    if called in OPENS:
        return True
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in OPEN_METHODS:
        return False
    if node.func.attr != "open":
        return True
    first = node.args[0] if node.args else next((word.value for word in node.keywords if word.arg == "mode"), None)
    mode = None if first is None else _literal(first)
    return (isinstance(mode, str) and set(mode) <= set("rwxabt+")) or not (node.args or node.keywords)


def _literal(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else node


def main(folders: list[str]) -> int:
    """Print each problem as `path:line: problem`; returns 1 if there is one."""
    found = 0
    for folder in map(Path, folders or [str(Path(__file__).parents[1] / "src" / "solotune")]):
        for path in sorted(folder.rglob("*.py")):
            for line, what in problems(path.read_text(encoding="utf-8"), path.relative_to(folder).as_posix()):
                print(f"{path}:{line}: {what}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
