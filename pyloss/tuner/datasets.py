"""Loads datasets: from files, folders or the Hugging Face hub, by mlx-lm's names.

`tuner/data` has the classes (`dataset_classes.py`), the choice of one for records (`creating.py`)
and the hub (`hub.py`). Their names can be imported from here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pyloss.errors import FormatError, counted
from pyloss.io.files import user_path
from pyloss.tuner.data.creating import create_dataset
from pyloss.tuner.data.dataset_classes import (
    CacheDataset,
    ChatDataset,
    CompletionsDataset,
    ConcatenatedDataset,
    TextDataset,
)
from pyloss.tuner.data.files import (
    ALLOWED,
    NO_SPLITS,
    SPLITS,
    STANDARD_INPUT,
    kind,
    read_records,
    split_files,
)
from pyloss.tuner.data.hub import load_custom_hf_dataset, load_hf_dataset, load_hf_split
from pyloss.tuner.data.sources import Source, check_data, mixed, read_sources
from pyloss.tuner.data.splitting import DEFAULT_SPLIT, cut_dataset, cut_train
from pyloss.tuner.data.targets import resolve_train_on

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
    "load_whole",
    "resolve_train_on",
]

log = logging.getLogger("pyloss")

_HUB_FILES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
_HUB_ALONE = (".parquet", ".arrow")  # of these, those that only the hub's package reads


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
    folder in the hub's layout, a dataset's name on the hub ("owner/name:config:split"), "-" for
    standard input, a list of such with weights (`["a.jsonl:0.7", "b.jsonl:0.3"]`), or mlx-lm's
    namespace with `data` or `hf_dataset`. Keywords override the namespace. `train=True` (the
    default) requires training data, `test=True` requires test data.

    `valid_split` and `test_split` cut a share off the training data of a file or folder; for a
    file, `valid_split` is 0.05 unless given. `map` says the records' keys, as
    `{"prompt": "question", "completion": "reply"}`.

    Raises `ValueError` for missing or unusable data, `FormatError` for a file that is not of its
    kind, and `ImportError` if the hub's package is needed but not installed.
    """
    given = {k: v for k, v in locals().items() if k not in ("args", "tokenizer") and v is not None}
    named = isinstance(args, (str, Path, list, tuple))
    if not named and not hasattr(args, "__dict__"):
        raise TypeError(
            f"data is {args!r:.80}, and must be a path, the hub's name of a dataset, a list of "
            f"such or a namespace with one"
        )
    fields = {"data": check_data(args)} if named else dict(vars(args))
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
    sources = read_sources(data)
    if len(sources) > 1:
        return _load_several(sources, config, tokenizer)
    return _load_source(sources[0], config, tokenizer)


