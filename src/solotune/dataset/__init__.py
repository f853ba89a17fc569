"""The data door: from any chat file to supervised tokens, with nothing lost in silence.

tokenizer = load_tokenizer(config)
prepared = prepare(config, tokenizer)      # .train, .validation: lists of Example; .report: DataReport
ids = render_prompt(tokenizer, messages)   # for generating, by the code that renders training rows

source.py     words of a config -> files or a hub dataset, slices      files.py    strict readers with places
formats.py    row -> messages                                           split.py    copies, groups, leaks
chat.py       messages -> text and the characters to learn              similar.py  near-duplicates
control.py    control tokens, genuine and forged                        encode.py   text -> ids and mask
tokenizer.py  the model's tokenizer and template                        prepare.py  all of it, in order
"""

from solotune.dataset.prepare import DataReport, Example, Prepared, prepare, render_prompt
from solotune.dataset.tokenizer import load_tokenizer

__all__ = ["DataReport", "Example", "Prepared", "load_tokenizer", "prepare", "render_prompt"]
