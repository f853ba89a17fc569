"""Questions and answers in a plain text, by the labels that prompt formats write: `### Human:`, `USER:`, `Q:`.

    labelled_turns("USER: Why? ASSISTANT: Because.")
    [{"role": "user", "content": "Why?", "label": "USER:"}, {"role": "assistant", "content": "Because.", ...}]

A label stands at the start of a line, or behind a token in brackets (begin of text, end of the turn before). One in
capital letters may also stand inside it (Vicuna). Control tokens of other model families, which are text for this
tokenizer, count too.
"""

from __future__ import annotations

import re

_ASKS = (
    r"human|user|instruction|question|prompt|query|q|customer|client|prompter|input|frage|anweisung|nutzer"
    r"|pregunta|instrucción|usuario|pergunta|domanda|utilisateur|вопрос"
    r"|问题|问|用户|質問|ユーザー|질문"
)
_ANSWERS = (
    r"assistant|response|answer|output|reply|bot|chatbot|gpt|ai|a|model|agent|antwort|assistent|respuesta|asistente"
    r"|resposta|risposta|réponse|ответ|回答|答案|答|助手|답변"
)
"""In English, German, Spanish, Portuguese, Italian, French, Russian, Chinese, Japanese and Korean."""
_ROLES = rf"(?:{_ASKS}|{_ANSWERS}|system)"
_BEGINS = r"(?:^|(?<=\S>)|(?<=\S\]))"
_LABEL = re.compile(
    rf"{_BEGINS}[ \t]*(?:\#{{1,4}}[ ]*(?P<heading>{_ROLES})\b[ ]*:?|\**\[?(?P<line>{_ROLES})\]?\**[ ]?[:：]\**)"
    rf"|(?:^|(?<=\s))(?P<inline>USER|ASSISTANT|HUMAN|BOT|GPT):"
    rf"|(?P<inst>\[INST\])|(?P<after>\[/INST\])"
    rf"|<\|?(?:im_start|start_of_turn|start_header_id|turn|start|header_start)\|?>\s*(?P<control>{_ROLES})\b"
    rf"(?:<\|[^|<>]+\|>)?"
    rf"|<[|｜](?P<role>{_ROLES})[|｜]>"
    rf"|{_BEGINS}<(?P<tag>{_ROLES})>",
    re.MULTILINE | re.IGNORECASE,
)
_IS_QUESTION = re.compile(_ASKS, re.IGNORECASE)
_LOWER = re.compile(r"user|assistant|human|bot|gpt")
_TAIL = re.compile(r"(?:</s>|<\|[^|<>]+\|>|<[a-z_]+>|\s)+$")


def labelled_turns(text: str) -> list[dict[str, str]] | None:
    """The turns of a text whose first label is a question's and is followed by an answer; None for any other text."""
    found = [(match, role) for match in _LABEL.finditer(text) if (role := _role_of(match)) is not None]
    while found and found[0][1] == "system":
        found = found[1:]
    turns: list[dict[str, str]] = []
    ends = [*(match.start() for match, _ in found[1:]), len(text)][: len(found)]
    for (match, role), end in zip(found, ends, strict=True):
        content = _TAIL.sub("", text[match.end() : end]).strip()
        if turns and turns[-1]["role"] == role:  # an instruction and its input
            turns[-1]["content"] += "\n" + content
        else:
            turns.append({"role": role, "content": content, "label": match[0].strip()})
    is_chat = len(turns) >= 2 and turns[0]["role"] == "user" and turns[1]["role"] == "assistant"
    return turns if is_chat and all(turn["content"] for turn in turns[:2]) else None


def starts_with_label(text: str) -> bool:
    """Whether the text begins with the label of a turn; tags are parts of many messages (`<question>`)."""
    match = _LABEL.match(text.lstrip())
    return match is not None and match["tag"] is None and _role_of(match) is not None


def _role_of(match: re.Match[str]) -> str | None:
    if match["inst"] or match["after"]:
        return "user" if match["inst"] else "assistant"
    if match["inline"] is not None and _LOWER.match(match["inline"]):
        return None  # `user:` inside a sentence
    if (match["line"] or match["tag"] or "").lower() == "input":
        return None  # of a program
    name = next(part for part in match.groups() if part is not None)
    if name.lower() == "system":
        return "system"
    return "user" if _IS_QUESTION.fullmatch(name) else "assistant"