def _load_several(sources: list[Source], config: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """The splits of several sources, each of them joined; their weights divide the training data.

    Files are cut together, so that a prompt that several of them have is on one side.
    """
    uncut = SimpleNamespace(**{**vars(config), "valid_split": None, "test_split": None})
    loaded = [
        (_load_file(source, tokenizer, config), [], [])
        if source.is_file
        else _load_source(source, uncut, tokenizer)
        for source in sources
    ]
    for source, splits in zip(sources, loaded, strict=True):
        if not len(splits[0]):
            raise ValueError(f"no train data in {source}")
        log.info("data %s: %s", source, counted(len(splits[0]), "record"))
    given = [[splits[i] for splits in loaded if len(splits[i])] for i in (1, 2)]
    joined = ConcatenatedDataset([splits[0] for splits in loaded])
    rest: list[Any] = [ConcatenatedDataset(parts) if parts else [] for parts in given]
    if all(source.is_file for source in sources):
        found = _cut_single(joined, "all data", config)
    else:
        places = [None if not parts else "a folder or dataset" for parts in given]
        found = cut_train([joined, *rest], [None, *places], config)
    if sources[0].weight is None or not isinstance(found[0], ConcatenatedDataset):
        return found
    train, counts = mixed(found[0], [float(source.weight or 0) for source in sources])
    shares = ", ".join(
        f"{source} {count:,} ({count / max(sum(counts), 1):.0%}, of {len(part):,})"
        for source, count, part in zip(sources, counts, found[0].parts, strict=True)
    )
    log.info("Records of an epoch by the weights: %s", shares)
    return train, found[1], found[2]


def _load_source(source: Source, config: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    data, path = source.name, user_path(source.name)
    if source.is_file and (data == STANDARD_INPUT or path.exists() or source.split is not None):
        return _cut_single(_load_file(source, tokenizer, config), str(source), config)
    if path.is_dir():
        files = [file for file in split_files(path, list(SPLITS.values())) if file is not None]
        ours = any(kind(file) in (".jsonl", ".parquet") for file in files)
        if ours or (files and not _has(path, _HUB_ALONE)):
            return load_local_dataset(path, tokenizer, config)
        if _has(path, _HUB_FILES):
            return load_hf_dataset(str(path), tokenizer, config)
        raise ValueError(f"{path}: {NO_SPLITS}, nor data in the hub's layout")
    if path.exists():
        raise FormatError(
            path, None, f"is of an unknown kind; allowed are a folder and files {ALLOWED}"
        )
    if kind(path) is not None:
        raise ValueError(f"{data}: there is no such file")
    if data.count("/") > 1 or data.endswith("/") or data[0] in "./~\\":
        raise ValueError(f"{data}: there is no such folder or file")
    return load_hf_dataset(data, tokenizer, config, source.config)


def _has(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a folder has a file with one of the suffixes; stops at the first."""
    return any(path.suffix in suffixes for path in folder.rglob("*"))


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
    return _cut_single(_load_file(Source(str(path)), tokenizer, config), str(path), config)


def _cut_single(dataset: Any, name: str, config: Any) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of one file, or of one split."""
    if not len(dataset):
        return [], [], []
    log.info("data %s: %s, %s", name, counted(len(dataset), "record"), dataset.layout)
    testing = getattr(config, "test", False)
    test_share = getattr(config, "test_split", None)
    if testing and not getattr(config, "train", True) and test_share is None:
        log.info("All records are test data; test_split takes a part.")
        return [], [], dataset
    valid_share = getattr(config, "valid_split", None)
    return cut_dataset(
        dataset,
        DEFAULT_SPLIT if valid_share is None else valid_share,
        test_share if test_share is not None else DEFAULT_SPLIT if testing else 0.0,
    )


def _load_folder(folder: Path, tokenizer: Any, config: Any) -> tuple[Any, Any, Any]:
    files = split_files(folder, list(SPLITS.values()))
    found = [
        [] if path is None else _load_file(Source(str(path)), tokenizer, config) for path in files
    ]
    layouts = [dataset.layout for dataset in found if len(dataset)]
    for line in dict.fromkeys(str(layout) for layout in layouts if layout.convert is not None):
        log.info("data %s: %s", folder, line)
    return cut_train(found, [None if path is None else str(path) for path in files], config)


def _load_file(source: Source, tokenizer: Any, config: Any) -> Any:
    """The checked dataset of a file or of a split on the hub; `[]` if it has no records."""
    if source.split is not None:
        return load_hf_split(source.name, tokenizer, config, source.config, source.split)
    path = user_path(source.name)
    if source.name != STANDARD_INPUT and not path.exists():
        raise ValueError(f"{source.name}: there is no such file")
    records = read_records(Path(source.name) if source.name == STANDARD_INPUT else path)
    if not records:
        return []
    dataset = create_dataset(records, tokenizer, config)
    dataset.check_all()
    return dataset


def load_whole(args: Any, tokenizer: Any) -> dict[str, Any]:
    """The datasets of `load_dataset(args, tokenizer)` by their splits; files are not cut or mixed.

    The split of a file, and of several, is "data". Splits without records are left out.
    """
    sources = read_sources(args.data)
    if all(source.is_file for source in sources):
        parts = [_load_file(source, tokenizer, args) for source in sources]
        parts = [part for part in parts if len(part)]
        found = {"data": parts[0] if len(parts) == 1 else ConcatenatedDataset(parts)}
    else:
        uncut = SimpleNamespace(**{**vars(args), "valid_split": None, "test_split": None})
        splits = load_dataset(uncut, tokenizer, train=False, test=False)
        found = dict(zip(SPLITS, splits, strict=True))
    found = {name: dataset for name, dataset in found.items() if len(dataset)}
    if not found:
        raise ValueError(f"no records in {args.data!r}")
    return found
