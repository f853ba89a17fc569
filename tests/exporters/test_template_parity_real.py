"""Token ids of training against those of transformers, with the tokenizers and templates of five families."""

import pytest
import transformers

from bench.real_tokenizers import FOLDER, NAMES
from solotune.exporters.conversations import split_by_template
from solotune.exporters.template_parity import TrainedIds, folder_parity

pytestmark = pytest.mark.export
REFUSED = {  # what a template says to the conversations that it refuses
    "llama3": {"This model only supports single tool-calls at once!", "answer left out by the chat template"},
    "llama3.2": {"This model only supports single tool-calls at once!", "answer left out by the chat template"},
    "qwen3": {"answer left out by the chat template"},
    "gemma": {
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "answer left out by the chat template",
    },
    "mistral": {
        "Conversation must start with a user message, got assistant.",
        "Assistant message must have a string or a list of chunks in content or a list of tool calls.",
        "Assistant message cannot have both content and tool calls.",
    },
    "smollm2": {"answer left out by the chat template"},
}


@pytest.mark.parametrize("name", NAMES)
def test_all_token_ids_are_those_of_training(name):
    folder = FOLDER / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    accepted, refused = split_by_template(tokenizer)
    assert len(accepted) >= 200
    assert set(refused.values()) == REFUSED[name]
    parity, problems = folder_parity(folder, tokenizer, "chat", [])
    assert problems == []
    assert (parity.token_ids_equal, parity.conversations) == (True, len(accepted))
    assert any(map(TrainedIds(tokenizer).spelled, accepted))


@pytest.mark.parametrize("name", NAMES)
def test_plain_texts_have_the_ids_of_training_and_one_bos(name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / name)
    parity, problems = folder_parity(FOLDER / name, tokenizer, "text", [], ["Once upon a time"])
    assert problems == []
    assert parity.token_ids_equal and parity.conversations > 50
