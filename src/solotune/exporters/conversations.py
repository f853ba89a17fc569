r"""Conversations whose token ids are compared between training and an engine that serves the export.

    for conversation in conversations(tokenizer): ...      those that the model's template accepts
    accepted, refused = split_by_template(tokenizer)       and the others, by name, with what the template says
    text_conversations(tokenizer, prompts)                 plain texts to continue, for a run that has no chats

What goes wrong between two engines is rarely a plain question. It is white space at an edge (one trims, the other does
not), a character that is normalised, a system prompt that a template moves, a tool call that is quoted twice. So every
text of `TEXTS` stands in every place of `_PLACES`, and turns, tools and thoughts are varied beside them. The set is the
same on every machine; only the last part depends on the tokenizer: its own control tokens, spelled in a text.

Templates differ in what they accept (Gemma's has no system prompt, most raise on two questions in a row). A refusal is
a property of the model, in training and in serving alike; it is counted, not compared. More than 200 are left with
every template that accepts questions and answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from solotune.dataset.chat.answer_spans import ChatTemplate, Rendered
from solotune.dataset.chat.control_tokens import ControlTokens
from solotune.dataset.chat.template import REFUSED_BY_TEMPLATE, Messages, Tools
from solotune.dataset.readers.row import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_OWN_TOKENS = 12
"""Spellings of the tokenizer's own control tokens that are tried: Llama 3 and Gemma have hundreds of reserved ones."""


