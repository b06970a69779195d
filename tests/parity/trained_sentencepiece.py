"""SentencePiece models with the options of Llama and Gemma, trained on this repository's text."""

from pathlib import Path

import pytest

sentencepiece = pytest.importorskip(
    "sentencepiece", reason="compares with SentencePiece (parity extra)"
)

USER_DEFINED = ["▁▁", "▁▁▁▁", "\n\n", "<b>", "</b>"]
KINDS = ("llama", "gemma")
SIZE = 900


def train(kind, folder, texts=()):
    """Train a model; return SentencePiece's processor."""
    gemma = kind == "gemma"
    return train_model(
        folder,
        texts,
        add_dummy_prefix=not gemma,
        user_defined_symbols=USER_DEFINED if gemma else [],
    )


def train_model(folder, texts=(), own=None, **options):
    """`train` with options of SentencePiece's trainer; by default those of Llama."""
    text = folder / "text.txt"
    if own is None:
        repository = Path(__file__).parents[2]
        files = sorted([*repository.glob("*.md"), *repository.glob("docs/*.md")])
        own = [path.read_text() for path in files]
    text.write_text("\n".join([*own, *(piece.replace("\x00", "") for piece in texts)]))
    usual = {
        "model_type": "bpe", "vocab_size": SIZE, "character_coverage": 0.99, "byte_fallback": True,
        "split_digits": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True, "num_threads": 1, "minloglevel": 2,
        "control_symbols": ["<start_of_turn>", "<end_of_turn>"],
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "m"), **{**usual, **options}
    )
    return sentencepiece.SentencePieceProcessor(str(folder / "m.model"))


def gguf_metadata(processor, kind):
    """GGUF metadata as llama.cpp's converter writes it."""
    tokens, kinds = [], []
    for index in range(processor.get_piece_size()):
        sort = (
            2
            if processor.is_unknown(index)
            else 3
            if processor.is_control(index)
            else 6
            if processor.is_byte(index)
            else 1
        )
        text = processor.id_to_piece(index)
        if kind == "gemma" and text in USER_DEFINED:
            text, sort = text.replace("▁", " "), 4
        tokens.append(text)
        kinds.append(sort)
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [processor.get_score(index) for index in range(len(tokens))],
        "token_type": kinds,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        "add_space_prefix": kind != "gemma",
        "add_bos_token": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}
