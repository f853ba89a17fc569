"""Child process that compiles and renders chat templates; started by `template_sandbox` with `python -I -S`.

It imports Jinja and nothing of solotune or transformers, has no environment, and after warm-up it can open no file,
make no socket, write no byte and start no process: its limits forbid it. What is left to a hostile template is time
and memory, and those are limited too. A template that escapes Jinja's sandbox finds no access tokens here.

    request   length, then marshal of (number of the template, its source or None, its variables or None, whether the
              spans of its `generation` blocks are wanted)
    answer    kind, length, then UTF-8: `t` text, `g` the spans as a line of JSON, then the text, `e` error message of
              the template, `s` line and message of a syntax error, `m` too much memory, `l` text too long

The environment is that of transformers' `apply_chat_template`; the output is tested to be equal, template by template.
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
    """Build Jinja's sandbox with what transformers adds to it: loop controls, `generation` blocks, four functions.

    It is long because these classes need Jinja, which is imported here and not with the file.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer: its content is rendered, and its span noted where spans are wanted."""

        tags = {"generation"}  # noqa: RUF012

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            environment.extend(noted=None)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            text = caller()
            if (noted := self.environment.noted) is not None:  # type: ignore[attr-defined]
                blocks, spans = noted
                begin = sum(map(len, blocks))
                spans.append((begin, begin + len(text)))
            return text

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that lead to Python's internals."""

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
    """Compiled templates of one parent process, by number."""

    def __init__(self, max_characters: int) -> None:
        self._environment = environment()
        self._templates: dict[int, Any] = {}
        self._max_characters = max_characters

    def answer(
        self,
        number: int,
        source: str | None,
        variables: dict[str, Any] | None,
        is_marked: bool = False,
        num_bytes: int = 0,
    ) -> tuple[bytes, str]:
        """Render a template; returns (kind, text) as in the module's docstring."""
        import jinja2

        try:
            if source is not None:
                self._templates[number] = self._environment.from_string(source)
            if variables is None:
                return b"t", ""
            spans, text = self._rendered(self._templates[number], variables, is_marked)
        except jinja2.TemplateSyntaxError as error:
            return b"s", f"{error.lineno}\n{error.message}"[:2000]
        except MemoryError:
            return b"m", ""
        except Exception as error:  # a template is foreign code: it can raise anything
            return b"e", (str(error).strip() or type(error).__name__)[:2000]
        if is_marked:
            text = f"{json.dumps(spans)}\n{text}"
        if len(text) > max(self._max_characters, 4 * num_bytes):
            return b"l", f"{len(text):,}"
        return (b"g" if is_marked else b"t"), text

    def _rendered(self, template: Any, variables: dict[str, Any], is_marked: bool) -> tuple[list[Any], str]:
        """The spans of its `generation` blocks as transformers counts them, if wanted, and the text."""
        if not is_marked:
            return [], template.render(**variables)
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        self._environment.noted = (blocks, spans)
        try:
            blocks.extend(template.generate(**variables))
        finally:
            self._environment.noted = None
        return spans, "".join(blocks)


def main(cpu_seconds: float, max_bytes: int, max_characters: int) -> None:
    """Answer requests until the parent ends."""
    renderer = Renderer(max_characters)
    # trigger imports of first use and first error now: later no file can be opened
    warm = "{{ strftime_now('%d %b %Y') }}{% for a in [1] %}{{ a | tojson }}{% endfor %}{{ raise_exception('x') }}"
    renderer.answer(-1, warm, {})
    renderer.answer(-2, "{% if %}", {})
    renderer.answer(-3, "{{ 1 / 0 }}{{ ''.__class__ }}", {})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    for what, limit in (
        (resource.RLIMIT_AS, max_bytes),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := requests.read(4):
        request = requests.read(*struct.unpack("<I", head))
        number, source, variables, is_marked = marshal.loads(request)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal ends the process, even inside C code
        kind, text = renderer.answer(number, source, variables, is_marked, len(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, kind, text)


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
