"""Templates of real families: transformers' text, and the assistant's targets."""

import numpy as np
import pytest
from family_templates import TEMPLATES, marked, published

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from pyloss.describing import template_features
from pyloss.models.tokenizer import Tokenizer
from pyloss.tuner.data.targets import chat_sample

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "[INST]", "[/INST]", "<think>", "</think>",
]  # fmt: skip
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi", "name": "weather"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city <now>.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
THOUGHT = "<think>\nHe asks for one.\n</think>\n\n"


def say(*turns):
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [t if isinstance(t, dict) else {"role": names[t[0]], "content": t[2:]} for t in turns]


#: messages and tools
CONVERSATIONS = {
    "one turn": (say("u Hello there", "a Good morning."), None),
    "turns": (say("u one?", "a The first.", "u two?", "a The second.", "u three?", "a Last."), None),
    "system": (say("s Be brief. It's <b> & 'c'.", "u one?", "a yes one", "u two?", "a two"), None),
    "system, no thoughts": (say("s Be brief. /no_think", "u one?", "a yes"), None),
    "white space": (say("u  one ", "a  yes one\n", "u two\n\n", "a \n yes  two "), None),
    "thoughts": (say("u one?", f"a {THOUGHT}One.", "u two?", f"a {THOUGHT}Two."), None),
    "thoughts beside": (
        say("u one?", {"role": "assistant", "content": "one", "reasoning_content": "easy"}, "u two?",
            {"role": "assistant", "content": "two", "reasoning_content": "hard"}),
        None,
    ),
    "tools unused": (say("u Hello", "a Hi."), TOOLS),
    "tool round": (say("u weather?", CALLS, ANSWER, "a It rains."), TOOLS),
    "system and tools": (say("s Help.", "u weather?", CALLS, ANSWER, "a It rains.", "u so?", "a Stay."), TOOLS),
    "ends with the user": (say("u one?", "a one", "u two?"), None),
    "other alphabets": (say("u 你好 – čau?", "a Привет 🙂"), None),
    "tools in the system message": (
        [{"role": "system", "content": "Help.", "tools": '[{"name": "f"}]'}, *say("u one?", "a f()")],
        None,
    ),
}  # fmt: skip
#: variables of the templates
OPTIONS = [
    {}, {"enable_thinking": True}, {"enable_thinking": False}, {"thinking": True}, {"keep_past_thinking": True},
    {"date_string": "26 Jul 2024"}, {"tools_in_user_message": False}, {"controls": {"length": "short"}},
    {"documents": [{"doc_id": 1, "title": "t", "text": "A fact."}]}, {"python_tools": ["f(x)"]},
]  # fmt: skip

#: what a template takes, as `pyloss info` says it
FEATURES = {
    "smollm3": ["system role", "tools", "thinking, switched by enable_thinking"],
    "olmo2": ["system role"],
    "granite3": ["system role", "tools"],
    "gemma2": [],
    "gemma3": ["system role"],
    "phi3": ["system role"],
    "phi4-mini": ["system role"],
    "qwen3": ["system role", "tools", "thinking, switched by enable_thinking"],
    "lfm2": ["system role", "tools"],
    "llama3": ["system role", "tools"],
    "mistral": ["system role", "tools"],
}


@pytest.fixture(scope="module")
def both():
    """transformers' tokenizer and ours, of one byte-level vocabulary."""
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL,
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*TEMPLATES.values(), *(str(messages) for messages, _ in CONVERSATIONS.values())]
    backend.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return theirs, Tokenizer(Backend.from_str(backend.to_str()), special)


def rendered(tokenizer, template, messages, tools, **options):
    """The text, or None if the template refuses."""
    given = {"tools": tools, "chat_template": template, "tokenize": False, **options}
    try:
        return tokenizer.apply_chat_template(messages, **given)
    except Exception as error:
        assert not isinstance(tokenizer, Tokenizer) or isinstance(error, ValueError), error
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_text(both, name):
    theirs, ours = both
    seen = 0
    for template in (published(name), marked(name)):
        for kind, (messages, tools) in CONVERSATIONS.items():
            for options in OPTIONS:
                for prompt in (False, True):
                    given = (template, messages, tools)
                    want = rendered(theirs, *given, add_generation_prompt=prompt, **options)
                    got = rendered(ours, *given, add_generation_prompt=prompt, **options)
                    assert got == want, (kind, options, prompt)
                    seen += want is not None
    assert seen > 100


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_change_no_text(both, name):
    _, ours = both
    for messages, tools in CONVERSATIONS.values():
        one, other = (rendered(ours, t, messages, tools) for t in (published(name), marked(name)))
        assert one == other


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets(both, name):
    theirs, ours = both
    seen = 0
    for kind, (messages, tools) in CONVERSATIONS.items():
        if rendered(theirs, marked(name), messages, tools) is None:
            ours.chat_template = published(name)
            with pytest.raises(ValueError):
                chat_sample(ours, messages, tools, "assistant")
            continue
        found = theirs.apply_chat_template(
            messages, tools=tools, chat_template=marked(name), return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        tokens, mask = found["input_ids"], found["assistant_masks"]
        for template in (published(name), marked(name)):
            ours.chat_template = template
            sample = chat_sample(ours, messages, tools, "assistant")
            assert sample.tokens == tokens[: len(sample.tokens)], kind
            weights = np.zeros(len(tokens), int)
            weights[: len(sample.weights)] = sample.weights
            text = [ours.decode([t]) for t, on in zip(tokens, weights, strict=True) if on]
            want = [ours.decode([t]) for t, on in zip(tokens, mask, strict=True) if on]
            assert text == want and weights.tolist() == mask, (kind, template == marked(name))
        seen += any(mask)
    assert seen >= 5


@pytest.mark.parametrize("name", TEMPLATES)
def test_features(both, name):
    _, ours = both
    ours.chat_template = published(name)
    assert template_features(ours) == FEATURES[name]
    ours.chat_template = marked(name)
    assert template_features(ours) == [*FEATURES[name], "marks around the assistant's text"]


def test_refusals_say_what_the_template_says(both):
    _, ours = both
    for name, conversation, message in (
        ("gemma2", "system", "System role not supported"),
        ("gemma3", "tool round", "Conversation roles must alternate"),
        ("llama3", say("u a", {**CALLS, "tool_calls": [CALL, CALL]}), "only supports single tool-calls"),
        ("mistral", say("u a", {**CALLS, "tool_calls": [{**CALL, "id": "1"}]}), "with length 9"),
    ):  # fmt: skip
        messages = CONVERSATIONS[conversation][0] if isinstance(conversation, str) else conversation
        with pytest.raises(ValueError, match=message):
            ours.apply_chat_template(messages, chat_template=published(name), tokenize=False)
