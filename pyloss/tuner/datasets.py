"""Datasets: turn records into tokens and targets; load them from files or the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyloss.errors import FormatError, counted, said
from pyloss.io.files import user_path
from pyloss.models.text.chat_forms import as_text, tools_of
from pyloss.models.text.special import encode_text, end_id, is_ended
from pyloss.tuner.data.dataset_text import ShownDataset
from pyloss.tuner.data.files import ALLOWED, kind, read_records, split_files
from pyloss.tuner.data.layouts import (
    Converted,
    Layout,
    chat as chat_layout,
    continued,
    mapped,
    place_of,
    read_map,
    recognized,
)
from pyloss.tuner.data.records import Record, Records, check_messages, check_tools, field, keys_of
from pyloss.tuner.data.splitting import DEFAULT_SPLIT, check_shares, cut, split_keys
from pyloss.tuner.data.targets import TRAIN_ON, Sample, as_sample, chat_sample

log = logging.getLogger("pyloss")

SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
_NO_SPLITS = "no train.jsonl, valid.jsonl or test.jsonl in this folder"
_HUB_FILES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
_HUB_ALONE = (".parquet", ".arrow")  # of these, those that only the hub's package reads


def resolve_train_on(train_on: str | None, mask_prompt: bool) -> str:
    """`train_on` if given, else "last" with `mask_prompt` and "all" without.

    Raises `ValueError` for an unknown `train_on`, or one that contradicts `mask_prompt`.
    """
    if train_on is None:
        return "last" if mask_prompt else "all"
    if train_on not in TRAIN_ON:
        raise ValueError(
            f"train_on is {train_on!r}, and must be one of {', '.join(map(repr, TRAIN_ON))}"
        )
    if mask_prompt and train_on == "all":
        raise ValueError(
            "mask_prompt=True leaves the prompt untrained, but train_on='all' trains it: give "
            "one of them"
        )
    return train_on


class _Dataset(ShownDataset):
    """Records with a tokenizer. `dataset[i]` is the record as given.

    Attributes:
        tokenizer: encodes the records.
        train_on: "last", "assistant" or "all".
        mask_prompt: whether `train_on` leaves the prompt untrained.
        layout: how the records are laid out, if `create_dataset` made the dataset.
    """

    layout: Layout | None = None

    def __init__(
        self, data: Any, tokenizer: Any, mask_prompt: bool = False, train_on: str | None = None
    ):
        self._data = data
        self.tokenizer = tokenizer
        self.train_on = resolve_train_on(train_on, mask_prompt)
        self.mask_prompt = self.train_on != "all"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, idx: int) -> Record:
        record: Record = self._data[idx]
        return record

    def _facts(self) -> list[str]:
        return [f"train_on={self.train_on!r}"]

    def sample(self, idx: int) -> Sample:
        """The tokens of record `idx`, and each token's weight as a target.

        Raises `ValueError` for an unusable record.
        """
        record = self[idx]
        self.check(record, self.where(idx))
        try:
            return self._sample(record)
        except ValueError as e:
            raise ValueError(f"{self.where(idx)}: {e}") from e

    def process(self, d: Record) -> tuple[list[int], int]:
        """`(tokens, offset)` of one record, as in mlx-lm: the targets are `tokens[offset:]`.

        Raises `ValueError` if an offset cannot express the targets (several turns); use
        `sample(i)` for such records.
        """
        self.check(d, "record")
        return _as_offset(self._sample(d))

    def conversation(self, idx: int) -> tuple[list[dict[str, Any]], Any]:
        """The messages of record `idx`, and its tools or None.

        Raises `ValueError` for an unusable record, and for one of plain text.
        """
        record = self[idx]
        self.check(record, self.where(idx))
        try:
            return self._conversation(record)
        except ValueError as e:
            raise ValueError(f"{self.where(idx)}: {e}") from e

    def where(self, idx: int) -> str:
        """The origin of record `idx`, for error messages."""
        return place_of(self._data, idx)

    def given(self, idx: int) -> Record:
        """Record `idx` as its file has it; `self[idx]` may be converted from that."""
        return self._data.given(idx) if isinstance(self._data, Converted) else self[idx]

    def select(self, indices: Sequence[int]) -> Any:
        """The dataset of some of the records of a file."""
        part = copy(self)
        part._data = self._data.select(indices)
        return part

    def check_all(self) -> None:
        """Checks every record; raises `ValueError` for an unusable one."""
        for i in range(len(self)):
            self.check(self[i], self.where(i))

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Raises `ValueError` if the record lacks a needed key.

        The message names `where`, the keys found and the keys expected.
        """
        raise NotImplementedError

    def form(self, idx: int) -> Record:
        """Record `idx` with the keys prompt and completion, or messages, or text, and its tools."""
        raise NotImplementedError

    def system_prompt(self) -> str | None:
        """The system prompt at the start of every record; None if they do not share one."""
        return None

    def _sample(self, record: Record) -> Sample:
        raise NotImplementedError

    def _conversation(self, record: Record) -> tuple[list[dict[str, Any]], Any]:
        raise NotImplementedError


