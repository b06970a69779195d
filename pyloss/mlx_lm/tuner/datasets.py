"""mlx_lm.tuner.datasets: records as tokens and the offset of their targets, by mlx-lm's rules."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyloss.io.console import out
from pyloss.io.files import user_path
from pyloss.mlx_lm.names import absent
from pyloss.tuner.data.hub import rows_of
from pyloss.tuner.data.records import Records, check_messages, field

__all__ = [
    "CacheDataset",
    "ChatDataset",
    "CompletionsDataset",
    "ConcatenatedDataset",
    "TextDataset",
    "create_dataset",
    "load_custom_hf_dataset",
    "load_dataset",
    "load_hf_dataset",
    "load_local_dataset",
]

__getattr__ = absent(__name__)

_SPLITS = ("train", "valid", "test")

Sample = tuple[list[int], int]

#: what errors call a record whose place is not known
_RECORD = "a record of the data"


class _Records:
    """Records with a tokenizer; `process(record)` gives its tokens and the first target.

    `check(record, where)` raises ValueError, naming `where`, for a record of another layout.
    """

    check: Callable[[Mapping[str, Any], str], None]

    def __init__(self, data: Any, tokenizer: Any) -> None:
        self._data = data
        self.tokenizer = tokenizer

    def __getitem__(self, idx: int) -> Any:
        return self._data[idx]

    def __len__(self) -> int:
        return len(self._data)

    def _chat(self, messages: Any, tools: Any, mask: bool, generation: bool) -> Sample:
        """A conversation; with `mask` its targets begin after all messages but the last."""
        render = self.tokenizer.apply_chat_template
        tokens = render(messages, tools=tools, return_dict=False)
        if not mask:
            return tokens, 0
        options = {"tools": tools, "add_generation_prompt": generation, "return_dict": False}
        return tokens, len(render(messages[:-1], **options))


class TextDataset(_Records):
    """Records `{"text": ...}`; the end token is appended if the text lacks it."""

    def __init__(self, data: Any, tokenizer: Any, text_key: str = "text"):
        super().__init__(data, tokenizer)
        self.text_key = text_key

    def check(self, record: Mapping[str, Any], where: str) -> None:
        field(record, self.text_key, str, where, f"{self.text_key!r}, as the first record")

    def process(self, d: Mapping[str, Any]) -> Sample:
        self.check(d, _RECORD)
        tokens = self.tokenizer.encode(d[self.text_key])
        if not tokens or tokens[-1] != self.tokenizer.eos_token_id:
            tokens.append(self.tokenizer.eos_token_id)
        return tokens, 0


class ChatDataset(_Records):
    """Records `{"messages": [...], "tools": [...]}`."""

    def __init__(
        self, data: Any, tokenizer: Any, chat_key: str = "messages", mask_prompt: bool = False
    ):
        super().__init__(data, tokenizer)
        self.chat_key, self.mask_prompt = chat_key, mask_prompt

    def check(self, record: Mapping[str, Any], where: str) -> None:
        check_messages(record, self.chat_key, where)

    def process(self, d: Mapping[str, Any]) -> Sample:
        self.check(d, _RECORD)
        messages = d[self.chat_key]
        answered = messages[-1].get("role") == "assistant"
        return self._chat(messages, d.get("tools"), self.mask_prompt, answered)


class CompletionsDataset(_Records):
    """Records `{"prompt": ..., "completion": ...}`, under any two keys."""

    def __init__(
        self, data: Any, tokenizer: Any, prompt_key: str, completion_key: str, mask_prompt: bool
    ):
        super().__init__(data, tokenizer)
        self.prompt_key, self.completion_key = prompt_key, completion_key
        self.mask_prompt = mask_prompt

    def check(self, record: Mapping[str, Any], where: str) -> None:
        keys = (self.prompt_key, self.completion_key)
        for key in keys:
            field(record, key, str, where, f"{keys[0]!r} and {keys[1]!r}, as the first record")

    def process(self, d: Mapping[str, Any]) -> Sample:
        self.check(d, _RECORD)
        messages = [
            {"role": "user", "content": d[self.prompt_key]},
            {"role": "assistant", "content": d[self.completion_key]},
        ]
        return self._chat(messages, d.get("tools"), self.mask_prompt, True)


class ConcatenatedDataset:
    """Several datasets in a row. A record says in "_dataset" which one has it."""

    def __init__(self, data: Sequence[Any]):
        self._data = data
        self._len = sum(len(d) for d in data)

    def __getitem__(self, idx: int) -> Any:
        if not -self._len <= idx < self._len:
            raise IndexError(f"there are {self._len} records, and none has the number {idx}")
        idx %= self._len
        for place, data in enumerate(self._data):
            if idx < len(data):
                return {**data[idx], "_dataset": place}
            idx -= len(data)
        raise AssertionError

    def process(self, d: Mapping[str, Any]) -> Sample:
        sample: Sample = self._data[d["_dataset"]].process(d)
        return sample

    def __len__(self) -> int:
        return self._len


class CacheDataset:
    """Samples of a dataset, each processed at its first use and kept."""

    def __init__(self, data: Any):
        self._data = data
        self._proc_data: list[Any] = [None] * len(data)

    def itemlen(self, idx: int) -> int:
        """What sorts samples into batches: the length of the record, of a dict its keys."""
        return len(self._data[idx])

    def __getitem__(self, idx: int) -> Any:
        if self._proc_data[idx] is None:
            self._proc_data[idx] = self._data.process(self._data[idx])
        return self._proc_data[idx]

    def __len__(self) -> int:
        return len(self._data)


def create_dataset(data: Any, tokenizer: Any, config: Any) -> Any:
    """The dataset of records, by the keys of the first; `config` may name others and mask prompts.

    Raises ValueError for records of another layout, and for `mask_prompt` over texts.
    """
    mask_prompt = getattr(config, "mask_prompt", False)
    prompt = getattr(config, "prompt_feature", "prompt")
    completion = getattr(config, "completion_feature", "completion")
    chat = getattr(config, "chat_feature", "messages")
    text = getattr(config, "text_feature", "text")
    sample = data[0]
    if prompt in sample and completion in sample:
        return CompletionsDataset(data, tokenizer, prompt, completion, mask_prompt)
    if chat in sample:
        return ChatDataset(data, tokenizer, chat_key=chat, mask_prompt=mask_prompt)
    if text in sample:
        if mask_prompt:
            raise ValueError("Prompt masking not supported for text dataset.")
        return TextDataset(data, tokenizer, text_key=text)
    raise ValueError(
        f"Unsupported data format: a record has the keys {', '.join(map(str, sample))}, and needs "
        f"{prompt} and {completion}, or {chat}, or {text} (pyloss train reads more layouts)"
    )


def load_local_dataset(data_path: Path, tokenizer: Any, config: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` from the .jsonl files of a folder; `[]` for a missing or empty one.

    Raises FormatError for a line that is no JSON object, ValueError for a record whose layout is
    not the first one's; both name the file and the line.
    """

    def read(name: str) -> Any:
        path = user_path(data_path) / f"{name}.jsonl"
        if not path.exists():
            return []
        records = Records(path)
        if not records:
            return []
        data = create_dataset(records, tokenizer, config)
        for index, record in enumerate(records):
            data.check(record, records.where(index))
        return data

    train, valid, test = map(read, _SPLITS)
    return train, valid, test


