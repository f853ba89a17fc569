"""A SentencePiece model (`tokenizer.model`) from the tokenizer that training used, for llama.cpp's converter.

    content = sentencepiece_model(tokenizer)       None if it is no tokenizer of that kind

Llama 2, Mistral and Gemma were published with both a `tokenizer.model` and a `tokenizer.json`. Training uses the
second; the converter takes pieces and scores from the first, and for Gemma takes nothing else. transformers does not
save the first, so a merged folder may lack it, and where both are there they can disagree: on runs of spaces, in a
tokenizer that transformers made from Mistral's. So the file is written from the merges of the tokenizer at hand.
llama.cpp joins the pair of pieces first whose union has the highest score; with the negative rank of its first merge as
a score, that is the order of the merges.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"  # how SentencePiece writes a space
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_model(tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """The content of a `tokenizer.model` that splits texts as this tokenizer does; None if it is of another kind.

    Raises:
        InputError: the library sentencepiece is missing, which the converter needs too.
    """
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return None
    state = json.loads(fast.to_str())
    model, added = state["model"], state["added_tokens"]
    if model["type"] != "BPE" or not model.get("byte_fallback") or SPACE not in model["vocab"]:
        return None
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(
            "this tokenizer needs the library sentencepiece for a GGUF file",
            change="pip install 'solotune[sentencepiece]'",
        ) from None
    library: Any = sentencepiece_model_pb2  # its classes are made at import, where type checkers do not see them
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        scores.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), -float(rank))
    written = library.ModelProto()
    written.trainer_spec.model_type = library.TrainerSpec.BPE
    written.trainer_spec.byte_fallback = True
    written.normalizer_spec.add_dummy_prefix = written.normalizer_spec.remove_extra_whitespaces = False
    kinds = {token["content"]: "CONTROL" if token["special"] else "USER_DEFINED" for token in added}
    kinds[str(tokenizer.unk_token)] = "UNKNOWN"
    kinds |= dict.fromkeys(_BYTES, "BYTE")
    # Gemma's tokenizer.json has a tab in the place of its byte; a SentencePiece model needs all 256
    bytes_of = {chr(byte): piece for byte, piece in enumerate(_BYTES) if piece not in model["vocab"]}
    for shown, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        piece = bytes_of.get(shown, shown)
        kind = getattr(library.ModelProto.SentencePiece, kinds.get(piece, "NORMAL"))
        written.pieces.add(piece=piece, score=scores.get(piece, -float(len(model["merges"]))), type=kind)
    return written.SerializeToString()
