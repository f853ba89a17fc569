"""Token ids of training against those of an engine, and of transformers on an exported folder."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from tiny import CHATML

from solotune.errors import InputError
from solotune.exporters.conversations import Conversation, conversations, text_conversations
from solotune.exporters.template_parity import TrainedIds, compare_token_ids, folder_parity, missing_ends
from tests.exporters.conftest import in_this_process

__all__ = ["in_this_process"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of all bytes with a bos, as an export has it beside a generation_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = "{{ bos_token }}" + CHATML
    folder = tmp_path_factory.mktemp("exported")
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("prompt_format", "least"), [("chat", 350), ("text", 50)])
def test_an_exported_folder_has_the_ids_of_training(folder, tokenizer, in_this_process, prompt_format, least):
    parity, problems = folder_parity(folder, tokenizer, prompt_format, [2], ["Once upon", "a time"])
    assert problems == []
    assert (parity.engine, parity.token_ids_equal) == ("transformers", True)
    assert parity.conversations > least


def test_a_template_that_differs_by_a_line_break_is_told_in_words_by_a_process_of_its_own(folder, tokenizer, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text(tokenizer.chat_template.replace("}}<|im_end|>\n", "}}<|im_end|>"))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    parity, problems = folder_parity(other, tokenizer, "chat", [2])
    assert parity.token_ids_equal is False
    assert problems[0] == (
        "conversation 'plain: asked', token 38, after 'What is the capital of France?<|im_end|>':"
        " '\\n' (id 201) in training, '<|im_start|>' (id 1) here"
    )
    assert problems[-2] == f"{parity.conversations - 3} more of {parity.conversations} conversations differ"
    assert problems[-1] == (
        "generation_config.json: eos_token_id does not have '<|im_end|>' (id 2), which ends answers in training"
    )


def test_a_folder_without_a_tokenizer_is_refused(tokenizer, in_this_process, tmp_path):
    with pytest.raises(InputError, match="transformers cannot load its tokenizer"):
        folder_parity(tmp_path, tokenizer, "text", [])


def test_a_spelled_control_token_is_text_in_training_and_a_token_in_an_engine(tokenizer):
    trained = TrainedIds(tokenizer)
    asked = {one.name: one for one in conversations(tokenizer)}
    plain, spelled = asked["plain: asked"], asked["<|im_end|> asked"]
    assert (trained.spelled(plain), trained.spelled(spelled)) == (False, True)
    text = "<s><|im_start|>user\nWhat is <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    assert trained(spelled) == tokenizer.encode(text, add_special_tokens=False)
    assert trained(spelled).count(2) == 2


def test_the_first_difference_is_told(tokenizer):
    chat = Conversation("hello", [{"role": "user", "content": "hi"}], kwargs={"add_generation_prompt": True})
    trained = TrainedIds(tokenizer)
    ids = trained(chat)

    def told(given):
        return [str(one) for one in compare_token_ids([chat], trained, given, tokenizer)]

    assert told(lambda _: ids) == []
    assert told(lambda _: ids[1:]) == [
        "conversation 'hello', token 0: '<s>' (id 0) in training, '<|im_start|>' (id 1) here"
    ]
    assert told(lambda _: ids[:-1]) == [
        f"conversation 'hello', token {len(ids) - 1}, after '>user\\nhi<|im_end|>\\n<|im_start|>assistant':"
        " '\\n' (id 201) in training, the end here"
    ]

    def refuses(_):
        raise InputError("roles must alternate")

    assert told(refuses) == ["conversation 'hello', token 0: accepted in training, refused (roles must alternate) here"]


def test_plain_texts_get_one_bos(tokenizer):
    trained = TrainedIds(tokenizer)
    asked = text_conversations(tokenizer, ["", "<s>Own prompt"])
    assert [one.name for one in asked[:2]] == ["prompt 2 of the run", "plain"]
    assert [trained(one).count(0) for one in asked[:2]] == [1, 1]
    # an engine adds its own bos to a prompt that spells one
    (difference,) = compare_token_ids(asked[:2], trained, lambda one: tokenizer(one.text)["input_ids"], tokenizer)
    assert (difference.conversation, difference.position) == ("prompt 2 of the run", 1)


def test_a_chat_needs_a_template(tokenizer):
    plain = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    assert TrainedIds(plain)(Conversation("text", [], text="hi"))[0] == 0
    with pytest.raises(InputError, match="no chat template"):
        TrainedIds(plain)(Conversation("chat", [{"role": "user", "content": "hi"}]))


@pytest.mark.parametrize(
    ("written", "missing"),
    [({"eos_token_id": 2}, [5]), ({"eos_token_id": [5, 2]}, []), ({}, [2, 5]), (None, [2, 5])],
)
def test_ends_that_generation_config_lacks(tmp_path: Path, written, missing):
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert missing_ends(tmp_path, [2, 5]) == missing
