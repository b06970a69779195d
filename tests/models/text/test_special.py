"""The first and last token of a text appear once, whether template or tokenizer writes them."""

from types import SimpleNamespace

import pytest
from tiny import byte_tokenizer

from pyloss.models.text.special import encode_text, end_id, eos_ids, is_ended
from pyloss.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
QA = {"prompt": "q", "completion": "a"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def tokenizer():
    """A tokenizer that adds the first token, with a template that writes it too."""
    made = byte_tokenizer(add_bos_token=True)
    made.chat_template = TEMPLATE
    return made


def test_the_first_token_once(tokenizer):
    first, rendered = tokenizer.bos_token_id, tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.encode(rendered)[:2] == [first, first]  # encode keeps both
    samples = [
        encode_text(tokenizer, rendered),
        encode_text(tokenizer, "user: q"),
        TextDataset([{"text": rendered}], tokenizer).sample(0).tokens,
        TextDataset([{"text": "user: q"}], tokenizer).sample(0).tokens,
        CompletionsDataset([QA], tokenizer).sample(0).tokens,
        ChatDataset([{"messages": TURNS}], tokenizer).sample(0).tokens,
    ]
    assert [ids[:1] + ids[1:].count(first) * [first] for ids in samples] == [[first]] * len(samples)
    assert samples[0] == samples[2] == samples[4] == samples[5]


def test_a_tokenizer_that_adds_none():
    tokenizer = byte_tokenizer()
    assert encode_text(tokenizer, "<s>x") == tokenizer.encode("<s>x")
    assert encode_text(tokenizer, "") == []


def test_generation_reads_the_first_token_once(tokenizer):
    from pyloss.generation import generate

    seen = []

    def step(ids, cache):
        seen.extend(ids.tolist())
        logits = [0.0] * tokenizer.vocab_size
        logits[tokenizer.eos_token_id] = 1
        return __import__("numpy").array(logits)

    model = SimpleNamespace(step=step, make_cache=lambda: None)
    generate(
        model,
        tokenizer,
        tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True),
    )
    assert seen.count(tokenizer.bos_token_id) == 1 and seen[0] == tokenizer.bos_token_id


def test_the_last_token_once(tokenizer):
    end = tokenizer.eos_token_id
    texts = ["x", "x</s>", "x</s>\n", tokenizer.apply_chat_template(TURNS, tokenize=False)]
    for text in texts:
        tokens = TextDataset([{"text": text}], tokenizer).sample(0).tokens
        assert tokens.count(end) == 1 and is_ended(tokenizer, tokens), text
    assert TextDataset([{"text": "x</s>y"}], tokenizer).sample(0).tokens.count(end) == 2
    assert CompletionsDataset([QA], tokenizer).sample(0).tokens.count(end) == 1


def test_other_end_tokens_end_a_text_too(tokenizer):
    other = tokenizer.backend.token_to_id("<|eot|>")
    tokenizer.eos_token_ids.add(other)
    assert TextDataset([{"text": "x<|eot|>"}], tokenizer).sample(0).tokens[-1] == other
    assert (
        eos_ids(tokenizer) == {tokenizer.eos_token_id, other}
        and end_id(tokenizer) == tokenizer.eos_token_id
    )
    nameless = SimpleNamespace(eos_token_id=None, eos_token_ids={7, 5})
    assert (
        end_id(nameless) == 5
        and end_id(SimpleNamespace()) is None
        and eos_ids(SimpleNamespace(eos_token_ids=3)) == {3}
    )
