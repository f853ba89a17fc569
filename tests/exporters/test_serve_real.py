"""`solotune serve` with a real server, asked by the `openai` client."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager

import pytest

import solotune
from solotune.training.trained_run import TunedRun

pytestmark = pytest.mark.export
QUESTION = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "twice 21"}]


@contextmanager
def served(run, folder):
    """A copy of a run, exported and served."""
    copy = shutil.copytree(run, folder / "run")
    export = solotune.export(copy, "merged")
    with pytest.MonkeyPatch.context() as patch:
        # a random model of 128 ids: how near its merge is to it is measured in test_merge_choice.py
        patch.setattr("solotune.api.export.export", lambda *_, **__: export)
        serving = solotune.serve(copy, port=0, engine="transformers")
    with serving:
        yield copy, serving


@pytest.fixture(scope="module")
def serving(run, tmp_path_factory):
    with served(run, tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture
def client(serving):
    import openai

    return openai.OpenAI(base_url=serving[1].url, api_key="none")


def test_a_streamed_chat_is_what_generation_gives_in_training(serving, client) -> None:
    folder, found = serving
    asked = {"model": found.server.name, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    pieces = list(client.chat.completions.create(**asked, stream=True))
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    whole = client.chat.completions.create(**asked)
    assert streamed == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == whole.choices[0].finish_reason
    # the prompt is that of training, token by token
    from solotune import dataset

    assert whole.usage.prompt_tokens == len(dataset.render_prompt(TunedRun.open(folder).tokenizer, QUESTION))


def test_a_stop_token_ends_the_answer(serving, client) -> None:
    """With a bias for the end of a turn, which the rows of the training have, nothing else is said."""
    found = serving[1]
    answer = client.chat.completions.create(
        model=found.server.name,
        messages=QUESTION,
        temperature=0,
        max_tokens=12,
        extra_body={"logit_bias": {"2": 100.0}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= 1 and not answer.choices[0].message.content


def test_a_text_is_continued_without_a_template(serving, client) -> None:
    found = serving[1]
    answer = client.completions.create(model=found.server.name, prompt="twice 21", temperature=0, max_tokens=3)
    assert answer.usage.prompt_tokens == 8


def test_the_request_that_is_printed_works(serving) -> None:
    words = shlex.split(serving[1].curl)
    done = subprocess.run([*words, "-s"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
    with urllib.request.urlopen(f"{serving[1].url}/models") as listed:
        assert json.loads(listed.read())["data"][0]["id"] == "merged"


def test_a_model_of_plain_texts_continues_texts_and_refuses_chats(train, tmp_path) -> None:
    import openai

    rows = "".join(json.dumps({"text": f"twice {n} is {2 * n}."}) + "\n" for n in range(40))
    (tmp_path / "texts.jsonl").write_text(rows)
    with served(train(dataset=str(tmp_path / "texts.jsonl")), tmp_path) as (folder, found):
        assert found.prompt_format == "text"
        client = openai.OpenAI(base_url=found.url, api_key="none", max_retries=0)
        asked = {"model": found.server.name, "max_tokens": 4, "temperature": 0}
        answer = client.completions.create(prompt="twice 21", **asked)
        ids = TunedRun.open(folder).tokenizer("twice 21")["input_ids"]
        assert answer.usage.prompt_tokens == len(ids) and answer.choices[0].finish_reason in ("length", "stop")
        pieces = list(client.completions.create(prompt="twice 21", **asked, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == answer.choices[0].text
        for refused in (
            lambda: client.chat.completions.create(messages=QUESTION, **asked),
            lambda: client.chat.completions.create(messages=QUESTION, **asked, stream=True),
            lambda: client.responses.create(model=found.server.name, input="twice 21"),
        ):
            with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
                refused()
        done = subprocess.run([*shlex.split(found.curl), "-s"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["object"] == "text_completion"
