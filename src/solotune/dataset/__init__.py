"""The data door: from any chat file to supervised tokens, with nothing lost in silence.

tokenizer = load_tokenizer(config)
prepared = prepare(config, tokenizer)      # .train, .validation: of Example; .report: DataReport; .manifest
ids = render_prompt(tokenizer, messages)   # for generating, by the code that renders training rows

source.py     words of a config -> files or a hub dataset, slices      files.py    strict readers with places
columns.py    the user's names of columns -> ours                       formats.py  row -> messages
messages.py   one message: role, text, weight                           calls.py    tool calls, and their results
kinship.py    rows of one conversation                                  manifest.py the side of each row, as a file
split.py      copies, groups, leaks                                     similar.py  near-duplicates
chat.py       messages -> text and the characters to learn              control.py  control tokens, genuine and forged
template.py   the model's Jinja template, called as it wants to be
encode.py     text -> ids, and where the answers are                    render.py   ids -> examples of max_length
budget.py     what is learned, counted                                  report.py   the account of the rows
tokenizer.py  the model's tokenizer and template                        cache.py    the result, for the next start
store.py      rows that lie on disk and not in memory                   records.py  normalised rows in such a store
prepare.py    all of it, in order                                       example.py  what training gets
"""

from solotune.dataset.example import Example, Prepared
from solotune.dataset.prepare import Progress, prepare, render_prompt
from solotune.dataset.report import DataReport
from solotune.dataset.tokenizer import load_tokenizer, spelled

__all__ = ["DataReport", "Example", "Prepared", "Progress", "load_tokenizer", "prepare", "render_prompt", "spelled"]
