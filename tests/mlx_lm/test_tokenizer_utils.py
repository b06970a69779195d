"""The wrapper of tokenizers: what transformers' have and pyloss's do not."""

import pytest
import tiny

from pyloss.mlx_lm import tokenizer_utils
from pyloss.mlx_lm.tokenizer_utils import TokenizerWrapper, no_bos_or_eos


@pytest.fixture
def wrapper():
    return TokenizerWrapper(tiny.byte_tokenizer())


def test_names_of_transformers(wrapper):
    ids = wrapper.encode("hello w")
    assert wrapper("hello w") == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert wrapper(["hello w", "12"])["input_ids"][0] == ids
    assert wrapper.batch_decode([ids, ids]) == [wrapper.decode(ids)] * 2
    assert wrapper.get_vocab()["hello"] == wrapper.convert_tokens_to_ids("hello")
    assert wrapper.convert_ids_to_tokens(wrapper.convert_tokens_to_ids("hello")) == "hello"
    assert len(wrapper) == wrapper.vocab_size
    with pytest.raises(TypeError, match="takes add_special_tokens, not padding"):
        wrapper("hello", padding=True)


def test_attributes_are_the_tokenizers(wrapper):
    wrapper.chat_template = "x"
    assert wrapper.plain.chat_template == "x" and wrapper.chat_template == "x"
    with pytest.raises(AttributeError, match="no_such"):
        wrapper.no_such  # noqa: B018


def test_a_message_that_goes_on(wrapper):
    wrapper.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "12 "}]
    text = wrapper.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text == "[hello][12"
    wrapper.chat_template = "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}"
    with pytest.raises(ValueError, match="changes the last message"):
        wrapper.apply_chat_template(
            [{"role": "assistant", "content": "hello"}], continue_final_message=True
        )


def test_thoughts():
    class Thinking(type(tiny.byte_tokenizer())):
        pass

    tokenizer = TokenizerWrapper(tiny.byte_tokenizer())
    assert tokenizer.find_think_start([1, 2]) == -1 and tokenizer.think_start_id is None
    tokenizer._thoughts = ("hell", "hello")
    start, end = tokenizer.think_start_id, tokenizer.think_end_id
    ids = [7, start, 9, end, start, end, 8]
    assert [tokenizer.find_think_start(ids), tokenizer.rfind_think_start(ids)] == [1, 4]
    assert [tokenizer.find_think_end(ids), tokenizer.rfind_think_end(ids)] == [3, 5]
    assert (
        tokenizer.find_think_end(ids, start=4) == 5 and tokenizer.rfind_think_end(ids, end=4) == 3
    )


def test_ends_of_sequences():
    assert no_bos_or_eos([1, 5, 6, 2], 1, 2) == [5, 6] == no_bos_or_eos([5, 6], 1, 2)


def test_refused_settings(made):
    with pytest.raises(ValueError, match="unknown key 'padding_side'"):
        tokenizer_utils.load(made / "base", {"padding_side": "left"})
    tokenizer = tokenizer_utils.load(made / "base.gguf", eos_token_ids=7)
    assert 7 in tokenizer.eos_token_ids


def test_ids_as_arrays(wrapper):
    ids = wrapper.encode("hello w")
    assert wrapper.encode("hello w", return_tensors="np").tolist() == [ids]
    assert wrapper.encode("hello w", return_tensors="mlx").tolist() == [ids]
    chat = [{"role": "user", "content": "hello"}]
    found = wrapper.apply_chat_template(chat, return_tensors="np")
    assert found.tolist() == [wrapper.apply_chat_template(chat)]
    with pytest.raises(ValueError, match="return_tensors is 'pt'"):
        wrapper.encode("hello", return_tensors="pt")


def test_of_the_first_spaces_one_is_left_out(wrapper):
    """As mlx-lm's detokenizer for byte-level tokenizers: a space waits for the next token."""
    detokenizer = tokenizer_utils.BPEStreamingDetokenizer(wrapper)
    space, letter = (wrapper.convert_tokens_to_ids(token) for token in ("Ġ", "a"))
    segments = []
    for token in (space, space, letter, space, letter, space):
        detokenizer.add_token(token)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert segments == ["", "", " a", "", " a", ""] and detokenizer.text == " a a "
