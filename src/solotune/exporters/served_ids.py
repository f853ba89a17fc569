"""Child process: the token ids that transformers makes with an exported folder, as whoever serves it would get them.

    python -m solotune.exporters.served_ids FOLDER < conversations, one JSON a line > ids, one JSON list a line

A process of its own, for two reasons. The folder is loaded by a process that knows nothing of the training. And
transformers runs a chat template without limits, while its caller (`template_parity`) can end this process.
"""

from __future__ import annotations

import json
import sys


def main(folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if asked["text"] is not None:
            ids = tokenizer(asked["text"])["input_ids"]
        else:
            try:
                ids = tokenizer.apply_chat_template(
                    asked["messages"], tools=asked["tools"], return_dict=False, **asked["kwargs"]
                )
            except Exception as error:  # a template raises what it likes
                ids = str(error)
        print(json.dumps(ids))


if __name__ == "__main__":
    main(sys.argv[1])
