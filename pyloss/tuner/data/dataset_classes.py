"""The classes of datasets: records with a tokenizer, several datasets in a row, kept tokens.

Making one from records is the duty of `creating.py`, and loading them that of `tuner/datasets.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from pyloss.models.text.chat_forms import as_text, tools_of
from pyloss.models.text.special import encode_text, end_id, is_ended
from pyloss.tuner.data.dataset_text import ShownDataset
from pyloss.tuner.data.layouts import Converted, Layout, place_of
from pyloss.tuner.data.records import Record, check_messages, check_tools, field
from pyloss.tuner.data.targets import Sample, as_sample, chat_sample, resolve_train_on


class RecordDataset(ShownDataset):
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


class TextDataset(RecordDataset):
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


class ChatDataset(RecordDataset):
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


class CompletionsDataset(RecordDataset):
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

    @property
    def parts(self) -> list[Any]:
        """The datasets."""
        return list(self._data)

    @property
    def train_on(self) -> str:
        """Which tokens are trained, of the first part."""
        return str(self._data[0].train_on)

    @property
    def layout(self) -> str:
        """The layouts of the parts."""
        return "; ".join(dict.fromkeys(str(part.layout) for part in self._data))

    def form(self, idx: int) -> Record:
        """As that of the record's dataset."""
        number, index = self._find(idx)
        form: Record = self._data[number].form(index)
        return form

    def given(self, idx: int) -> Record:
        """Record `idx` as its file has it."""
        number, index = self._find(idx)
        given: Record = self._data[number].given(index)
        return given

    def select(self, indices: Sequence[int]) -> ConcatenatedDataset:
        """Some of the records, in the order of the parts; each part stays one, if empty."""
        chosen: list[list[int]] = [[] for _ in self._data]
        for number, index in map(self._find, indices):
            chosen[number].append(index)
        return ConcatenatedDataset(
            [part.select(own) for part, own in zip(self._data, chosen, strict=True)]
        )

    def check_all(self) -> None:
        """Checks every record; raises `ValueError` for an unusable one."""
        for part in self._data:
            part.check_all()

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
        """The tokens and weights of record `idx`."""
        number, index = self._find(idx)
        return _sample_of(self._data[number], index)

    def conversation(self, idx: int) -> Any:
        """The messages of record `idx`, and its tools or None; ValueError for plain text."""
        number, index = self._find(idx)
        return self._data[number].conversation(index)

    def where(self, idx: int) -> str:
        """The origin of record `idx`, for error messages."""
        number, index = self._find(idx)
        return str(self._data[number].where(index))

    def process(self, d: Record) -> Any:
        """`(tokens, offset)` of an item of this dataset, as in mlx-lm."""
        return self._data[d["_dataset"]].process(d)

    def system_prompt(self) -> str | None:
        """The system prompt at the start of every record; None if they do not share one."""
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
        """The tokens and weights of record `idx`; tokenized at the first call."""
        tokens, weights = self._arrays(idx)
        return Sample(tokens.tolist(), weights)

    def __getitem__(self, idx: int) -> tuple[list[int], int]:
        return _as_offset(self.sample(idx))

    def conversation(self, idx: int) -> Any:
        """The messages of record `idx`, and its tools or None; ValueError for plain text."""
        return self._data.conversation(idx)

    def where(self, idx: int) -> str:
        """The origin of record `idx`, for error messages."""
        return str(self._data.where(idx))

    def itemlen(self, idx: int) -> int:
        """The number of tokens of record `idx`; tokenized at the first call."""
        return len(self._arrays(idx)[0])

    def system_prompt(self) -> str | None:
        """The system prompt at the start of every record; None if they do not share one."""
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