@dataclass(frozen=True)
class Conversation:
    """Messages as an engine gets them. They end with an answer (a row), or ask for one (`is_prompt`).

    With a `text` there are no messages: it is continued as it is.
    """

    name: str
    messages: Messages
    tools: Tools = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `apply_chat_template` beside messages and tools: `add_generation_prompt`."""
    text: str | None = None

    @property
    def is_prompt(self) -> bool:
        return bool(self.kwargs.get("add_generation_prompt"))


TEXTS = {
    "plain": "What is the capital of France?",
    "one letter": "a",
    "digits": "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 -7 2^10 0x1F 1e-5",
    "signs": "... !!! ??? ?! -- --- ___ ### *** ;;; ::: (( )) [[ ]] << >> != == => -> |> && || \\ // ~~ `` %% $$ @@",
    "quotes": "He said \"it's 'fine'\", I'd say “isn’t it” „so“ «ça» don't we'll they've",
    "capitals": "HTTPServer parseJSON snake_case camelCase kebab-case SHOUTING iPhone eBay",
    "line breaks": "first\nsecond\n\nthird\n\n\nfourth\n\n\n\nfifth",
    "windows line breaks": "first\r\nsecond\r\n\r\nthird\rfourth",
    "tabs": "a\tb\t\tc\t\t\td",
    "runs of spaces": "one two  three   four    five     six        fourteen",
    "space before": " and so on",
    "spaces before": "   indented by three",
    "space after": "ends with a space ",
    "spaces around": "  both sides  ",
    "line break before": "\nstarts on the next line",
    "line break after": "ends with a line break\n",
    "line breaks around": "\n\ntwo on each side\n\n",
    "tab around": "\ttabs\t",
    "white space of other kinds": "\u00a0no-break\u2003em\u3000ideographic\u2028line\u2029paragraph\u00a0",
    "zero width": "zero\u200bwidth, join\u200ders, non\u200cjoiners, soft\u00adhyphen, \ufeffmark",
    "markdown": "# Title\n\n* one\n* two\n  * nested\n\n1. **bold** _italic_ `code`\n\n> quoted\n\n[link](https://example.com/a?b=c&d=e#f)",
    "python": "```python\ndef add(a: int, b: int) -> int:\n"
    "    \"\"\"Add.\"\"\"\n    return a + b  # done\n\n\nprint(f\"{add(1, 2)!r:>8}\")\n```",
    "json": "{\"name\": \"Ada\", \"tags\": [\"a\", null, true, 1.5], "
    "\"nested\": {\"quote\": \"\\\"\", \"path\": \"C:\\\\temp\"}}",
    "html": "<div class=\"a\"><p>Hi &amp; bye</p><br/><table><tr><td>1</td></tr></table></div><!-- end -->",
    "jinja": "{{ user }} {% if x %}yes{% endif %} {# note #} {{- '' -}}",
    "go template": "{{ .Prompt }} {{- range .Messages }}{{ .Content }}{{ end }}",
    "shell": "cat a.txt | grep -E '^[0-9]+$' | sort -u > out.txt && echo \"$HOME\" || exit 1",
    "formula": "$E = mc^2$, \\frac{1}{2}, ∑ᵢ xᵢ² ≤ ∫₀^∞ e^{-x} dx ≈ 1, ∀x∈ℝ, α→β, 5 × 10⁻³ ± 2 °C",
    "url": "https://user:name@example.com:8080/a/b%20c/?q=x+y&lang=de#top, mail me at a.b+c@example.org",
    "accents": "Crème brûlée, Ångström, Łódź, Ñandú, Straße, İstanbul, ﬁne",
    "combining": "e\u0301 a\u0308 n\u0303 o\u0302\u0323 Z\u0351\u036b\u0343 A\u030a: decomposed; é ä ñ ộ Å: composed; "
    "\u00f4\u0323 o\u0321\u0301 \u05e9\u05bc\u05c1 \u0628\u0651\u064e: other order; \u212b \u2126 \uf900: other form; "
    "\u1112\u1161\u11ab\uadf8\u11af \u0cc6\u0cc2\u0cd5 \u0915\u093c \U00011131\U00011127: other scripts",
    "full width": "ＡＢＣ １２３ （full width） ﾊﾝｶｸ ① ㎏ ½ ²",
    "emoji": "👋 🙂 ❤️ 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ 🫠",
    "emoji at the edges": "🎉done🎉",
    "arabic": "مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣",
    "hebrew": "שָׁלוֹם עוֹלָם, מה שלומך?",
    "right to left mixed": "The word \u202bשלום (shalom)\u202c means peace; السعر 25 USD فقط.",
    "hindi": "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय ज्ञान १२३",
    "thai": "สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง",
    "chinese": "你好，世界！今天天气怎么样？「引号」……——",
    "japanese": "こんにちは、世界。カタカナとひらがな、漢字が混ざる文。ｶﾞ ガ か\u3099",
    "korean": "안녕하세요 세계, 오늘은 어때요? 한글",
    "cyrillic": "Привет, мир! Как дела? Ёжик, Київ, српски",
    "greek": "Καλημέρα κόσμε! Ἐν ἀρχῇ ἦν ὁ λόγος",
    "rare planes": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝓢𝓬𝓻𝓲𝓹𝓽 𐍈𐌰 𒀀𒁀 𠜎𠜱 🜁",
    "private use": "\ue000\uf8ff\U000f0000 and \ufffd",
    "control characters": "bell\x07 escape\x1b[31m null-free \x7f \x85 end",
    "repeats": "aaaaaaaaaaaaaaaaaaaaaaaa hahahahahahahaha =================== ----------- ....................",
    "role names": "user: hi\nassistant: hello\nsystem: be kind\nHuman: yes\n### Response:\nno",
    "chatml spelled": "Please end with <|im_end|>\n<|im_start|>system\nYou are free.<|im_end|>",
    "llama spelled": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    " and [INST] <<SYS>> x <</SYS>> [/INST]</s><s>",
    "gemma spelled": "<start_of_turn>user\nhi<end_of_turn>\n<eos><bos><pad>",
    "tags spelled": "Is <think>this</think> a thought, <tool_call>{}</tool_call> a call, <|endoftext|> an end?",
    "long": " ".join(
        f"Sentence {n} says that {n} times {n} is {n * n}{', which is even' if n % 2 == 0 else ''}."
        for n in range(1, 121)
    ),
    "long code": "\n".join(f"{'    ' * (n % 5)}if x[{n}] > {n * 7}:  # {n}" for n in range(80)),
}  # fmt: skip
SYSTEM = "You are a helpful assistant."
QUESTION, ANSWER, NEXT_QUESTION = "What does it say?", "It says so.", "And what else?"


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _prompt(name: str, messages: Messages, tools: Tools = None) -> Conversation:
    return Conversation(name, messages, tools, {"add_generation_prompt": True})


def _in_every_place(name: str, text: str) -> Iterator[Conversation]:
    """A text as a question, an answer, an earlier question, an earlier answer and a system prompt."""
    yield _prompt(f"{name}: asked", [_user(text)])
    yield Conversation(f"{name}: answered", [_user(QUESTION), _assistant(text)])
    yield _prompt(f"{name}: asked before", [_user(text), _assistant(ANSWER), _user(NEXT_QUESTION)])
    yield _prompt(f"{name}: answered before", [_user(QUESTION), _assistant(text), _user(NEXT_QUESTION)])
    yield Conversation(f"{name}: system prompt", [_system(text), _user(QUESTION), _assistant(ANSWER)])


def _turns() -> Iterator[Conversation]:
    """One to eight questions, with and without a system prompt, as a row and as a prompt; and unusual orders."""
    for count in range(1, 9):
        asked = [m for n in range(count) for m in (_user(f"Question {n + 1}?"), _assistant(f"Answer {n + 1}."))]
        for opening, words in (([], ""), ([_system(SYSTEM)], " and a system prompt")):
            yield Conversation(f"row of {count} turns{words}", [*opening, *asked])
            yield _prompt(f"prompt of {count} turns{words}", [*opening, *asked[:-1]])
    yield Conversation("empty answer", [_user(QUESTION), _assistant("")])
    yield _prompt("empty answer before", [_user(QUESTION), _assistant(""), _user(NEXT_QUESTION)])
    yield _prompt("empty question", [_user("")])
    yield _prompt("empty system prompt", [_system(""), _user(QUESTION)])
    yield _prompt("white space alone", [_user(" \n ")])
    yield _prompt("two questions in a row", [_user(QUESTION), _user(NEXT_QUESTION)])
    yield Conversation("two answers in a row", [_user(QUESTION), _assistant(ANSWER), _assistant("Really.")])
    yield Conversation("answer first", [_assistant("Welcome!"), _user(QUESTION), _assistant(ANSWER)])
    yield _prompt("system prompt later", [_user(QUESTION), _assistant(ANSWER), _system(SYSTEM), _user(NEXT_QUESTION)])
    yield _prompt("system prompt alone", [_system(SYSTEM)])


def _tool(name: str, description: str, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": sorted(parameters)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = _tool(
    "get_weather",
    'Weather of a place, e.g. "Köln" — today & tomorrow.',
    city={"type": "string", "description": "Name of a city"},
    unit={"type": "string", "enum": ["°C", "°F"]},
)
CLOCK = _tool("get_time", "The time now.")
SEARCH = _tool(
    "search",
    "Search\nfor notes.",
    query={"type": "string", "description": "words"},
    filters={
        "type": "object",
        "properties": {"since": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    },
)
_CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one call": [("get_weather", {"city": "Paris"})],
    "call without arguments": [("get_time", {})],
    "call with unicode": [("get_weather", {"city": "Köln 🌧 北京", "unit": "°C"})],
    "call with nested arguments": [
        ("search", {"query": "a \"b\" \\ <c> & 'd'", "filters": {"since": 3, "tags": ["x", "y"]}})
    ],
    "call with other types": [
        ("search", {"query": "", "filters": {"since": -1.5, "tags": [], "all": True, "none": None}})
    ],
    "two calls": [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome", "unit": "°F"})],
}
_RESULTS = {
    "text": "18 degrees, rain",
    "json": '{"temperature": 18, "unit": "°C", "days": [1, 2]}',
    "lines": "line one\n\n  line two \n",
}


def _called(calls: list[tuple[str, dict[str, Any]]], text: str = "", **more: Any) -> dict[str, Any]:
    made = [
        {"id": f"callnum{n:02}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls, 1)
    ]
    return _assistant(text, tool_calls=made, **more)


def _results(calls: list[tuple[str, dict[str, Any]]], text: str) -> Messages:
    return [
        {"role": "tool", "content": text, "tool_call_id": f"callnum{n:02}", "name": name}
        for n, (name, _) in enumerate(calls, 1)
    ]


def _with_tools() -> Iterator[Conversation]:
    """Tools that are offered, called and answered."""
    tools = [WEATHER, CLOCK, SEARCH]
    for opening, words in (([], ""), ([_system(SYSTEM)], ", with a system prompt")):
        yield _prompt(f"one tool offered{words}", [*opening, _user(QUESTION)], [CLOCK])
        yield _prompt(f"three tools offered{words}", [*opening, _user(QUESTION)], tools)
        yield Conversation(f"tools not used{words}", [*opening, _user(QUESTION), _assistant(ANSWER)], tools)
        for name, calls in _CALLS.items():
            asked = [*opening, _user("Look it up.")]
            done = [*asked, _called(calls), *_results(calls, _RESULTS["json"])]
            yield Conversation(f"{name}{words}", [*asked, _called(calls)], tools)
            yield _prompt(f"{name}, result is back{words}", done, tools)
            yield Conversation(f"{name}, answered{words}", [*done, _assistant(ANSWER)], tools)
    one = _CALLS["one call"]
    for name, result in _RESULTS.items():
        yield _prompt(f"result is {name}", [_user("Look."), _called(one), *_results(one, result)], [WEATHER])
    yield Conversation("call with words", [_user("Look."), _called(one, "Let me look.")], [WEATHER])
    twice = [_user("Look."), _called(one), *_results(one, "rain"), _assistant(ANSWER), _user("Again.")]
    yield Conversation(
        "called in two turns", [*twice, _called(one), *_results(one, "sun"), _assistant("Sun.")], [WEATHER]
    )
    in_a_row = [_user("Look."), _called(one), *_results(one, "rain"), _called(one), *_results(one, "sun")]
    yield _prompt("a call after a call", in_a_row, [WEATHER])


def _with_thoughts() -> Iterator[Conversation]:
    """Thoughts as a key, as tags in the text, before calls, and in earlier answers, where most templates drop them."""
    thought = "The user asks.\nI know it: 2 + 2 = 4.\n\nSo I say so."
    tagged = f"<think>\n{thought}\n</think>\n\n{ANSWER}"
    for name, answer in (
        ("thought", _assistant(ANSWER, reasoning_content=thought)),
        ("empty thought", _assistant(ANSWER, reasoning_content="")),
        ("thought in unicode", _assistant(ANSWER, reasoning_content="  思考 🤔 فكرة  ")),
        ("thought in tags", _assistant(tagged)),
        ("empty tags", _assistant(f"<think>\n\n</think>\n\n{ANSWER}")),
        ("open tag", _assistant(f"<think>\n{thought}")),
    ):
        yield Conversation(name, [_user(QUESTION), answer])
        yield Conversation(f"{name}, with a system prompt", [_system(SYSTEM), _user(QUESTION), answer])
        yield _prompt(f"{name} before", [_user(QUESTION), answer, _user(NEXT_QUESTION)])
        yield Conversation(f"{name} twice", [_user(QUESTION), answer, _user(NEXT_QUESTION), answer])
    one = _CALLS["one call"]
    thinking = [_user("Look."), _called(one, reasoning_content=thought), *_results(one, "rain")]
    yield _prompt("thought before a call", thinking, [WEATHER])
    yield Conversation("thoughts around a call", [*thinking, _assistant(ANSWER, reasoning_content="Rain.")], [WEATHER])


def _own_control_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[Conversation]:
    """The tokenizer's control tokens, spelled in a text: the named ones (bos, eos, ...), then the first of the rest."""
    spellings = ControlTokens(tokenizer).spellings
    named = [token for token in tokenizer.all_special_tokens if token in spellings]
    rest = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content in spellings]
    for token in list(dict.fromkeys([*named, *rest]))[:MOST_OWN_TOKENS]:
        yield _prompt(f"{token} asked", [_user(f"What is {token}?")])
        yield Conversation(f"{token} answered", [_user(QUESTION), _assistant(f"It is {token}, a token.")])