def load_hf_dataset(data_id: str, tokenizer: Any, config: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of a dataset on the hub; `[]` for a split that it lacks."""
    splits = rows_of(data_id)
    train, valid, test = (
        create_dataset(splits[name], tokenizer, config) if name in splits else []
        for name in _SPLITS
    )
    return train, valid, test


def load_custom_hf_dataset(args: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of `args.hf_dataset`, one mapping or a list of them."""
    given = args.hf_dataset
    collection = []
    for entry in [given] if isinstance(given, dict) else given:
        out(f"Loading Hugging Face dataset {entry['path']}.")
        entry["mask_prompt"] = getattr(args, "mask_prompt", False)
        config, options = types.SimpleNamespace(**entry), entry.get("config", {})
        wanted = {
            "train": entry.get("train_split", "train[:80%]") if args.train else None,
            "valid": entry.get("valid_split", "train[-10%:]") if args.train else None,
            "test": entry.get("test_split") if args.test else None,
        }
        if args.test and wanted["test"] is None:
            raise ValueError(f"hf_dataset {entry['path']!r} has no 'test_split', and test is set")
        collection.append(
            [
                []
                if split is None
                else create_dataset(
                    rows_of(entry["path"], split=split, **options), tokenizer, config
                )
                for split in wanted.values()
            ]
        )
    if len(collection) == 1:
        train, valid, test = collection[0]
    else:
        train, valid, test = map(ConcatenatedDataset, zip(*collection, strict=True))
    return train, valid, test


def load_dataset(args: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of `args.hf_dataset`, or of `args.data`: a folder or a hub dataset.

    Raises ValueError without training data where `args.train`, without test data where `args.test`.
    """
    if getattr(args, "hf_dataset", False):
        train, valid, test = load_custom_hf_dataset(args, tokenizer)
    elif user_path(args.data).exists():
        train, valid, test = load_local_dataset(user_path(args.data), tokenizer, args)
    else:
        out(f"Loading Hugging Face dataset {args.data}.")
        train, valid, test = load_hf_dataset(args.data, tokenizer, args)
    for name, data, wanted in (("Training", train, args.train), ("Test", test, args.test)):
        if wanted and len(data) == 0:
            raise ValueError(f"{name} set not found or empty in {args.data}.")
    if args.train and len(valid) == 0:
        out("Warning: Validation set not found or empty. Training will proceed without validation.")
    return train, valid, test