class TextDataset(_Dataset):
    """Records `{"text": ...}`. All tokens are targets; the end token is appended.

    Attributes:
        text_key: the record's key for the text.
    """

    def __init__(self, data: Any, tokenizer: Any, text_key: str = "text"):
        super().__init__(data, tokenizer)
        self.text_key = text_key

    def check(self, record: Mapping[str, Any], where: str) -> None:
        field(record, self.text_key, str, where, repr(self.text_key))

    def form(self, idx: int) -> Record:
        return {"text": self[idx][self.text_key]}

    def _sample(self, record: Record) -> Sample:
        tokens = encode_text(self.tokenizer, record[self.text_key])
        end = end_id(self.tokenizer)
        if end is not None and not is_ended(self.tokenizer, tokens):
            tokens.append(end)
        return Sample.from_spans(tokens, [(0, len(tokens))])

    def _conversation(self, record: Record) -> tuple[list[dict[str, Any]], Any]:
        raise ValueError(f"a record of {self.text_key!r} has no prompt and no reference answer")


class ChatDataset(_Dataset):
    """Records `{"messages": [{"role", "content"}, ...], "tools": [...]}`.

    The tokenizer's chat template renders them. `train_on` selects the targets: "last" (the last
    assistant turn, same as `mask_prompt=True`), "assistant" (every assistant turn) or "all"
    (every token).

    Attributes:
        chat_key: the record's key for the messages.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        chat_key: str = "messages",
        mask_prompt: bool = False,
        train_on: str | None = None,
    ):
        super().__init__(data, tokenizer, mask_prompt, train_on)
        self.chat_key = chat_key

    def check(self, record: Mapping[str, Any], where: str) -> None:
        check_messages(record, self.chat_key, where)

    def form(self, idx: int) -> Record:
        record = self[idx]
        return {"messages": record[self.chat_key], **_tools(record)}

    def system_prompt(self) -> str | None:
        return _shared(_system_prompt(self[i][self.chat_key]) for i in range(len(self)))

    def _sample(self, record: Record) -> Sample:
        return chat_sample(
            self.tokenizer, record[self.chat_key], tools_of(record.get("tools")), self.train_on
        )

    def _conversation(self, record: Record) -> tuple[list[dict[str, Any]], Any]:
        return list(record[self.chat_key]), tools_of(record.get("tools"))


class CompletionsDataset(_Dataset):
    """Records `{"prompt": ..., "completion": ...}`.

    The chat template renders the prompt as a user turn and the completion as the assistant's.
    The end token is appended if the template does not end the answer with one.

    Attributes:
        prompt_key: the record's key for the prompt.
        completion_key: the record's key for the completion.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        prompt_key: str = "prompt",
        completion_key: str = "completion",
        mask_prompt: bool = False,
        train_on: str | None = None,
    ):
        super().__init__(data, tokenizer, mask_prompt, train_on)
        self.prompt_key = prompt_key
        self.completion_key = completion_key

    def check(self, record: Mapping[str, Any], where: str) -> None:
        for key in (self.prompt_key, self.completion_key):
            field(record, key, str, where, f"{self.prompt_key!r} and {self.completion_key!r}")
        check_tools(record, where)

    def form(self, idx: int) -> Record:
        record = self[idx]
        texts = {"prompt": record[self.prompt_key], "completion": record[self.completion_key]}
        return {**texts, **_tools(record)}

    def _conversation(self, record: Record) -> tuple[list[dict[str, Any]], Any]:
        messages = [
            {"role": "user", "content": record[self.prompt_key]},
            {"role": "assistant", "content": record[self.completion_key]},
        ]
        return messages, tools_of(record.get("tools"))

    def _sample(self, record: Record) -> Sample:
        sample = chat_sample(self.tokenizer, *self._conversation(record), self.train_on)
        end = end_id(self.tokenizer)
        if end is None or is_ended(self.tokenizer, sample.tokens):
            return sample
        return Sample([*sample.tokens, end], np.append(sample.weights, np.float32(1)))


