"""The roles of tokens, by the contents of conversations."""

from __future__ import annotations

import numpy as np

from solotune.diagnosis.facts.roles import ASSISTANT, Roles
from solotune.diagnosis.facts.texts import Document
from solotune.diagnosis.run_facts import RunFacts, Settings
from tests.dataset.conftest import chat, tiny_tokenizer


def test_characters_that_are_split_into_tokens() -> None:
    """A byte-level tokenizer has no token for them; each token of a character begins where the character does."""
    tokenizer = tiny_tokenizer("chatml")
    talk = chat("Wie heißt № 7 auf 中文?", "七号 – “sieben”.")
    ids = np.array(tokenizer.apply_chat_template(talk, return_dict=False), np.int64)
    roles = Roles(RunFacts("a run", Settings({}), tokenizer=tokenizer, conversations=[talk]))
    document = Document(0, 0, 0, len(ids), ids, ids, None)
    text, begins_T = roles.text_of(document)
    assert text == tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) and "\ufffd" not in text
    assert len(begins_T) == len(ids) and (np.diff(begins_T) >= 0).all()
    assert roles.conversation_in(text) == talk
    answer = roles.decode(ids[roles.of(document) == ASSISTANT])
    assert answer.strip() == talk[1]["content"]
