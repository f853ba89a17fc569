"""Check a wheel: python scripts/check_wheel.py WHEEL [--installed | --bare [REQUIREMENT...]]

It must contain the package, its licence and nothing else; the metadata must have the command, the extras, the Python
versions and classifiers; the long description must be README.md without links to local files. With --installed it is
also installed into a new environment, and its own command makes a config for a tiny model and trains it: one minute.

That environment has nothing of its own but the wheel. The dependencies are those of the Python that runs this script,
as a path behind it, because torch alone has 200 MB. With --bare its own pip installs them too, as for a user, from the
package index; REQUIREMENTs (`torch==2.13.0`) go into the same command: minutes, and 2 GB in the temporary folder.
Prints each problem and exits with 1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
FOR_DEVELOPERS = {"dev", "docs"}  # extras that the README need not name
PYTHON = "Programming Language :: Python :: 3."


def problems(path: Path) -> Iterator[str]:
    """Yield one line for each problem of the wheel."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        info = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        commands = wheel.read(f"{info}/entry_points.txt").decode() if f"{info}/entry_points.txt" in names else ""
    package = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*") if file.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    found = {name for name in names if not name.startswith(f"{info}/")}
    yield from (f"not in the wheel: {name}" for name in sorted(package - found))
    yield from (f"in the wheel, but not in the package: {name}" for name in sorted(found - package))
    if f"{info}/licenses/LICENSE" not in names:
        yield "no LICENSE"
    if "solotune = solotune.cli:main" not in commands:
        yield "no command solotune"
    yield from _metadata_problems(metadata)


def _metadata_problems(metadata: Message) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    if set(metadata.get_all("Provides-Extra") or ()) != extras:
        yield f"the extras are not those of pyproject.toml: {', '.join(sorted(extras))}"
    if metadata["Summary"] != project["description"] or metadata["License-Expression"] != project["license"]:
        yield "summary or licence is not that of pyproject.toml"
    minors = {line.removeprefix(PYTHON) for line in metadata.get_all("Classifier") or () if line.startswith(PYTHON)}
    first, after = (int(number) for number in re.findall(r"3\.(\d+)", project["requires-python"]))
    if minors != {str(minor) for minor in range(first, after)}:
        yield f"the classifiers are not of the Pythons {project['requires-python']}"
    text = metadata.get_payload()
    assert isinstance(text, str)
    if metadata["Description-Content-Type"] != "text/markdown" or not text.startswith("# solotune"):
        yield "the long description is not README.md"
    yield from (f"link to a local file: {link}" for link in re.findall(r"\]\((?!\w+:|#)([^)]+)\)", text))
    for extra in sorted(extras - FOR_DEVELOPERS):
        if f"[{extra}]" not in text:
            yield f"the README does not name the extra [{extra}]"


def installed_problems(path: Path, requirements: list[str] | None) -> Iterator[str]:
    """Install the wheel into a new environment, and use its command; yield what fails.

    Args:
        requirements: None: with the dependencies of this Python; else all are installed, and these with them.
    """
    with tempfile.TemporaryDirectory(prefix="solotune-wheel-") as scratch:
        folder, new = Path(scratch), Path(scratch) / "venv"
        python, command = str(new / "bin" / "python"), str(new / "bin" / "solotune")
        venv.create(new, with_pip=requirements is not None)
        if requirements is None:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
            yield from _run([*pip, "install", "-qq", "--no-deps", "--no-index", str(path)], folder)
            packages = next(new.glob("lib/python*/site-packages"))
            (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        else:
            yield from _run([python, "-m", "pip", "install", "-qq", str(path), *requirements], folder)
            yield from _run([python, "-m", "pip", "check"], folder)
        _make_model_and_rows(folder)
        where = "import solotune, sys; sys.exit(not solotune.__file__.startswith(sys.argv[1]))"
        for line in (
            [python, "-c", where, str(new)],
            [command, "--version"],
            [command, "doctor"],
            [command, "explain", "F17"],
            [command, "init", "model", "chats.jsonl"],
            [command, "data", "solotune.yaml", "--json"],
            [command, "train", "solotune.yaml", "max_steps=2", "use_cpu=true", "output_dir=run"],
            [command, "verify", "run"],
            [command, "chat", "run", "--prompt", "Hello", "--json"],
        ):
            yield from _run(line, folder)


def _make_model_and_rows(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import transformers

    from tests.tiny import FAMILIES, chat_rows, save_tokenizer

    shape = FAMILIES["llama"]()
    shape.max_position_embeddings = 512
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))


def _run(command: list[str], folder: Path) -> Iterator[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**environment, "HF_HUB_OFFLINE": "1"}, check=False
    )
    shown = " ".join(Path(word).name if word.startswith("/") else word for word in command)
    print(f"{time.monotonic() - start:6.1f} s  {shown}", flush=True)
    if done.returncode:
        yield f"`{shown}` ends with {done.returncode}: {(done.stderr or done.stdout).strip()[-800:]}"


def main(path: Path, *options: str) -> int:
    found, checked = list(problems(path)), "package, metadata and description"
    if options:
        is_bare = options[0] == "--bare"
        found += installed_problems(path.resolve(), [*options[1:]] if is_bare else None)
        checked += f", installed{' with all dependencies' if is_bare else ''} and used"
    print(f"{path.name}: " + ("; ".join(found) or f"{checked}, {path.stat().st_size:,} bytes"))
    return 1 if found else 0


if __name__ == "__main__":
    if not sys.argv[1:] or (sys.argv[2:] and sys.argv[2] not in ("--installed", "--bare")):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
