"""Token ids and offsets against mlx-lm's dataset classes, with the same records and template."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx-lm (pip install mlx-lm, on Linux with mlx-cpu)")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from mlx_lm.tuner import datasets as theirs

from pyloss.tuner import datasets as ours

TEMPLATE = (
    "{% if tools %}<s>tools {{ tools | length }}<e>\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TEXTS = [
    "Hello.",
    " two  words",
    "tab\tand\nline",
    "naïve – 日本語",
    "🙂 emoji",
    "{'a': 1}",
    "the end <e>",
    "x",
]
TURNS = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TEXTS)]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHATS = [{"messages": TURNS[:n]} for n in (2, 4, 8)]
CHATS += [{"messages": [{"role": "system", "content": "Be brief."}, *TURNS[:2]], "tools": TOOLS}]
PAIRS = [{"prompt": a, "completion": b} for a in TEXTS for b in TEXTS]


@pytest.fixture(scope="module")
def tokenizer():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<s>", "<e>"],
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(TEXTS * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="<e>",
        pad_token="<e>",
        chat_template=TEMPLATE,
    )


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize(
    ("kind", "records", "keys"),
    [("ChatDataset", CHATS, ["messages"]), ("CompletionsDataset", PAIRS, ["prompt", "completion"])],
)
def test_turns(tokenizer, kind, records, keys, mask_prompt):
    mine = getattr(ours, kind)(records, tokenizer, *keys, mask_prompt)
    peer = getattr(theirs, kind)(records, tokenizer, *keys, mask_prompt)
    for i, record in enumerate(records):
        tokens, offset = peer.process(record)
        assert mine.process(record) == (tokens, offset)
        assert ours.CacheDataset(mine)[i] == theirs.CacheDataset(peer)[i]
        assert mine.sample(i).weights.sum() == len(tokens) - max(offset, 1)


def test_text(tokenizer):
    records = [{"text": t} for t in TEXTS]
    mine, peer = ours.TextDataset(records, tokenizer), theirs.TextDataset(records, tokenizer)
    for record in records:
        assert mine.process(record) == peer.process(record)


def test_concatenated(tokenizer):
    parts = [
        ("ChatDataset", CHATS, ["messages"]),
        ("CompletionsDataset", PAIRS, ["prompt", "completion"]),
    ]
    mine, peer = (
        m.ConcatenatedDataset(
            [
                getattr(m, kind)([dict(r) for r in rows], tokenizer, *keys, True)
                for kind, rows, keys in parts
            ]
        )
        for m in (ours, theirs)
    )
    assert len(mine) == len(peer)
    for i in range(len(mine)):
        assert mine[i] == peer[i] and mine.process(mine[i]) == peer.process(peer[i])


def test_local_folder(tokenizer, tmp_path):
    for split, n in (("train", 5), ("valid", 2), ("test", 1)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in PAIRS[:n]))
    args = SimpleNamespace(data=str(tmp_path), mask_prompt=True, train=True, test=True)
    for mine, peer in zip(ours.load_dataset(args, tokenizer), theirs.load_dataset(args, tokenizer)):
        assert (
            len(mine) == len(peer)
            and mine[0] == peer[0]
            and mine.process(mine[0]) == peer.process(peer[0])
        )
