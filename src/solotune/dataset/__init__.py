"""Turn any chat file into token ids with a loss mask.

    tokenizer = load_tokenizer(config)
    prepared = prepare(config, tokenizer)      # .train, .validation: of Example; .report: DataReport; .manifest
    ids = render_prompt(tokenizer, messages)   # the prompt for generation, made by the code that renders training rows
    ids = text_prompt(tokenizer, "word:")      # the same for a model that was trained on plain text

readers/   files and hub datasets to rows        chat/    rows to messages, text and token ids
split/     duplicates, groups, held-out rows     prepare  all steps in order
render     token ids to examples of max_length   packing, sampler, collate   examples to batches
"""

from solotune.dataset.chat.tokenizer import load_tokenizer, token_texts
from solotune.dataset.data_report import DataReport
from solotune.dataset.example import Example, Prepared
from solotune.dataset.prepare import Progress, prepare, render_prompt, text_prompt

__all__ = [
    "DataReport",
    "Example",
    "Prepared",
    "Progress",
    "load_tokenizer",
    "prepare",
    "render_prompt",
    "text_prompt",
    "token_texts",
]
