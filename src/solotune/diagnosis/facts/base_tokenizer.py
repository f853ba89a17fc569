"""The tokenizer that lies with the base, where the run's own may be another.

The model was trained with its ids and its template.

    run_facts = with_base_tokenizer(run_facts)      sets base_tokenizer and base_template, if the base is here
    changed = changed_ids(run_facts)                ids that mean another piece of text than they do to the base
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.config.run_config import RunConfig
from solotune.dataset import load_tokenizer
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.run_facts import RunFacts
from solotune.errors import SolotuneError
from solotune.hub.model_files import model_here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_base_tokenizer(run_facts: RunFacts) -> RunFacts:
    """The facts with the tokenizer and the template of the base, where the run has others.

    solotune's own runs always use the base's tokenizer; a template file of the user is known to `RowFacts`.
    """
    tokenizer, base = run_facts.tokenizer, run_facts.base_tokenizer
    name, revision = (run_facts.settings.get(key) for key in ("model_name_or_path", "model_revision"))
    if tokenizer is None or is_ours(run_facts):
        return run_facts
    if base is None and isinstance(name, str):
        base = _load(name, str(revision or "main"))
    if base is None:
        return run_facts
    template = base.chat_template
    is_other = isinstance(template, str) and template != tokenizer.chat_template
    return replace(
        run_facts,
        base_tokenizer=base,
        base_template=run_facts.base_template or (str(template) if is_other else ""),
    )


@lru_cache(maxsize=2)
def _load(name: str, revision: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that is on this machine; None if there is none."""
    try:
        files = model_here(name, revision)
        config = RunConfig(model_name_or_path=name, model_revision=revision, dataset="unknown.jsonl")
        return None if files is None else load_tokenizer(config, files)
    except (SolotuneError, OSError, ValueError):
        return None


def changed_ids(run_facts: RunFacts) -> np.ndarray | None:
    """bool (V,), one per id of the base's tokenizer: to the run's tokenizer it is another piece; None without both.

    Pieces that were added to a tokenizer are left out: a name is often given to a reserved one.
    """
    base: Any = run_facts.base_tokenizer
    if base is None or run_facts.tokenizer is None:
        return None
    theirs, mine = ({index: piece for piece, index in one.get_vocab().items()} for one in (base, run_facts.tokenizer))
    changed_V = np.zeros(max(theirs, default=-1) + 1, bool)
    for index in theirs.keys() - base.added_tokens_decoder.keys():
        changed_V[index] = mine.get(index) != theirs[index]
    return changed_V
