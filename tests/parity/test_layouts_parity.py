"""Files as the libraries of their layouts write them, to the token ids that TRL makes of them."""

import copy
import json

import pytest
from chat_templates import unmarked

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets", reason="compares with TRL (parity extra)")
data_utils = pytest.importorskip("trl.data_utils", reason="compares with TRL (parity extra)")

from pyloss.models.tokenizer import Tokenizer
from pyloss.tuner.datasets import load_dataset

CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "naïve – 日本語?"},
    {"role": "assistant", "content": "Yes, 🙂."},
    {"role": "user", "content": "And\nnow?"},
    {"role": "assistant", "content": " No. "},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "user", "value": "One?"},
    {"from": "assistant", "value": "One."},
    {"from": "user", "value": "Two?"},
    {"from": "assistant", "value": 'Two, "quoted".'},
]


def calls(arguments):
    """A round of a tool, with the arguments of its call as an object or as JSON text."""
    call = {"id": "1", "type": "function", "function": {**CALL, "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "assistant", "content": "It rains."},
    ]


def asked(prompt, completion):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


ALPACA = [("Say it.", "", "it"), ("Add.", "1 and 2", "3")]
TEXTS = [("One?", "It is one."), ("Two\nlines, 日本?", "'Two', or \"2\"")]

# The records of a file, and the same as TRL takes them.
LAYOUTS = {
    "OpenAI": ([{"messages": CHAT}, {"messages": CHAT[1:3]}], None),
    "TRL's ShareGPT": ([{"conversations": SHAREGPT}, {"conversations": SHAREGPT[1:3]}], None),
    "ShareGPT": (
        [
            {
                "conversations": [
                    {"from": {"user": "human", "assistant": "gpt"}[m["from"]], "value": m["value"]}
                    for m in SHAREGPT[1:]
                ],
                "system": "Be brief.",
            }
        ],
        [{"conversations": SHAREGPT}],
    ),
    "TRL's prompt and completion": ([asked(*pair) for pair in TEXTS], None),
    "Alpaca": (
        [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in ALPACA],
        [asked("\n".join(filter(None, row[:2])), row[2]) for row in ALPACA],
    ),
    "prompt and response": (
        [{"prompt": a, "response": b} for a, b in TEXTS],
        [asked(*pair) for pair in TEXTS],
    ),
    "question, answer and context": (
        [{"context": "Facts.", "question": a, "answer": b} for a, b in TEXTS],
        [asked(f"Facts.\n{a}", b) for a, b in TEXTS],
    ),
    "tool calls": ([{"messages": calls(CALL["arguments"]), "tools": TOOLS}], None),
    "tool calls as JSON text": (
        [{"messages": calls(json.dumps(CALL["arguments"])), "tools": json.dumps(TOOLS)}],
        [{"messages": calls(CALL["arguments"]), "tools": TOOLS}],
    ),
    "parts of contents": (
        [{"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]}],
        [{"messages": CHAT}],
    ),
}
WRITERS = {
    "jsonl": lambda rows, path: path.write_text("".join(json.dumps(r) + "\n" for r in rows)),
    "json": lambda rows, path: path.write_text(json.dumps(rows, indent=2)),
    "datasets.jsonl": lambda rows, path: datasets.Dataset.from_list(rows).to_json(path),
    "parquet": lambda rows, path: datasets.Dataset.from_list(rows).to_parquet(path),
    "csv": lambda rows, path: datasets.Dataset.from_list(rows).to_csv(path, index=False),
}
TEMPLATE = unmarked("qwen2.5")


@pytest.fixture(scope="module")
def sides():
    """transformers' tokenizer and pyloss's, of the same byte-level BPE and chat template."""
    models, pre_tokenizers = tokenizers.models, tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|im_start|>", "<|im_end|>"],
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([str(LAYOUTS)], trainer)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    again = tokenizers.Tokenizer.from_str(backend.to_str())
    return theirs, Tokenizer(again, {"eos_token": "<|im_end|>"}, chat_template=TEMPLATE)


def trl_ids(tokenizer, record):
    """The ids that TRL's SFT trainer gets of a record: its conversion, template and tokens."""
    record = data_utils.maybe_convert_to_chatml(copy.deepcopy(record))
    texts = data_utils.apply_chat_template(record, tokenizer, tools=record.get("tools"))
    text = texts.get("text") or texts["prompt"] + texts["completion"]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


FILES = [
    (name, writer)
    for name, (records, _) in LAYOUTS.items()
    for writer in WRITERS
    # Cells of a table hold texts.
    if writer != "csv" or all(isinstance(cell, str) for cell in records[0].values())
]


@pytest.mark.parametrize(("name", "writer"), FILES)
def test_token_ids(sides, tmp_path, name, writer):
    theirs, mine = sides
    records, same = LAYOUTS[name]
    path = tmp_path / f"data.{writer}"
    WRITERS[writer](records, path)
    found, _, _ = load_dataset(str(path), mine, valid_split=0.0)
    assert len(found) == len(records)
    for i, record in enumerate(same or records):
        assert list(found.sample(i).tokens) == trl_ids(theirs, record)
