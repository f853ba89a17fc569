"""The process in which chat templates are compiled and rendered; `sandbox` starts it, with `python -I -S` on this file.

It imports Jinja and nothing of solotune or transformers, has no environment, and after it is warm it can open no file,
make no socket, write no byte and start no process: its limits forbid it. What is left to a hostile template is time
and memory, and those are limited too. A template that gets the better of Jinja's sandbox finds no tokens here.

    asked     length, then marshal of (number of the template, its source or None, what it may see or None)
    answered  kind, length, then UTF-8: `t` text, `e` what the template said against it, `s` line and message of a
              syntax error, `m` too much memory, `l` too long a text

The environment is that of transformers' `apply_chat_template`, whose texts these are, tested template by template.
"""

from __future__ import annotations

import json
import marshal
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO


def environment() -> Any:
    """Jinja's sandbox with what transformers adds to it: loop controls, `generation` blocks, four functions.

    It is long because these classes need Jinja, which is imported here and not with the file.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer; here it is rendered as if it were not there."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Without names that lead to Python's insides."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                _check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")

    class Dict:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(directives: str) -> str:
        return datetime.now().strftime(directives)

    from datetime import datetime

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


class Renderer:
    """The templates of one parent, by number."""

    def __init__(self, max_characters: int) -> None:
        self._environment = environment()
        self._templates: dict[int, Any] = {}
        self._max_characters = max_characters

    def answer(
        self, number: int, source: str | None, variables: dict[str, Any] | None, num_bytes: int = 0
    ) -> tuple[bytes, str]:
        """(kind, text) as the module's head has them."""
        import jinja2

        try:
            if source is not None:
                self._templates[number] = self._environment.from_string(source)
            if variables is None:
                return b"t", ""
            text = self._templates[number].render(**variables)
        except jinja2.TemplateSyntaxError as error:
            return b"s", f"{error.lineno}\n{error.message}"
        except MemoryError:
            return b"m", ""
        except Exception as error:  # a template is a program by somebody else: it raises what it likes
            return b"e", (str(error).strip() or type(error).__name__)[:2000]
        return (b"t", text) if len(text) <= max(self._max_characters, 4 * num_bytes) else (b"l", f"{len(text):,}")


def main(cpu_seconds: float, max_bytes: int, max_characters: int) -> None:
    """Answers until the parent is gone."""
    renderer = Renderer(max_characters)
    # what is imported at the first use, or the first mistake, has to be here before files can no longer be opened
    warm = "{{ strftime_now('%d %b %Y') }}{% for a in [1] %}{{ a | tojson }}{% endfor %}{{ raise_exception('x') }}"
    renderer.answer(-1, warm, {})
    renderer.answer(-2, "{% if %}", {})
    renderer.answer(-3, "{{ 1 / 0 }}{{ ''.__class__ }}", {})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    for what, limit in (
        (resource.RLIMIT_AS, max_bytes),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    asked, answered = sys.stdin.buffer, sys.stdout.buffer
    while head := asked.read(4):
        request = asked.read(*struct.unpack("<I", head))
        number, source, variables = marshal.loads(request)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # whose signal ends the process, in the midst of C code too
        kind, text = renderer.answer(number, source, variables, len(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answered, kind, text)


def _write(stream: BinaryIO, kind: bytes, text: str) -> None:
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        kind, content = b"e", f"its output is not valid Unicode: {error.reason}".encode()
    stream.write(kind + struct.pack("<I", len(content)) + content)
    stream.flush()


if __name__ == "__main__":
    sys.path += sys.argv[4:]  # where Jinja is
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
