"""Findings: faults that data, tokenizer and config alone show, in seconds, before any GPU is used.

    for finding in find(config, tokenizer, prepared.train, prepared.validation, prepared.report): ...
    known_or_found(config, tokenizer, prepared)     the same as JSON; of rows out of the cache it is not asked again

The rules are small functions; each says in its docstring what it sees and when it is wrong:

findings_facts.py      what they ask: rows as arrays, answers, ends    findings_tokenizer.py  S2
findings_template.py   S3                                              findings_labels.py     S4, S5, S6
findings_rows.py       S8                                              findings_split.py      S9

Of large data most rules judge a sample, and say so in the evidence: `rows_judged` of `training_rows`.
They judge labels and tokens, never a config flag alone: pad = eos is a fault exactly if the end of turn is not among
the labels, and left padding is not looked at. Nothing here trusts the code that made the rows; so rules whose fault
our own pipeline cannot make (F17, F20, F23, F47) stand guard over it, and over rows that were made elsewhere.

Of the catalogue's S2 to S9:

| code | here | why not |
|---|---|---|
| F04 F05 | `wrong_tokenizer`, `ids_beyond_embedding` | twin vocabularies with the same special ids: probe P1 |
| F06 | - | whether an embedding row was trained stands in the weights: diagnosis |
| F07 F08 F09 | `markers_as_text`, `double_bos`, `missing_bos` | |
| F10 | `terminator_missing` | |
| F11 | - | prevented: `render_prompt` serves what rendered the rows, the template is saved beside the adapter |
| F12 F13 F14 | `not_through_template`, `role_dropped`, `stops_elsewhere` | |
| F15 F16 | `header_learned`, `prompt_is_no_prefix` | |
| F17 F19 F20 F23 | `pad_masks_terminator`, `terminator_masked`, `prompt_learned`, `mask_inverted` | |
| F18 | - | prevented: `chat.py` needs no `{% generation %}` markers; a row it cannot mask is an error |
| F21 | `nothing_learned` | |
| F22 | - | prevented: an Example holds a mask, not labels, so they cannot be shifted; the loss's shift has its test |
| F24 F25 | `answers_cut`, `prompt_fills_window` | |
| F26 | - | prevented: truncation keeps the start |
| F27 F28 F30 | - | prevented: `batch.py` pads right, and labels go by position |
| F29 | `padding_learned` | of batches prevented likewise; of texts exported with padding seen here |
| F31 F32 | - | packing's attention and positions: probe P3 |
| F33 | - | counted by packing itself |
| F34 F35 F36 | `empty_answers`, `constant_answers`, `broken_turns` | |
| F37 | `bad_encoding`, `hidden_characters` | |
| F38 | `misaligned_answers` | only columns shifted by one row; shuffled ones: probe P10 |
| F39 | `duplicates` | |
| F40 | - | prevented: every epoch is a new permutation |
| F41 | - | prevented: no loader workers, each row once an epoch |
| F42 | - | the plan's peak at the longest batch: plan and preflight |
| F43 F44 | `evaluated_on_training`, `leaked_passages` | (near-)equal rows are refused or grouped by `split.py` |
| F45 | - | evaluation mode: probe P8 |
| F46 | - | memorising shows in the curve |
| F47 F48 | `different_labels`, `weak_validation` | the error bar itself: evaluation |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from solotune.config import RunConfig
from solotune.dataset import (
    cache,
    findings_labels,
    findings_rows,
    findings_split,
    findings_template,
    findings_tokenizer,
)
from solotune.dataset.findings_facts import Facts, Finding, Severity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from solotune.dataset.example import Example, Prepared
    from solotune.dataset.report import DataReport

__all__ = ["RULES", "Finding", "Severity", "find", "judge", "known_or_found"]

RULES = tuple(
    rule
    for part in (findings_tokenizer, findings_template, findings_labels, findings_rows, findings_split)
    for rule in part.RULES
)
_EXPLAINS = {
    "F07": {"F10"},  # an end of turn that is no token
    "F20": {"F15"},  # headers are learned with everything else
    "F23": {"F10", "F15", "F17", "F19"},  # ends of the user's turns
    "F43": {"F44"},  # a part of all
}
"""A finding -> others that follow from it and would only hide the cause."""
_ORDER: tuple[Severity, ...] = ("error", "warning", "info")


def find(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    validation: Sequence[Example],
    report: DataReport,
) -> list[Finding]:
    """What is wrong with the rows as they would be trained on; worst first, empty where nothing is.

    Args:
        train: training rows, at least one.
        validation: held-out rows, or none.
        report: the account of both, for rows that were dropped on the way.
    """
    return judge(Facts(config, tokenizer, train, validation, report))


def judge(facts: Facts) -> list[Finding]:
    """`find`, of facts that are at hand."""
    found = [finding for rule in RULES if (finding := rule(facts)) is not None]
    if facts.is_sample:
        sample = {"rows_judged": len(facts.train.rows), "training_rows": len(facts.whole[0].rows)}
        found = [replace(finding, evidence={**finding.evidence, **sample}) for finding in found]
    explained = set().union(*(_EXPLAINS.get(finding.code, set()) for finding in found))
    found = [finding for finding in found if finding.code not in explained]
    return sorted(found, key=lambda finding: (_ORDER.index(finding.severity), finding.code))


def known_or_found(config: RunConfig, tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> list[dict[str, Any]]:
    """What `find` says of the rows, as JSON; from the cache where it was asked before."""
    facts = Facts(config, tokenizer, prepared.train, prepared.validation, prepared.report)
    parts = [prepared.key, config.model_dump(), facts.model_files]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    if prepared.key is not None and (known := cache.load_findings(key)) is not None:
        return known
    found = find(config, tokenizer, prepared.train, prepared.validation, prepared.report)
    as_json = json.loads(json.dumps([finding.to_json() for finding in found]))
    if prepared.key is not None:
        cache.store_findings(key, as_json)
    return as_json
