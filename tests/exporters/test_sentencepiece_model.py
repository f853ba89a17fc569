"""The `tokenizer.model` that llama.cpp's converter gets splits texts as the tokenizer of the training does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers
from tiny import save_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from solotune.errors import InputError
from solotune.exporters.sentencepiece_model import sentencepiece_model

MERGES = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("▁", "▁"), ("▁▁", "▁▁"), ("a", "b")]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A BPE of SentencePiece's kind: bytes for the unknown, spaces written as ▁, merges in a given order."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c"]
    pieces += ["".join(merge) for merge in MERGES]
    pieces[pieces.index("<0x09>")] = "\t"  # as in Gemma's
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Replace("▁", " ")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("[own]", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_texts_are_split_alike() -> None:
    import sentencepiece

    own = tokenizer()
    content = sentencepiece_model(own)
    read = sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in ("abc", " abc", "a    bc", "bca  a", "   ", "aé\n", "a\tb"):  # training puts one space in front
        assert read.encode(f" {text}" if text[0] != " " else text) == own(text, add_special_tokens=False).input_ids, (
            text
        )


def test_kinds_of_pieces() -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sentencepiece_model(tokenizer()) or b"")
    kinds = {piece.piece: model.SentencePiece.Type.Name(piece.type) for piece in model.pieces}
    wanted = {
        "<unk>": "UNKNOWN",
        "<s>": "CONTROL",
        "<0x09>": "BYTE",
        "<0x0A>": "BYTE",
        "[own]": "USER_DEFINED",
        "▁a": "NORMAL",
    }
    assert {piece: kinds[piece] for piece in wanted} == wanted


def test_other_tokenizers_need_none(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    assert sentencepiece_model(transformers.AutoTokenizer.from_pretrained(tmp_path)) is None


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError) as caught:
        sentencepiece_model(tokenizer())
    assert caught.value.change == "pip install 'solotune[sentencepiece]'"
