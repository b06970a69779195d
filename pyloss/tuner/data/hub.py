"""Datasets of the Hugging Face hub, or of a folder in the hub's layout, by its package datasets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from pyloss.errors import said
from pyloss.io.files import user_path
from pyloss.tuner.data.creating import create_dataset
from pyloss.tuner.data.dataset_classes import ConcatenatedDataset
from pyloss.tuner.data.files import NO_SPLITS, SPLITS
from pyloss.tuner.data.splitting import cut_train

log = logging.getLogger("pyloss")


def load_hf_split(data_id: str, tokenizer: Any, config: Any, name: str | None, split: str) -> Any:
    """The dataset of one split of a dataset on the hub, such as "train" or "train[:80%]".

    `name` is a configuration, or None. `[]` for a split without records.
    """
    rows = rows_of(data_id, **({} if name is None else {"name": name}), split=split)
    if not len(rows):
        return []
    dataset = create_dataset(rows, tokenizer, config)
    dataset.check_all()
    return dataset


def load_hf_dataset(
    data_id: str, tokenizer: Any, config: Any, name: str | None = None
) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of a dataset of the Hugging Face hub or a folder in the hub's layout.

    A missing or empty split gives `[]`. `config.valid_split` and `config.test_split` cut a share
    off the training data. `name` is a configuration of the dataset, or None.
    """
    splits = rows_of(data_id, **({} if name is None else {"name": name}))
    names = [next((n for n in names if n in splits), None) for names in SPLITS.values()]
    found: list[Any] = [
        create_dataset(splits[n], tokenizer, config) if n is not None and len(splits[n]) else []
        for n in names
    ]
    places = [None if n is None else f"the split {n!r} of {data_id}" for n in names]
    return cut_train(found, places, config)


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
        rows = [rows_of(entry["path"], split=s, **options) if s else [] for s in wanted.values()]
        collection.append([create_dataset(r, tokenizer, config) if len(r) else [] for r in rows])
    if not collection:
        raise ValueError("hf_dataset is empty, and must name at least one dataset")
    found = (
        collection[0]
        if len(collection) == 1
        else [ConcatenatedDataset(parts) for parts in zip(*collection, strict=True)]
    )
    return found[0], found[1], found[2]


def rows_of(name: str, /, **options: Any) -> Any:
    """The rows that the package datasets loads under this name. ValueError, ImportError."""
    there = user_path(name).is_dir()
    try:
        import datasets
    except ImportError as e:
        missing = f"{name}: there is {NO_SPLITS}" if there else f"there is no folder {name!r}"
        meant = (
            "its files are data in the hub's layout"
            if there
            else "a dataset of the Hugging Face hub is meant"
        )
        raise ImportError(
            f"{missing}; if {meant}, they are read with the package datasets: "
            'pip install "pyloss[hub]"'
        ) from e
    if there:
        log.info("Loading %s, a folder in the Hugging Face hub's layout", name)
    else:
        log.info("There is no folder %s here: loading that dataset from the Hugging Face hub", name)
    try:
        return datasets.load_dataset(name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        if there:
            # The library's error says only that loading failed; its cause says why.
            reason = said(e.__cause__ if isinstance(e.__cause__, Exception) else e)
            raise ValueError(
                f"{name}: there is {NO_SPLITS}, and as data in the hub's layout it fails: "
                f"{reason:.300}"
            ) from e
        raise ValueError(
            f"no folder {name!r} with usable data, and no such dataset from the Hugging Face "
            f"hub: {e}"
        ) from e
