"""Targets of conversations against transformers' mask of the text that a template marks."""

import numpy as np
import pytest
from chat_templates import TEMPLATES, marked, unmarked

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from pyloss.models.tokenizer import Tokenizer
from pyloss.tuner.data.targets import chat_sample
from pyloss.tuner.data.turns import MANY, Conversation

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<think>",
    "</think>",
]
SPECIAL += ["<AI>", "<用户>", "<reserved_106>", "<reserved_107>"]


def say(*turns):
    """Messages from "u text", "a text" and so on."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [t if isinstance(t, dict) else {"role": names[t[0]], "content": t[2:]} for t in turns]


CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]
THOUGHT = "a <think>\nHe asks for one.\n</think>\n\n"

CONVERSATIONS = {
    "single turn": (say("u Hello there", "a Good morning, how are you?"), None),
    "turns": (
        say(
            "u one?",
            "a The first answer.",
            "u two?",
            "a The second answer.",
            "u three?",
            "a The third.",
        ),
        None,
    ),
    "system prompt": (say("s Be brief.", "u one?", "a yes one", "u two?", "a yes two"), None),
    "the same answers": (say("u yes", "a yes", "u yes", "a yes", "u yes", "a yes"), None),
    "white space": (say("u  one ", "a  yes one\n", "u two\n\n", "a \n yes  two "), None),
    "tokens of the tags": (say("u <", "a <b> and <th", "u >", "a |im_start|>assistant\n"), None),
    "thoughts": (
        say(
            "u one?", THOUGHT + "The number one it is.", "u two?", THOUGHT + "The number two it is."
        ),
        None,
    ),
    "a short answer after a thought": (say("u one?", THOUGHT + "1", "u two?", "a 2"), None),
    "a turn that is only a thought": (say("u one?", THOUGHT, "u two?", "a two it is"), None),
    "empty turns": (say("u one?", "a ", "u two?", "a two", "u three?", "a "), None),
    "ends with the user": (say("u one?", THOUGHT + "one", "u two?"), None),
    "tool round": (say("u weather?", CALLS, "t rain", "a It rains."), TOOLS),
    "tool rounds and another user": (
        say(
            "u weather?",
            CALLS,
            "t rain",
            "a <think>\nRain.\n</think>\n\nIt rains.",
            "u and now?",
            CALLS,
            "t sun",
            "a Sun.",
        ),
        TOOLS,
    ),
    "thoughts beside the content": (
        say(
            "u one?", {"role": "assistant", "content": "one", "reasoning_content": "easy"}, "u two?"
        )
        + [{"role": "assistant", "content": "two", "reasoning_content": "not so easy"}],
        None,
    ),
}


@pytest.fixture(scope="module")
def theirs():
    """transformers' tokenizer with a byte-level BPE that splits most tags into many tokens."""
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [str(messages) for messages, _ in CONVERSATIONS.values()] + [
        unmarked(name) for name in TEMPLATES
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL, vocab_size=900, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def mine(theirs):
    """The same tokens in pyloss; offsets with and without the spaces before words."""
    from tokenizers import Tokenizer as Backend, processors

    plain, trimmed = (Backend.from_str(theirs.backend_tokenizer.to_str()) for _ in range(2))
    trimmed.post_processor = processors.ByteLevel(trim_offsets=True)
    return [
        Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
        for backend in (plain, trimmed)
    ]


def oracle(theirs, name, messages, tools):
    """Tokens and mask of transformers; None if the template refuses."""
    options = {
        "return_dict": True,
        "return_assistant_tokens_mask": True,
        "chat_template": marked(name),
    }
    try:
        found = theirs.apply_chat_template(messages, tools=tools, **options)
    except Exception:
        return None
    return found["input_ids"], found["assistant_masks"]


def ours(tokenizer, template, messages, tools, train_on="assistant"):
    tokenizer.chat_template = template
    sample = chat_sample(tokenizer, messages, tools, train_on)
    return sample.tokens, sample.weights


def texts(tokenizer, tokens, mask):
    """The trained tokens, for a message."""
    return [tokenizer.decode([token]) for token, on in zip(tokens, mask) if on]


def test_there_are_enough_templates():
    assert len(TEMPLATES) >= 70


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_are_what_the_template_would_mark(theirs, mine, name):
    seen = 0
    for kind, (messages, tools) in CONVERSATIONS.items():
        expected = oracle(theirs, name, messages, tools)
        if expected is None:
            continue
        seen += 1
        tokens, mask = expected
        for tokenizer, template in (
            (mine[0], unmarked(name)),
            (mine[1], unmarked(name)),
            (mine[0], marked(name)),
        ):
            found, weights = ours(tokenizer, template, messages, tools)
            whole = np.zeros(len(tokens))
            whole[: len(weights)] = weights
            assert tokens[: len(found)] == found, kind
            assert texts(mine[0], tokens, whole) == texts(mine[0], tokens, mask), kind
            assert whole.tolist() == mask, kind
    assert seen >= 5


#: The rounds of conversations with many turns, and their ends.
ROUNDS = {
    "answers": (say("u and {}?", "a Then it is {}."), []),
    "the same": (say("u yes", "a yes"), say("u yes", "a yes yes")),
    "thoughts": (say("u and {}?", THOUGHT + "{}"), say("u last?", "a none")),
    "empty ones between": (say("u and {}?", "a {}", "u or?", "a "), []),
    "tools at the end": (
        say("u and {}?", "a Then {}."),
        [*say("u weather?"), CALLS, *say("t rain", "a It rains.")],
    ),
    "several in turn": (
        say("u and {}?", "a Then {}."),
        say("u so?", "a one", "u so?", THOUGHT + "two"),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_of_many_turns(theirs, mine, name):
    """Turns that are found together, and turns that a template writes differently."""
    for kind, (rounds, end) in ROUNDS.items():
        messages = [
            m | {"content": m["content"].format(k)} for k in range(MANY) for m in rounds
        ] + end
        expected = oracle(theirs, name, messages, None)
        if expected is None:
            continue
        tokens, mask = expected
        found, weights = ours(mine[0], unmarked(name), messages, None)
        assert tokens[: len(found)] == found, kind
        assert weights.tolist() == mask[: len(found)] and not any(mask[len(found) :]), kind


def test_a_template_renders_many_turns_a_few_times(mine, monkeypatch):
    rounds, end = ROUNDS["answers"]
    messages = [m | {"content": m["content"].format(k)} for k in range(200) for m in rounds] + end
    tokenizer = mine[0]
    tokenizer.chat_template = unmarked("qwen2.5")
    conversation, rendered = Conversation(tokenizer, messages, None), []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(1) or apply(*a, **k)
    )
    spans = conversation.turns([i for i, m in enumerate(messages) if m["role"] == "assistant"])
    assert len(spans) == 200 and len(rendered) < 20


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_turn_alone(theirs, mine, name):
    messages, tools = CONVERSATIONS["turns"]
    tokens, mask = oracle(theirs, name, messages, tools)
    before = np.flatnonzero(np.diff([0, *mask]) == 1)[-1]
    for template in (unmarked(name), marked(name)):
        found, weights = ours(mine[0], template, messages, tools, "last")
        assert found == tokens[: len(found)]
        assert np.flatnonzero(weights).tolist() == [i for i in np.flatnonzero(mask) if i >= before]


def test_transformers_tokenizers_are_taken_too(theirs):
    for name in ("qwen3", "llama 3", "deepseek r1"):
        messages, tools = CONVERSATIONS["a short answer after a thought"]
        tokens, mask = oracle(theirs, name, messages, tools)
        for template in (unmarked(name), marked(name)):
            found, weights = ours(theirs, template, messages, tools)
            assert found == tokens[: len(found)] and weights.tolist() == mask[: len(found)]
