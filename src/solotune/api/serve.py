"""`solotune serve`: OpenAI's API on the model of a run, on this machine."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.config.run_config import Choice
from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.errors import CheckError, IntegrityError
from solotune.result_repr import ResultRepr
from solotune.run.run_dir import EXPORT
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.exporters.serve import Server


_NO_CHATS = "trained on plain text: ask it at /v1/completions; chats are refused, since no chat template was trained"
_LLAMA_CPP_CHATS = (
    "trained on plain text: ask it at /v1/completions; llama.cpp answers chats too, in a form that was not trained"
)


@dataclass(frozen=True, repr=False)
class Serving(ResultRepr):
    """A server that answers; use it in a `with` block, or call `server.stop()`."""

    server: Server
    choices: list[Choice]
    prompt_format: str
    """`chat`, or `text` for a model that continues texts and has no use for /v1/chat/completions."""
    system_prompt: str | None
    """The one that all training rows have: the server does not add it, so requests have to."""
    notes: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The base URL, for `OpenAI(base_url=..., api_key="none")`."""
        return self.server.url

    @property
    def curl(self) -> str:
        """A request, to be tried in a shell."""
        body: dict[str, Any] = {"model": self.server.name}
        if self.prompt_format == "text":
            path, body = "completions", {**body, "prompt": "Once upon a time", "max_tokens": 64}
        else:
            system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
            path, body = "chat/completions", {**body, "messages": [*system, {"role": "user", "content": "Hello"}]}
        words = ["curl", f"{self.url}/{path}", "-H", "Content-Type: application/json"]
        return shlex.join([*words, "-d", json.dumps(body, ensure_ascii=False)])

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def figures(self) -> dict[str, object]:
        return {"url": self.url, "engine": self.server.engine, "model": self.server.model}

    def to_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "engine": self.server.engine,
            "model": self.server.name,
            "path": str(self.server.model),
            "prompt_format": self.prompt_format,
            "system_prompt": self.system_prompt,
            "curl": self.curl,
            "notes": self.notes,
        }


@quiet_libraries()
def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str | None = None,
    display: Display | None = None,
) -> Serving:
    """Serve the model of a run with OpenAI's API: `transformers serve` on the merged model, llama.cpp on a GGUF file.

    Use the result in a `with` block: `openai.OpenAI(base_url=serving.url, api_key="none")` is a client. What is not
    exported yet is exported first. Template and stop tokens are the run's own.

    Args:
        host: the address to listen at; others than loopback let every machine ask that reaches this one.
        port: 0: any free one.
        engine: `transformers` or `llama.cpp`; default: what is installed.

    Raises:
        InputError: no such run, a port that is taken, or packages that are missing.
        CheckError: the export is not the model that was trained.
        IntegrityError: exported files have changed.
    """
    with showing(display) as chosen:
        chosen.phase("looking at the run")
        from solotune.exporters.serve import LOOPBACK, Server, best_gguf, choose_engine, free_port
        from solotune.training.trained_run import TunedRun

        port = free_port(host, port)
        tuned = TunedRun.open(run)
        folder = tuned.directory.path / EXPORT
        choice = choose_engine(engine, _ggufs(folder))
        chosen.choices([choice])
        kind = "merged" if choice.value == "transformers" else "gguf"
        _ensure(tuned.directory.path, kind, chosen)
        model = folder / kind if kind == "merged" else best_gguf(_ggufs(folder))
        chosen.phase(f"starting {choice.value}")
        server = Server(str(choice.value), model.resolve(), host, port, tuned.prompt_format).start()
        notes = []
        if tuned.prompt_format == "text":
            notes.append(_NO_CHATS if kind == "merged" else _LLAMA_CPP_CHATS)
        if host not in LOOPBACK:
            notes.append(f"every machine that reaches {host} can use it: there is no key")
        return Serving(server, [choice], tuned.prompt_format, tuned.shared_system_prompt, notes)


def _ggufs(folder: Path) -> list[Path]:
    return sorted((folder / "gguf").glob("*.gguf"))


def _ensure(run: Path, kind: str, display: Display) -> None:
    """Export what is missing.

    Raises:
        CheckError: it is not the model that was trained.
        IntegrityError: it has changed.
    """
    from solotune.api.export import export
    from solotune.run.manifest import check_folder

    target = run / EXPORT / kind
    if not target.exists():
        display.note(f"{kind} is not exported yet: exporting it into {target}")
        made = export(run, kind, display=display)
        if problems := [problem for artifact in made.artifacts for problem in artifact.problems]:
            raise CheckError(f"{target}: the export is not the model that was trained", seen="; ".join(problems))
    for file, problem in check_folder(target):
        raise IntegrityError(f"{target / file}: {problem}", change=f"remove {target}, and serve again")
