"""The preview: targets between marks, counts above, and no terminal control sequences."""

import pytest
from fake import FakeTokenizer

from pyloss.tuner.data.preview import preview
from pyloss.tuner.datasets import CacheDataset, ChatDataset, TextDataset

TURNS = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"}]


def test_targets_are_marked_turn_by_turn():
    tokenizer = FakeTokenizer()
    shown = preview(
        ChatDataset([{"messages": TURNS * 2}], tokenizer, train_on="assistant"), tokenizer
    )
    head, text = shown.split("\n", 1)
    turn = "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n[+yes<|im_end|>\n+]"
    assert head == "sample 0: 56 tokens, 10 of them targets (between [+ and +])"
    assert text == turn * 2


def test_n_samples_cut_as_in_training():
    tokenizer = FakeTokenizer()
    data = CacheDataset(
        ChatDataset([{"messages": TURNS}, {"messages": TURNS * 3}], tokenizer, mask_prompt=True)
    )
    shown = preview(data, tokenizer, n=5, max_seq_length=30)
    assert (
        shown.startswith("sample 0: ")
        and "sample 1: 30 tokens, cut from 84, 0 of them targets" in shown
    )
    assert "the sample is skipped" in shown and len(preview(data, tokenizer).split("sample")) == 2


def test_colour_only_when_asked_and_control_characters_made_visible():
    tokenizer = FakeTokenizer()
    data = TextDataset([{"text": "a\x1b[2Jb\té"}], tokenizer)
    plain = preview(data, tokenizer)
    assert "\x1b" not in plain and "a[+\\x1b[2Jb\té<|im_end|>+]" in plain
    assert "\x1b[32m" in preview(data, tokenizer, color=True)


def test_an_empty_dataset():
    with pytest.raises(ValueError, match="the dataset is empty"):
        preview([], FakeTokenizer())