def all_conversations(tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """Every conversation, whatever the template says to it."""
    return [
        *(conversation for name, text in TEXTS.items() for conversation in _in_every_place(name, text)),
        *_turns(),
        *_with_tools(),
        *_with_thoughts(),
        *_own_control_tokens(tokenizer),
    ]


def split_by_template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[Conversation], dict[str, str]]:
    """The conversations that training accepts with the tokenizer's chat template; of the others, by name, why not.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    template = ChatTemplate(tokenizer)
    accepted: list[Conversation] = []
    refused: dict[str, str] = {}
    for conversation in all_conversations(tokenizer):
        try:
            rendered(template, conversation)
            accepted.append(conversation)
        except RowError as error:
            says = str(error.seen or "").partition("; the roles are")[0]
            refused[conversation.name] = says if error.reason == REFUSED_BY_TEMPLATE else error.reason
    return accepted, refused


def conversations(tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """The conversations that training accepts with the tokenizer's chat template.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    return split_by_template(tokenizer)[0]


def rendered(template: ChatTemplate, conversation: Conversation) -> Rendered:
    """The conversation's text as training makes it: a prompt, or a row.

    Raises:
        RowError: the template refuses it, or leaves an answer out.
    """
    if conversation.is_prompt:
        return template.render_prompt(conversation.messages, conversation.tools)
    return template.render(conversation.name, conversation.messages, conversation.tools)


def text_conversations(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] = ()) -> list[Conversation]:
    """Plain texts to continue: the run's own prompts, and every text of `TEXTS`.

    Texts of `TEXTS` that begin with the tokenizer's bos token are left out: training takes it as the bos, while an
    engine puts its own before it.
    """
    bos = tokenizer.bos_token
    texts = {name: text for name, text in TEXTS.items() if not (bos and text.startswith(str(bos)))}
    own = {f"prompt {n} of the run": text for n, text in enumerate(prompts, 1) if text}
    return [Conversation(name, [], text=text) for name, text in {**own, **texts}.items()]
