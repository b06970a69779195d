"""A byte tokenizer with end tokens and pluggable chat templates; its ids can be read by eye.

Records for it, and the trained tokens of a sample as text.
"""

import re

import numpy as np

START, END = "<|im_start|>", "<|im_end|>"
SPECIALS = {START: 256, END: 257}

CHAT = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "yes one"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "yes two"},
    ]
}
QA = {"prompt": "why", "completion": "because"}


def chatml(messages, add_generation_prompt=False, tools=None):
    text = f"{START}tools\n{len(tools)}{END}\n" if tools else ""
    text += "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)
    return text + (f"{START}assistant\n" if add_generation_prompt else "")


def thinking(messages, add_generation_prompt=False, tools=None):
    """The generation prompt opens a thought; of the answers only the last has one, an empty one."""
    text = ""
    for i, m in enumerate(messages):
        thought = "<think></think>" if m["role"] == "assistant" and i == len(messages) - 1 else ""
        text += f"{START}{m['role']}\n{thought}{m['content']}{END}\n"
    return text + (f"{START}assistant\n<think>\n" if add_generation_prompt else "")


def no_end(messages, add_generation_prompt=False, tools=None):
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + (
        "assistant: " if add_generation_prompt else ""
    )


def shuffling(messages, add_generation_prompt=False, tools=None):
    """Prefixes render differently: the length comes first, and texts are in capitals."""
    return f"{len(messages)} {add_generation_prompt}" + no_end(messages).upper()


class FakeTokenizer:
    eos_token_id = pad_token_id = SPECIALS[END]
    bos_token_id = None
    eos_token_ids = frozenset({SPECIALS[END]})
    vocab_size = 258
    chat_template = "{{ messages }}"

    def __init__(self, template=chatml):
        self.template = template
        self.calls = 0

    def encode(self, text, add_special_tokens=True):
        self.calls += 1
        parts = re.split(f"({re.escape(START)}|{re.escape(END)})", text)
        return [t for p in parts for t in ([SPECIALS[p]] if p in SPECIALS else p.encode())]

    def decode(self, ids, skip_special_tokens=False):
        names = {i: s.encode() for s, i in SPECIALS.items()}
        return b"".join(names.get(i, bytes([i % 256])) for i in ids).decode(errors="replace")

    def apply_chat_template(
        self, messages, tools=None, add_generation_prompt=False, tokenize=True, **kwargs
    ):
        text = self.template(messages, add_generation_prompt, tools)
        return self.encode(text) if tokenize else text


def targets(sample, tokenizer):
    """The trained tokens, decoded, one string per unbroken run."""
    runs, last = [], None
    for i in np.flatnonzero(sample.weights):
        runs = runs if last == i - 1 else [*runs, []]
        runs[-1].append(sample.tokens[i])
        last = i
    return [tokenizer.decode(r) for r in runs]
