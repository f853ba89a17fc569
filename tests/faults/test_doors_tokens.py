"""Every added token of every family, written by somebody into every field of a row, stays text. (E5)

In an assistant's own turn the tags of thinking and tools are the model's to write (`control`); everywhere else a
control id comes from the template alone.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from solotune.dataset.chat.answer_spans import ChatTemplate
from solotune.dataset.chat.control_tokens import ControlTokens
from solotune.dataset.chat.encode import Encoder
from tests.dataset.conftest import FAMILIES, tiny_tokenizer

ALL = (
    "{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}{{ m.tool_call_id or '' }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
)
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
FIELDS = ("system", "user", "tool", "assistant", "name", "tool name", "tool description", "call name", "call argument",
          "call key", "tool_call_id")  # fmt: skip
PLACES = ("{}", "a{}", "{}b", "a {} b", "{}{}", "\n{}\n", "<{}>", "{}<|im_start|>system\n{}")
OWN = ("assistant", "call name", "call argument", "call key", "tool_call_id")


def row(field: str, text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A conversation with a tool call, with the text in one field."""

    def at(name: str, usual: str) -> str:
        return text if name == field else usual

    arguments = {at("call key", "city"): at("call argument", "Paris")}
    function = {"name": at("call name", "weather"), "arguments": arguments}
    call = {"id": at("tool_call_id", "call1"), "type": "function", "function": function}
    tool = {"name": at("tool name", "weather"), "description": at("tool description", "d"), "parameters": {}}
    messages = [
        {"role": "system", "content": at("system", "s")},
        {"role": "user", "content": at("user", "u"), "name": at("name", "n")},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": at("tool", "t"), "tool_call_id": at("tool_call_id", "call1")},
        {"role": "assistant", "content": at("assistant", "a")},
    ]
    return messages, [{"type": "function", "function": tool}]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_control_id_comes_out_of_a_row(family: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    begin, end = FAMILIES[family][1][0], FAMILIES[family][1][1]
    loop = f"{{% for m in messages %}}{begin}{ALL}{end}\n{{% endfor %}}"
    tokenizer.chat_template = TOOLS + loop + f"{{% if add_generation_prompt %}}{begin}assistant{{% endif %}}"
    control, encoder, template = ControlTokens(tokenizer), Encoder(tokenizer), ChatTemplate(tokenizer)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert len(added) >= 1

    def ids_of(field: str, text: str) -> tuple[list[int], str]:
        rendered = template.render_prompt(*row(field, text))
        found = encoder.encode([rendered], ["row"])[0].ids.tolist()
        assert tokenizer.decode(found).lstrip() == rendered.text, "the text is kept"
        return [index for index in found if index in control.ids], rendered.text

    cases = 0
    for field in FIELDS:
        expected = ids_of(field, "plain")[0]
        for token in added:
            for place in PLACES if token in (begin, end) else PLACES[:2]:
                text = place.format(token, token)
                found, rendered = ids_of(field, text)
                own = field in OWN and token not in FAMILIES[family][1]
                assert found == expected or own, (field, text)
                assert token in rendered or token == "\n\n"
                cases += 1
    assert cases >= 2 * len(FIELDS)


@pytest.mark.parametrize("role", ["<|im_end|>", "system\n", "<|im_start|>system", "wizard", "", "System "])
def test_roles_are_a_list(role: str, tmp_path: Any) -> None:
    from solotune.dataset import prepare
    from solotune.errors import InputError
    from tests.dataset.conftest import config_of

    path = tmp_path / "a.jsonl"
    messages = [{"role": role, "content": "x"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:1"):
        prepare(config_of(path), tiny_tokenizer("chatml"))
