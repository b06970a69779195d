"""JSONL records of all kinds with values of other types, under several chat templates."""

import json
from types import SimpleNamespace

import tiny_files
from mutation import words_of
from running import put_files

WORDS = words_of(
    *(f"tuner/data/{name}" for name in ("records", "layouts", "dataset_classes", "creating")),
    *("tuner/data/targets", "tuner/data/hub", "tuner/datasets"),
)
WORDS += [
    "system",
    "user",
    "assistant",
    "tool",
    "content",
    "role",
    "type",
    "text",
    "image_url",
    "function",
    "arguments",
    "name",
]
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}
RECORDS = [
    {"text": "hello world 12"},
    {"prompt": "hello", "completion": "world 12"},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "he ll"}]},
    {"messages": [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4"}, {"role": "assistant", "content": "5"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, {"role": "assistant", "content": "12", "reasoning_content": "so"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "7", "name": "f"}, {"role": "assistant", "content": "seven"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]},
    {"instruction": "hello", "input": "1", "output": "world 12", "history": [["he", "ll"]], "system": "2"},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "12"}], "tools": "[]"},
    {"question": "hello", "context": "1", "answers": {"text": ["12"]}},
]  # fmt: skip
TEMPLATES = [
    tiny_files.CHATML,
    "{% for m in messages %}{% if m.content is string %}[{{ m.role }}]{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}",
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ (m.content or '').split('</think>')[-1] }}"
    "{% else %}{{ (m.content or '') | trim }}{% endif %}{% for t in m.tool_calls or [] %}{{ t.function.name }}{{ t.function.arguments | tojson }}{% endfor %}</s>{% endfor %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token }}{% endfor %}",
    None,
]  # fmt: skip


def prepare():
    tiny_files.tokenizer()


def make(m):
    kind = m.pick(RECORDS)
    lines = [
        json.dumps(
            kind if m.chance(0.7) else m.pick(RECORDS[2:6] if kind in RECORDS[2:6] else [kind])
        )
        for _ in range(2)
    ]
    at = m.below(len(lines))
    if not m.pristine:
        if m.chance(0.85):
            data = [line.encode() for line in lines]
            data[at] = m.json(lines[at], WORDS)
            data = b"\n".join(data)
        else:
            data = m.lines("\n".join(lines), WORDS)
    else:
        data = "\n".join(lines).encode()
    asked = {
        "mask_prompt": m.chance(0.5),
        "train_on": m.pick((None, "last", "assistant", "all")),
        "template": 0 if m.pristine else m.below(len(TEMPLATES)),
    }
    asked["mask_prompt"] = (
        asked["mask_prompt"] and asked["train_on"] != "all" and "messages" in kind
    )
    if m.pristine:
        asked = {"mask_prompt": False, "train_on": None, "template": 2 if "messages" in kind else 0}
    return {
        "train.jsonl": data,
        "valid.jsonl": lines[0].encode("utf-8", "replace"),
        "asked": json.dumps(asked).encode(),
    }


def use(files, folder):
    import copy

    from pyloss.tuner.data.batching import iterate_batches
    from pyloss.tuner.datasets import CacheDataset, load_local_dataset

    files = dict(files)
    asked = json.loads(files.pop("asked"))
    put_files(folder, files)
    tokenizer = copy.copy(tiny_files.tokenizer())
    tokenizer.chat_template = TEMPLATES[asked.pop("template")]
    train = CacheDataset(load_local_dataset(folder, tokenizer, SimpleNamespace(**asked))[0])
    for number in range(len(train)):
        sample = train.sample(number)
        assert len(sample.tokens) == len(sample.weights)
        assert all(0 <= token < len(tokenizer) for token in sample.tokens)
    if len(train):
        with tiny_files.quiet():
            next(iter(iterate_batches(train, 2, 64)))
