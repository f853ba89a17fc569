"""The model of a run as lm_eval asks one: lm_eval's own HFLM around the module that is loaded. Extra: lm-eval.

Everything that decides a score is HFLM's: how texts become tokens, where a context is cut, how choices are compared,
when an answer ends. Other than there:

- log-likelihoods are summed in float32, not in the model's dtype: bfloat16 cannot tell close choices apart
- an answer also ends with the tokens that end the answers of the training rows
- chat templates are rendered in the sandbox (`dataset/chat/template.py`), with the date of the run
- a batch that does not fit into memory is halved

HFLM would tie embeddings and head again, which the loader has settled, so it gets no nn.Module but `_Module`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from solotune.dataset.chat.template import Template
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError
from solotune.model.loading import TrainableModel
from solotune.runtime import signals

Found = TypeVar("Found")


class LmEvalModel(HFLM):
    """A loaded model with its adapters as they are, on or off.

    Args:
        stops: ids that end an answer, beside the stop texts of a task.
        rendered_on: the date that a chat template sees as today.
        progress: called with the requests that are done, and all of them.
    """

    def __init__(
        self,
        model: TrainableModel,
        tokenizer: Any,
        batch_size: int,
        stops: Sequence[int],
        rendered_on: date | None,
        progress: Callable[[int, int], None],
    ) -> None:
        super().__init__(
            pretrained=_Module(model),  # pyright: ignore[reportArgumentType]
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # HFLM sets its padding
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self.failure: Exception | None = None
        self._stops, self._rendered_on, self._progress = list(stops), rendered_on, progress
        self._done = self._total = 0
        self.set_cache_hook(self)  # pyright: ignore[reportArgumentType]

    # --- the requests, which lm_eval sends in one list

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._asked(requests, lambda: super(LmEvalModel, self).loglikelihood(requests, True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._asked(requests, lambda: super(LmEvalModel, self).loglikelihood_rolling(requests, True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            longest = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if longest >= self.max_length:
                raise InputError(
                    f"--tasks {request.task_name}: its answers are too long for this model",
                    seen=f"max_gen_toks: {longest}",
                    allowed=f"less than the {self.max_length} tokens that the model can read",
                    change="lower max_gen_toks in generation_kwargs of the task's file",
                )
        return self._asked(requests, lambda: super(LmEvalModel, self).generate_until(requests, True))

    def _asked(self, requests: list[Any], ask: Callable[[], Found]) -> Found:
        """Answer the requests, with smaller batches where memory is short; its own failures are no task's."""
        try:
            while True:
                self._done, self._total = 0, len(requests)
                try:
                    return ask()
                except torch.OutOfMemoryError:
                    if self.batch_size_per_gpu <= 1:
                        raise
                    self.batch_size_per_gpu //= 2
                torch.cuda.empty_cache()
        except Exception as error:
            self.failure = error
            raise

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """What HFLM calls of its cache after each request: here, progress."""
        self._done += 1
        signals.check_stop()
        self._progress(self._done, self._total)

    # --- what HFLM asks of the model

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        if self._stops:
            generation_kwargs.setdefault("eos_token_id", self._stops)
        return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a prompt, which without `add_generation_prompt` goes on in its last message."""
        messages = [dict(message) for message in chat_history]
        try:
            text = self._template.render("the prompt", messages, is_prompt=add_generation_prompt)
        except RowError:  # some templates have no place for a system prompt; HFLM leaves it out as well
            messages = [message for message in messages if message["role"] != "system"]
            text = self._template.render("the prompt", messages, is_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        if last not in text:  # many templates strip it
            last = last.strip()
        return text[: text.rindex(last) + len(last)]

    @cached_property
    def _template(self) -> Template:
        return Template(self.tokenizer, self._rendered_on)


class _Module:
    """The part of transformers' model that HFLM uses."""

    def __init__(self, model: TrainableModel) -> None:
        self._module = model.module
        self.device, self.config = model.device, model.module.config
        self.generate: Any = model.module.generate

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return self._module(input_ids=input_ids, use_cache=False)