class ConcatenatedDataset(ShownDataset):
    """Several datasets, concatenated.

    `dataset[i]` is a copy of the record with the key `"_dataset"`, the index of its dataset. The
    original records do not get that key.
    """

    def __init__(self, data: Sequence[Any]):
        self._data: list[Any] = []
        for part in data:
            self._data.extend(part._data if isinstance(part, ConcatenatedDataset) else [part])

    def _find(self, idx: int) -> tuple[int, int]:
        index = idx + len(self) if idx < 0 else idx
        for number, part in enumerate(self._data):
            if 0 <= index < len(part):
                return number, index
            index -= len(part)
        raise IndexError(f"index {idx} of a dataset of {len(self)} records")

    def __len__(self) -> int:
        return sum(map(len, self._data))

    def _facts(self) -> list[str]:
        return [f"{len(part):,} of {type(part).__name__}" for part in self._data]

    def __getitem__(self, idx: int) -> Record:
        number, index = self._find(idx)
        return {**self._data[number][index], "_dataset": number}

    def sample(self, idx: int) -> Sample:
        number, index = self._find(idx)
        return _sample_of(self._data[number], index)

    def conversation(self, idx: int) -> Any:
        number, index = self._find(idx)
        return self._data[number].conversation(index)

    def where(self, idx: int) -> str:
        number, index = self._find(idx)
        return str(self._data[number].where(index))

    def process(self, d: Record) -> Any:
        return self._data[d["_dataset"]].process(d)

    def system_prompt(self) -> str | None:
        return _shared(_prompt_of(part) for part in self._data if len(part))


