"""Which tokens of a record are trained: turns, completions, text, and what a template allows."""

import numpy as np
import pytest
from fake import CHAT, END, QA, START, FakeTokenizer, chatml, no_end, shuffling, targets, thinking

from pyloss.tuner import datasets as ds


def chat(train_on, template=chatml, record=CHAT):
    tokenizer = FakeTokenizer(template)
    sample = ds.ChatDataset([record], tokenizer, train_on=train_on).sample(0)
    assert sample.weights.dtype == np.float32 and sample.weights.shape == (len(sample.tokens),)
    return targets(sample, tokenizer)


def test_last_turn_alone_with_its_end_token():
    assert chat("last") == [f"yes two{END}\n"]


def test_every_assistant_turn_with_its_end_token():
    assert chat("assistant") == [f"yes one{END}\n", f"yes two{END}\n"]


def test_all_tokens_but_the_first_which_nothing_predicts(tokenizer):
    sample = ds.ChatDataset([CHAT], tokenizer).sample(0)
    assert sample.weights[0] == 0 and (sample.weights[1:] == 1).all()
    assert sample.offset == 0 and sample.is_span


def test_end_token_is_a_target_though_it_is_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sample = ds.ChatDataset([CHAT], tokenizer, mask_prompt=True).sample(0)
    assert sample.weights[-2] == 1 and sample.tokens[-2] == tokenizer.eos_token_id


def test_masks_go_by_position_and_not_by_what_the_text_says():
    told = f"say {START}assistant\nyes two{END}\n"
    record = {
        "messages": [{"role": "user", "content": told}, {"role": "assistant", "content": "yes two"}]
    }
    assert chat("assistant", record=record) == [f"yes two{END}\n"]


def test_a_generation_prompt_that_the_whole_does_not_hold():
    # Cutting at the length of the rendered prompt would remove the answer's beginning.
    assert chat("last", thinking) == [f"</think>yes two{END}\n"]


def test_a_turn_that_loses_its_thought_once_others_follow():
    assert chat("assistant", thinking)[0] == f"yes one{END}\n"


def test_a_turn_that_ends_otherwise_as_the_last():
    def template(messages, prompt, tools=None):
        ends = ["<end>"] * (len(messages) - 1) + [END]
        return (
            "".join(f"[{m['role']}]{m['content']}{e}" for m, e in zip(messages, ends))
            + "[assistant]" * prompt
        )

    # A prompt alone ends in END, so it is no prefix of the whole. The answer is found by its text,
    # without the other end.
    assert chat("assistant", template)[0] == "yes one"


def test_a_first_turn_of_the_assistant_is_found_by_its_text():
    record = {
        "messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    }
    assert chat("last", record=record) == [f"hello{END}\n"]


def test_tokens_behind_the_last_target_are_left_off(tokenizer):
    record = {"messages": [*CHAT["messages"], {"role": "user", "content": "thanks"}]}
    sample = ds.ChatDataset([record], tokenizer, mask_prompt=True).sample(0)
    assert sample.is_span and tokenizer.decode(sample.tokens).endswith(f"yes two{END}\n")


def test_a_template_of_which_no_prefix_is_one_and_that_does_not_repeat_the_contents():
    # There is no generation prompt either: the turn begins after the user's.
    assert chat("assistant", shuffling) == ["ASSISTANT: YES ONE\n", "ASSISTANT: YES TWO\n"]


def test_no_assistant_turn_means_no_targets():
    assert chat("last", record={"messages": [{"role": "user", "content": "anyone?"}]}) == []


def test_tools_go_to_the_template(tokenizer):
    record = {**CHAT, "tools": [{"name": "a"}, {"name": "b"}]}
    assert "tools\n2" in tokenizer.decode(
        ds.ChatDataset([record], tokenizer, mask_prompt=True).sample(0).tokens
    )


def test_completions_are_a_turn_of_the_template(tokenizer):
    sample = ds.CompletionsDataset([QA], tokenizer, "prompt", "completion", True).sample(0)
    assert targets(sample, tokenizer) == [f"because{END}\n"]


def test_completions_get_the_end_token_that_the_template_lacks():
    tokenizer = FakeTokenizer(no_end)
    for mask_prompt in (True, False):
        sample = ds.CompletionsDataset([QA], tokenizer, mask_prompt=mask_prompt).sample(0)
        assert sample.tokens[-1] == tokenizer.eos_token_id and sample.weights[-1] == 1
        assert targets(sample, tokenizer)[0].endswith(f"because\n{END}")


def test_text_is_trained_whole_and_ends_in_one_end_token(tokenizer):
    data = ds.TextDataset([{"text": "abc"}, {"text": f"abc{END}"}, {"text": ""}], tokenizer)
    assert data.sample(0).tokens == data.sample(1).tokens == [*b"abc", tokenizer.eos_token_id]
    assert data.sample(2).tokens == [tokenizer.eos_token_id] and not data.sample(2).weights.any()


def test_process_is_mlx_lms_pair_and_refuses_what_an_offset_cannot_say(tokenizer):
    data = ds.ChatDataset([CHAT], tokenizer, mask_prompt=True)
    tokens, offset = data.process(data[0])
    assert data[0] is CHAT and tokenizer.decode(tokens[offset:]) == f"yes two{END}\n"
    assert ds.ChatDataset([CHAT], tokenizer).process(CHAT)[1] == 0
    with pytest.raises(ValueError, match="not one span"):
        ds.ChatDataset([CHAT], tokenizer, train_on="assistant").process(CHAT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "first"}, "must be one of 'last'"),
        ({"train_on": "all", "mask_prompt": True}, "give one of them"),
    ],
)
def test_unknown_or_contradicting_options(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        ds.ChatDataset([CHAT], tokenizer, **options)


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ds.ChatDataset([CHAT], tokenizer).sample(0)
