"""Runs commands in one process under an audit hook and prints what they did: `python watched.py PLAN.json`.

PLAN.json: {"allowed": [folders], "runs": [{"folder": ..., "argv": [...]}, ...]}. One JSON line a run: exit code, opens
outside the allowed folders and the run's own, connections, processes other than the template's, unpickled names,
modules that came out of the run's folder. What native code opens Python's hooks do not see; the trees therefore also
carry canaries, and files outside that must not be found changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FOUND: dict[str, list[str]] = {}
ALLOWED: tuple[str, ...] = ()
WATCHED = ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
watching = False


def note(kind: str, what: object) -> None:
    FOUND.setdefault(kind, []).append(str(what)[:300])


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event == "open":
        path = arguments[0]
        if isinstance(path, (str, bytes)):
            full = os.path.realpath(os.fsdecode(path))
            if not f"{full}/".startswith(ALLOWED):  # the folder itself too: a file without a name is made there
                note("opened", full)
    elif event == "subprocess.Popen":
        command = list(map(str, arguments[1]))
        is_templates = any(word.endswith("dataset/chat/template_process.py") for word in command) and "-I" in command
        if not is_templates and os.path.basename(command[0]) != "nvidia-smi":
            note("started", command)
    elif event in WATCHED:
        note(event, arguments)


def main() -> None:
    global ALLOWED, watching
    plan = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, plan["source"])
    import torch  # noqa: F401  (imported before, so that its own start is not watched)
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from solotune import cli

    out = sys.stdout
    sys.addaudithook(hook)
    for run in plan["runs"]:
        FOUND.clear()
        os.chdir(run["folder"])
        ALLOWED = (*plan["allowed"], os.path.realpath(run["folder"]) + "/")
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            watching, started = True, time.monotonic()
            code = cli.main(run["argv"])
            watching = False
        inside = [name for name, module in sys.modules.items()
                  if str(getattr(module, "__file__", None) or "").startswith(run["folder"])]  # fmt: skip
        seconds = round(time.monotonic() - started, 2)
        found = {**FOUND, **({"imported": inside} if inside else {})}
        print(
            json.dumps({"code": code, "found": found, "seconds": seconds, "shown": shown.getvalue()[-3000:]}),
            file=out,
            flush=True,
        )


if __name__ == "__main__":
    main()