class CacheDataset(ShownDataset):
    """Tokenizes each record of a dataset on first use and keeps the result (8 bytes per token).

    `cache[i]` is `(tokens, offset)`, `cache.sample(i)` is the `Sample`, and `cache.itemlen(i)` is
    its number of tokens. The wrapped dataset needs `sample(i)`, or `process(record)`, or items
    that `as_sample` accepts.

    Attributes:
        said: messages already logged about this data, to log each only once.
    """

    def __init__(self, data: Any):
        self._data = data
        self._kept: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None] = [
            None
        ] * len(data)
        self.said: set[str] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def _facts(self) -> list[str]:
        done = sum(kept is not None for kept in self._kept)
        return [f"{done:,} tokenized", f"of {type(self._data).__name__}"]

    def _shown_record(self, idx: int) -> Any:
        return self._data[idx]  # `self[idx]` would tokenize it

    def _arrays(self, idx: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        kept = self._kept[idx]
        if kept is None:
            sample = _sample_of(self._data, idx)
            tokens = np.asarray(sample.tokens, np.int64)
            small = not len(tokens) or np.abs(tokens).max() <= np.iinfo(np.int32).max
            kept = self._kept[idx] = (tokens.astype(np.int32) if small else tokens, sample.weights)
        return kept

    def sample(self, idx: int) -> Sample:
        tokens, weights = self._arrays(idx)
        return Sample(tokens.tolist(), weights)

    def __getitem__(self, idx: int) -> tuple[list[int], int]:
        return _as_offset(self.sample(idx))

    def conversation(self, idx: int) -> Any:
        return self._data.conversation(idx)

    def where(self, idx: int) -> str:
        return str(self._data.where(idx))

    def itemlen(self, idx: int) -> int:
        return len(self._arrays(idx)[0])

    def system_prompt(self) -> str | None:
        return _prompt_of(self._data)


def _tools(record: Record) -> Record:
    return {} if record.get("tools") is None else {"tools": tools_of(record["tools"])}


def _prompt_of(dataset: Any) -> str | None:
    prompt: str | None = dataset.system_prompt() if hasattr(dataset, "system_prompt") else None
    return prompt


def _system_prompt(messages: Sequence[Mapping[str, Any]]) -> str | None:
    content = (
        as_text(messages[0].get("content"))
        if messages and messages[0].get("role") == "system"
        else None
    )
    return content if isinstance(content, str) else None


def _shared(prompts: Iterable[str | None]) -> str | None:
    """The value that all prompts equal, or None; stops at the first different prompt."""
    rest = iter(prompts)
    first = next(rest, None)
    return first if first is not None and all(prompt == first for prompt in rest) else None


def _as_offset(sample: Sample) -> tuple[list[int], int]:
    if not sample.is_span:
        raise ValueError(
            "the targets of this record are not one span to its end, so no offset says them; "
            "use sample(i)"
        )
    return sample.tokens, sample.offset


def _sample_of(dataset: Any, idx: int) -> Sample:
    if hasattr(dataset, "sample"):
        sample: Sample = dataset.sample(idx)
        return sample
    item = dataset[idx]
    try:
        return as_sample(dataset.process(item) if hasattr(dataset, "process") else item)
    except TypeError as e:
        raise TypeError(f"record {idx}: {e}") from e


def create_dataset(data: Any, tokenizer: Any, config: Any) -> _Dataset:
    """The dataset for `data`; the keys of its first record select layout and class.

    `config` may have `mask_prompt`, `train_on`, `map` (see `layouts.read_map`) and, as in mlx-lm,
    `prompt_feature`, `completion_feature`, `chat_feature` and `text_feature`. Raises `ValueError`
    for an empty dataset, for unknown keys, and for text records with a masked prompt.
    """
    if len(data) == 0:
        raise ValueError("the dataset is empty")
    layout, keys = _layout_of(data, config)
    given = data if layout.convert is None else Converted(data, layout)
    mask_prompt = bool(getattr(config, "mask_prompt", False))
    train_on = getattr(config, "train_on", None)
    dataset: _Dataset
    if layout.form == "completion":
        dataset = CompletionsDataset(given, tokenizer, keys[0], keys[1], mask_prompt, train_on)
    elif layout.form == "messages":
        dataset = ChatDataset(given, tokenizer, keys[0], mask_prompt, train_on)
    elif resolve_train_on(train_on, mask_prompt) != "all":
        raise ValueError(
            f"records of {keys[0]!r} have no prompt to mask: leave out mask_prompt and train_on"
        )
    else:
        dataset = TextDataset(given, tokenizer, keys[0])
    dataset.layout = layout
    return dataset


_FORM_KEYS = {"completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}


def _layout_of(data: Any, config: Any) -> tuple[Layout, tuple[str, ...]]:
    """The layout of `data`, and the keys of its form.

    Raises `ValueError` that names the first record if its layout is not known.
    """
    features = [
        getattr(config, f"{name}_feature", None)
        for name in ("prompt", "completion", "chat", "text")
    ]
    prompt, completion, chat, text = (
        own or name
        for own, name in zip(features, ("prompt", "completion", "messages", "text"), strict=True)
    )
    first = data[0]
    if mapping := getattr(config, "map", None):
        try:
            layout = mapped(read_map(mapping), first)
        except ValueError as e:
            raise ValueError(f"{place_of(data, 0)}: {e}") from None
        return layout, _FORM_KEYS[layout.form]
    if prompt in first and completion in first:
        if isinstance(first[prompt], list):
            return continued(prompt, completion), _FORM_KEYS["messages"]
        return Layout("prompt and answer", (prompt, completion), "completion"), (prompt, completion)
    if chat in first:
        layout = chat_layout(chat, first, _keys(data))
        return layout, (chat,) if layout.convert is None else _FORM_KEYS["messages"]
    if text in first:
        return Layout("plain text", (text,), "text"), (text,)
    if any(features):
        expected = f"{prompt!r} and {completion!r}, or {chat!r}, or {text!r}"
        raise ValueError(
            f"{place_of(data, 0)}: the record's keys are {keys_of(first)}; expected {expected}"
        )
    try:
        layout = recognized(first, _keys(data))
    except ValueError as e:
        raise ValueError(f"{place_of(data, 0)}: {e}") from None
    return layout, _FORM_KEYS[layout.form]


def _keys(data: Any) -> Collection[str]:
    """The keys of all records; records of the hub share theirs."""
    return set().union(*data) if isinstance(data, Records) else set(data[0])


def load_local_dataset(data_path: Path | str, tokenizer: Any, config: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` from the files train, valid and test in a folder, or from one file.

    The files are `train.jsonl` or of another kind that `read_records` reads. A missing or empty
    file gives `[]`. `config.valid_split` and `config.test_split` cut a share off the training data.
    Every record is checked. Raises `FormatError` for a file that is not of its kind, `ValueError`
    for a record without the needed keys.
    """
    path = user_path(data_path)
    if path.is_dir() or kind(path) is None:
        return _load_folder(path, tokenizer, config)
    dataset = _load_file(path, tokenizer, config)
    if not len(dataset):
        return [], [], []
    log.info("data %s: %s, %s", path, counted(len(dataset), "record"), dataset.layout)
    testing = getattr(config, "test", False)
    test_share = getattr(config, "test_split", None)
    if testing and not getattr(config, "train", True) and test_share is None:
        log.info("All records are test data; test_split takes a part.")
        return [], [], dataset
    valid_share = getattr(config, "valid_split", None)
    return _cut(
        dataset,
        DEFAULT_SPLIT if valid_share is None else valid_share,
        test_share if test_share is not None else DEFAULT_SPLIT if testing else 0.0,
    )


def _load_folder(folder: Path, tokenizer: Any, config: Any) -> tuple[Any, Any, Any]:
    files = split_files(folder, list(SPLITS.values()))
    found = [[] if path is None else _load_file(path, tokenizer, config) for path in files]
    layouts = [dataset.layout for dataset in found if len(dataset)]
    for line in dict.fromkeys(str(layout) for layout in layouts if layout.convert is not None):
        log.info("data %s: %s", folder, line)
    return _cut_train(found, [None if path is None else str(path) for path in files], config)


def _cut_train(
    found: Sequence[Any], places: Sequence[str | None], config: Any
) -> tuple[Any, Any, Any]:
    """`(train, valid, test)`, with the shares that `config` asks for cut off the training data.

    `places` names the origin of each split that there is. Raises `ValueError` for a share of a
    split that there is.
    """
    train, valid, test = found
    shares = {name: getattr(config, f"{name}_split", None) or 0.0 for name in ("valid", "test")}
    for (name, share), place in zip(shares.items(), places[1:], strict=True):
        if share and place is not None:
            raise ValueError(
                f"{name}_split is {share!r:.80}, but {place} has the {name} data: "
                "leave out one of them"
            )
    if not any(shares.values()) or not len(train):
        return train, valid, test
    cut_off = _cut(train, shares["valid"], shares["test"])
    return cut_off[0], cut_off[1] or valid, cut_off[2] or test


def _load_file(path: Path, tokenizer: Any, config: Any) -> Any:
    """The checked dataset of a file; `[]` if it has no records."""
    records = read_records(path)
    if not records:
        return []
    dataset = create_dataset(records, tokenizer, config)
    dataset.check_all()
    return dataset


def _cut(dataset: Any, valid: float, test: float) -> tuple[Any, Any, Any]:
    check_shares(valid, test)
    dataset.check_all()
    keys = [split_keys(dataset.form(i), dataset.given(i)) for i in range(len(dataset))]
    parts = cut(keys, valid, test)
    counts = f"{len(parts[0]):,} records to train on, {len(parts[1]):,} to validate"
    counts += f", {len(parts[2]):,} to test" if test else ""
    shares = f"valid_split {valid:g}" + (f", test_split {test:g}" if test else "")
    log.info("Cut by a hash of the prompts (%s): %s", shares, counts)
    found = [dataset.select(part) if part else [] for part in parts]
    return found[0], found[1], found[2]


def load_whole(args: Any, tokenizer: Any) -> dict[str, Any]:
    """The datasets of `load_dataset(args, tokenizer)` by their splits; a file is not cut.

    The split of a file is "data". Splits without records are left out.
    """
    path = user_path(args.data)
    if path.is_file() and kind(path) is not None:
        found = {"data": _load_file(path, tokenizer, args)}
    else:
        uncut = SimpleNamespace(**{**vars(args), "valid_split": None, "test_split": None})
        splits = load_dataset(uncut, tokenizer, train=False, test=False)
        found = dict(zip(SPLITS, splits, strict=True))
    found = {name: dataset for name, dataset in found.items() if len(dataset)}
    if not found:
        raise ValueError(f"no records in {args.data!r}")
    return found


def load_hf_dataset(data_id: str, tokenizer: Any, config: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of a dataset of the Hugging Face hub or a folder in the hub's layout.

    A missing or empty split gives `[]`. `config.valid_split` and `config.test_split` cut a share
    off the training data.
    """
    splits = _from_hub(data_id)
    names = [next((n for n in names if n in splits), None) for names in SPLITS.values()]
    found: list[Any] = [
        create_dataset(splits[n], tokenizer, config) if n is not None and len(splits[n]) else []
        for n in names
    ]
    places = [None if n is None else f"the split {n!r} of {data_id}" for n in names]
    return _cut_train(found, places, config)


def load_custom_hf_dataset(args: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of `args.hf_dataset`: a dict or a list of dicts, as in mlx-lm.

    Each dict needs `path`. It may have `train_split` (default "train[:80%]"), `valid_split`
    (default "train[-10%:]"), `test_split`, the `*_feature` keys and `config`, which holds further
    arguments of `datasets.load_dataset`. Several datasets are concatenated.
    """
    given = args.hf_dataset
    collection: list[list[Any]] = []
    for entry in [given] if isinstance(given, Mapping) else given:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise ValueError(
                f"hf_dataset is {entry!r}, and must be a mapping with a 'path', or a list of such"
            )
        ours = {
            "mask_prompt": getattr(args, "mask_prompt", False),
            "train_on": getattr(args, "train_on", None),
        }
        config = SimpleNamespace(**{**entry, **ours})
        wanted = {
            "train_split": entry.get("train_split", "train[:80%]") if args.train else None,
            "valid_split": entry.get("valid_split", "train[-10%:]") if args.train else None,
            "test_split": entry.get("test_split") if args.test else None,
        }
        if args.test and wanted["test_split"] is None:
            raise ValueError(
                f"hf_dataset {entry['path']!r} has no 'test_split', and test is asked for"
            )
        options = entry.get("config") or {}
        rows = [_from_hub(entry["path"], split=s, **options) if s else [] for s in wanted.values()]
        collection.append([create_dataset(r, tokenizer, config) if len(r) else [] for r in rows])
    if not collection:
        raise ValueError("hf_dataset is empty, and must name at least one dataset")
    found = (
        collection[0]
        if len(collection) == 1
        else [ConcatenatedDataset(parts) for parts in zip(*collection, strict=True)]
    )
    return found[0], found[1], found[2]


def _from_hub(name: str, **options: Any) -> Any:
    there = user_path(name).is_dir()
    try:
        import datasets
    except ImportError as e:
        missing = f"{name}: there is {_NO_SPLITS}" if there else f"there is no folder {name!r}"
        meant = (
            "its files are data in the hub's layout"
            if there
            else "a dataset of the Hugging Face hub is meant"
        )
        raise ImportError(
            f"{missing}; if {meant}, they are read with the package datasets: "
            'pip install "pyloss[hub]"'
        ) from e
    log.info("Loading the Hugging Face dataset %s", name)
    try:
        return datasets.load_dataset(name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        if there:
            # The library's error says only that loading failed; its cause says why.
            reason = said(e.__cause__ if isinstance(e.__cause__, Exception) else e)
            raise ValueError(
                f"{name}: there is {_NO_SPLITS}, and as data in the hub's layout it fails: "
                f"{reason:.300}"
            ) from e
        raise ValueError(
            f"no folder {name!r} with usable data, and no such dataset from the Hugging Face "
            f"hub: {e}"
        ) from e


def load_dataset(
    args: Any,
    tokenizer: Any,
    *,
    mask_prompt: bool | None = None,
    train_on: str | None = None,
    train: bool | None = None,
    test: bool | None = None,
    prompt_feature: str | None = None,
    completion_feature: str | None = None,
    chat_feature: str | None = None,
    text_feature: str | None = None,
    map: str | Mapping[str, str] | None = None,
    valid_split: float | None = None,
    test_split: float | None = None,
) -> tuple[Any, Any, Any]:
    """`(train, valid, test)`, each a dataset or `[]`.

    `args` is a file of records, a folder with `train.jsonl` (and `valid.jsonl`, `test.jsonl`), a
    folder in the hub's layout, a dataset's name on the hub, or mlx-lm's namespace with `data` or
    `hf_dataset`. Keywords override the namespace. `train=True` (the default) requires training
    data, `test=True` requires test data.

    `valid_split` and `test_split` cut a share off the training data of a file or folder; for a
    file, `valid_split` is 0.05 unless given. `map` says the records' keys, as
    `{"prompt": "question", "completion": "reply"}`.

    Raises `ValueError` for missing or unusable data, `FormatError` for a file that is not of its
    kind, and `ImportError` if the hub's package is needed but not installed.
    """
    given = {k: v for k, v in locals().items() if k not in ("args", "tokenizer") and v is not None}
    if not isinstance(args, (str, Path)) and not hasattr(args, "__dict__"):
        raise TypeError(
            f"data is {args!r:.80}, and must be a path, the hub's name of a dataset or a "
            f"namespace with one"
        )
    fields = {"data": str(args)} if isinstance(args, (str, Path)) else dict(vars(args))
    config = SimpleNamespace(**{"train": True, "test": False, **fields, **given})
    if getattr(config, "hf_dataset", None):
        for name in ("valid_split", "test_split"):
            if getattr(config, name, None) is not None:
                raise ValueError(
                    f"{name} is given beside hf_dataset, whose entries have their own {name}, "
                    "such as train[-10%:]"
                )
        found = load_custom_hf_dataset(config, tokenizer)
    else:
        found = _load_path(config, tokenizer)
    for name, split, needed in (("train", found[0], config.train), ("test", found[2], config.test)):
        if needed and len(split) == 0:
            place = getattr(config, "hf_dataset", None) or config.data
            raise ValueError(
                f"no {name} data in {place!r}: {name}.jsonl (or the hub's split) is missing or "
                f"empty"
                if not (isinstance(place, str) and user_path(place).is_file())
                else f"no {name} data in {place!r}: the file has no records"
            )
    if config.train and len(found[1]) == 0:
        log.warning("No validation data found: training goes on without validation.")
    return found


def _load_path(config: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    data = getattr(config, "data", None)
    if not data:
        raise ValueError(
            "no data given: give a folder with train.jsonl, or the name of a dataset of the hub"
        )
    path = user_path(data)
    if path.is_dir():
        files = [file for file in split_files(path, list(SPLITS.values())) if file is not None]
        ours = any(kind(file) == ".jsonl" for file in files)
        if ours or (files and not _has(path, _HUB_ALONE)):
            return load_local_dataset(path, tokenizer, config)
        if _has(path, _HUB_FILES):
            return load_hf_dataset(str(path), tokenizer, config)
        raise ValueError(f"{path}: {_NO_SPLITS}, nor data in the hub's layout")
    if path.exists():
        if kind(path) is None:
            raise FormatError(
                path, None, f"is of an unknown kind; allowed are a folder and files {ALLOWED}"
            )
        return load_local_dataset(path, tokenizer, config)
    if kind(path) is not None:
        raise ValueError(f"{data}: there is no such file")
    if str(data).count("/") > 1 or str(data).endswith("/") or str(data)[0] in "./~\\":
        raise ValueError(f"{data}: there is no such folder or file")
    return load_hf_dataset(str(data), tokenizer, config)


def _has(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a folder has a file with one of the suffixes; stops at the first."""
    return any(path.suffix in suffixes for path in folder.rglob("*"))
