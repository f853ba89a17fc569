"""A folder for Ollama: the Modelfile beside a GGUF file, with the chat template of the training in Go's language.

    write_modelfile(folder, "model-q8_0.gguf", tokenizer, "chat", system_prompt, ["<|im_end|>"])
    ollama create my-model -f Modelfile

    FROM ./model-q8_0.gguf     the model; with an adapter of its own: ADAPTER ./adapter.gguf
    TEMPLATE                   Ollama renders Go templates, not Jinja; without one it guesses by likeness
    PARAMETER stop             the texts that end an answer, beside the end tokens in the GGUF file
    SYSTEM                     the system prompt that all training rows share. Ollama gives it to every conversation
                               that has none of its own, as `solotune chat` does

TEMPLATE is written from the pieces that `turn_format` finds by probes, so its text is that of training by
construction, and tests run it in Go's own engine. Ollama gives a template only what it has understood: texts by role
(two of a role in a row become one), no reasoning, tools in another spelling than training's. So the template has no
tools, and Ollama says that the model supports none. What else differs is returned as notes.

BOS is never in the TEMPLATE: llama.cpp, which Ollama runs, adds it as the GGUF file says (`gguf.header_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from typing import TYPE_CHECKING

from solotune.dataset.chat.template import Messages
from solotune.errors import InputError
from solotune.exporters.turn_format import ROLES, TurnFormat, derive
from solotune.run.atomic_io import Folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
PASS_THROUGH = "{{ .Prompt }}"
_TWO_BYTES, _THREE_BYTES = (
    ("\\u0085", "\\u00a0"),
    (
        *("\\u1680", "\\u2028", "\\u2029", "\\u202f", "\\u205f", "\\u3000"),
        *(f"\\u20{number:02x}" for number in range(11)),
    ),
)
_ONE_BYTE = (" ", "\\n", "\\r", "\\t", "\\v", "\\f", *(f"\\x{number:02x}" for number in range(0x1C, 0x20)))


def write_modelfile(
    target: Folder,
    gguf_name: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str,
    system_prompt: str | None,
    stops: Sequence[str],
    *,
    adapter_name: str | None = None,
    rendered_on: date | None = None,
) -> list[str]:
    """Write the Modelfile; returns what Ollama does otherwise than training, in words.

    Args:
        gguf_name: the model's file in the same folder, or a model of Ollama's, for `FROM`.
        prompt_format: `chat`, or `text`: what the user writes is continued as it is.
        system_prompt: the one that all training rows share; None without one.
        stops: the texts of end tokens.
        adapter_name: the adapter's file in the same folder.
        rendered_on: the date that the template of the training saw.

    Raises:
        InputError: no template of turns, or a system prompt that a Modelfile cannot hold.
    """
    from_ = f"./{gguf_name}" if gguf_name.endswith(".gguf") else gguf_name
    lines, notes, template = [f"FROM {from_}"], [], PASS_THROUGH
    if adapter_name:
        lines.append(f"ADAPTER ./{adapter_name}")
    if prompt_format == "chat":
        turns = derive(tokenizer, rendered_on)
        template, notes = go_template(turns), notes_of(turns, rendered_on)
    lines.append(f"TEMPLATE {_quoted(template)}")
    if system_prompt is not None and prompt_format == "chat":
        _check_text(system_prompt)
        lines.append(f"SYSTEM {_quoted(system_prompt)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    target.write(MODELFILE, "\n".join(lines) + "\n")
    return notes


def notes_of(turns: TurnFormat, rendered_on: date | None = None) -> list[str]:
    """What Ollama does otherwise than training, in words."""
    notes = ["tools, and two messages of one role in a row, are not rendered as in training"]
    if turns.has_date:
        notes.append(
            f"the template writes the date; in the Modelfile it is always {rendered_on or date.today()}, as in training"
        )
    if not turns.takes_system:
        notes.append("the model's template has no system prompt: Ollama leaves one out")
    thought: Messages = [
        {"role": "user", "content": "Question"},
        {"role": "assistant", "content": "<think>\nThought\n</think>\n\nAnswer"},
        {"role": "user", "content": "Question"},
    ]
    if turns.trained(thought) is not None and turns.differs(thought):
        notes.append("training takes thoughts out of earlier answers; Ollama leaves them in if a client sends them")
    return notes


# --- the template in Go's language


def go_template(turns: TurnFormat) -> str:
    """The TEMPLATE that renders conversations from these pieces."""
    parts = [_STRIP_BOTH] if any(all(way) for way in turns.strips.values()) else []
    parts.append('{{ $before := "" }}{{ range $i, $message := .Messages }}')
    keyword = "if"
    for role in ROLES:
        if role == "system" and (turns.system_at_last is not None or not turns.takes_system):
            continue
        parts.append(f'{{{{ {keyword} eq .Role "{role}" }}}}{_lead(turns, role)}{_content(turns, role, ".Content")}')
        parts.append("{{ $before = .Role }}")
        keyword = "else if"
    parts.append("{{ end }}{{ end }}" + _between(turns, ""))
    return "".join(parts)


def _lead(turns: TurnFormat, role: str) -> str:
    """What stands before a message of a role."""
    usual = _between(turns, role)
    if role != "user" or turns.system_at_last is None:
        return usual
    before, after = map(_literal, turns.system_at_last)
    system = _content(turns, "system", "$.System")
    is_last = "eq (len (slice $.Messages $i)) 1"
    return f"{usual}{{{{ if and $.System ({is_last}) }}}}{before}{system}{after}{{{{ end }}}}"


def _between(turns: TurnFormat, role: str) -> str:
    """The text before a role, by the role before it."""
    options = {before: text for (before, after), text in turns.between.items() if after == role}
    rest = max(options.values(), key=list(options.values()).count, default="")
    cases = [(before, text) for before, text in options.items() if text != rest]
    written, keyword = "", "if"
    for before, text in cases:
        written += f'{{{{ {keyword} eq $before "{before}" }}}}{_literal(text)}'
        keyword = "else if"
    return f"{written}{{{{ else }}}}{_literal(rest)}{{{{ end }}}}" if cases else _literal(rest)


def _content(turns: TurnFormat, role: str, value: str) -> str:
    way = turns.strips.get(role, (False, False))
    if way not in ((False, False), (True, True)):
        raise InputError(
            f"the chat template cannot be written for Ollama: it strips one side of the {role}'s texts",
            change="serve the GGUF file with llama-server, which runs the template itself",
        )
    return f'{{{{ template "strip" {value} }}}}' if way[0] else f"{{{{ {value} }}}}"


def _literal(text: str) -> str:
    """A text outside of actions; in quotes where it would be taken for one, or a Modelfile would drop it."""
    pieces = []
    for character in text:
        if character == "\n" or (character.isprintable() and character != "{"):
            pieces.append(character)
        else:
            pieces.append(f'{{{{ "{_escaped(character)}" }}}}')
    return "".join(pieces)


def _escaped(character: str) -> str:
    return character if character == "{" else f"\\U{ord(character):08x}"


def _one_of(variable: str, texts: Iterable[str]) -> str:
    return f"eq {variable} " + " ".join(f'"{text}"' for text in texts)


_STRIP_BOTH = f"""\
{{{{- /* str.strip() of Python, which Go templates lack: the text without white space at its ends */ -}}}}
{{{{- define "strip" -}}}}
{{{{- $rest := . }}}}{{{{ $begin := 0 }}}}{{{{ $end := 0 -}}}}
{{{{- $seen := false }}}}{{{{ $in := false }}}}{{{{ $skip := "" -}}}}
{{{{- range $i := len . -}}}}
{{{{- $one := slice $rest 0 1 }}}}{{{{ $two := "" }}}}{{{{ $three := "" -}}}}
{{{{- if gt (len $rest) 1 }}}}{{{{ $two = slice $rest 0 2 }}}}{{{{ end -}}}}
{{{{- if gt (len $rest) 2 }}}}{{{{ $three = slice $rest 0 3 }}}}{{{{ end -}}}}
{{{{- $rest = slice $rest 1 }}}}{{{{ $space := true -}}}}
{{{{- if $skip }}}}{{{{ $skip = slice $skip 1 -}}}}
{{{{- else if {_one_of("$one", _ONE_BYTE)} -}}}}
{{{{- else if {_one_of("$two", _TWO_BYTES)} }}}}{{{{ $skip = "x" -}}}}
{{{{- else if {_one_of("$three", _THREE_BYTES)} }}}}{{{{ $skip = "xx" -}}}}
{{{{- else }}}}{{{{ $space = false }}}}{{{{ end -}}}}
{{{{- if $space }}}}{{{{ if $in }}}}{{{{ $in = false }}}}{{{{ $end = $i }}}}{{{{ end -}}}}
{{{{- else }}}}{{{{ $in = true }}}}{{{{ if not $seen }}}}{{{{ $begin = $i }}}}{{{{ $seen = true }}}}{{{{ end -}}}}
{{{{- end -}}}}
{{{{- end -}}}}
{{{{- if $in }}}}{{{{ slice . $begin }}}}{{{{ else if $seen }}}}{{{{ slice . $begin $end }}}}{{{{ end -}}}}
{{{{- end -}}}}
"""


# --- the Modelfile


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _check_text(text: str) -> None:
    """Refuse a text that Ollama's parser of Modelfiles would change."""
    dropped = sorted({character for character in text if not character.isprintable() and character not in "\t\n"})
    if dropped or '"""' in text:
        raise InputError(
            "the system prompt of the training cannot be written into a Modelfile",
            seen='three quotes (""") in it' if '"""' in text else f"characters that Ollama drops: {dropped!r}",
            change="export gguf, and serve it with llama-server and this system prompt",
        )
