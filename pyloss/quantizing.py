"""`quantize`: a model's quantized copy, with its scales tuned by distillation if asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pyloss import loading
from pyloss.exporting import check_request, column_importance_of, export
from pyloss.io.files import check_target, user_path
from pyloss.io.outputs import folder_for, output
from pyloss.models.conversion import QUANTIZATIONS, left_text, quantize_model
from pyloss.models.files.gguf_writer import TYPES, refuse_model, write_gguf
from pyloss.models.reading import load_model
from pyloss.models.saving import save_model
from pyloss.models.transformer import Model
from pyloss.weights.formats import FLOATS

if TYPE_CHECKING:
    from pyloss.distillation.quantized import Tuned

#: What `to` may be: a folder in mlx's or bitsandbytes' layout, or a GGUF file.
FOLDERS, FILES = tuple(QUANTIZATIONS), tuple(name for name in TYPES if name not in FLOATS)


def check(
    path: str | os.PathLike[str],
    to: str,
    *,
    group_size: int | None = None,
    dtype: str | None = None,
    importance_data: str | os.PathLike[str] | None = None,
    tune_data: Any = None,
) -> None:
    """Checks a request to `quantize` without the model. Raises as `quantize` does."""
    if to not in FOLDERS and to not in FILES:
        raise ValueError(
            f"to must be one of {', '.join(FOLDERS)} (a folder) or {', '.join(FILES)} (a GGUF "
            f"file), not {to!r}"
        )
    if to in FOLDERS:
        if importance_data is not None:
            raise ValueError(f"importance_data is for GGUF's types, not for {to!r}")
        check_target(path, folder=True)
    else:
        for name, value in {"group_size": group_size, "dtype": dtype}.items():
            if value is not None:
                raise ValueError(f"{name} is for {', '.join(FOLDERS)}, not for {to!r}")
        check_request(path, "gguf", type=to, importance_data=importance_data)
    if tune_data is not None and to == "nf4":
        raise ValueError(
            "nf4 cannot be tuned: its scales are themselves quantized; q4 has as many bits"
        )


def quantize(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    to: str,
    *,
    group_size: int | None = None,
    dtype: str | None = None,
    importance_data: str | os.PathLike[str] | None = None,
    tune_data: Any = None,
    tuning: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    step: Callable[[str], Any] = lambda text: None,
) -> Tuned | None:
    """Writes the model `source` quantized; with `tune_data`, its scales tuned on that text.

    Args:
        source: a model, as for `pyloss.load`.
        path: a folder for "q2" to "q8" and "nf4"; a file for GGUF's types.
        to: one of `FOLDERS` or `FILES`.
        group_size, dtype: as in `quantize_model`, for folders.
        importance_data: as in `export`, for GGUF's mixtures.
        tune_data: text or records as `load_dataset` takes them; a share of them is held out to
            measure on, if they have no validation data.
        tuning: arguments of `distillation.quantized.tune_scales`.
        data_options: `valid_split` and `map` of `load_dataset`.
        overwrite: replace an existing output, which otherwise moves to `previous-N`.
        step: called with what is done next.

    Returns what tuning did.

    Raises:
        ValueError: an unknown type, options that do not go together, unusable data.
        ImportError: writing GGUF needs the `gguf` package.
        OSError: naming what cannot be written.
    """
    options: dict[str, Any] = {"group_size": group_size, "dtype": dtype}
    check(path, to, **options, importance_data=importance_data, tune_data=tune_data)
    original, tokenizer = loading.load(source)
    train_set, held_out = None, None
    if tune_data is not None:
        train_set, held_out = _texts(tune_data, tokenizer, data_options or {})

    def tuned(student: Model) -> Tuned | None:
        if tune_data is None:
            return None
        from pyloss.distillation.quantized import tune_scales

        return tune_scales(student, original, train_set, held_out, step=step, **(tuning or {}))

    if to in FOLDERS:
        student = load_model(source)
        step(f"quantizing to {to}")
        if left := quantize_model(student, to, **options):
            step(f"not quantized: {left_text(left)}")
        found = tuned(student)
        save_model(student, path, tokenizer, dtype, overwrite)
        return found
    if tune_data is None:
        step(f"quantizing to {to}")
        export(
            original,
            path,
            "gguf",
            tokenizer,
            type=to,
            importance_data=importance_data,
            overwrite=overwrite,
        )
        return None
    file = user_path(path)
    refuse_model(original, tokenizer)
    importance = column_importance_of(original, tokenizer, importance_data)
    # Reading the written file gives each layer the matrices in the formats that the file has.
    with (
        folder_for(file.parent),
        tempfile.TemporaryDirectory(prefix=".quantized-", dir=file.parent) as scratch,
    ):
        step(f"quantizing to {to}")
        first = write_gguf(
            original, Path(scratch) / file.name, tokenizer, to, importance=importance
        )
        student = load_model(first)
        found = tuned(student)
        with output(file, overwrite=overwrite):
            write_gguf(student, file, tokenizer, to, importance=importance)
    return found


def _texts(source: Any, tokenizer: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The text to train on, and other text to measure on; all tokens are targets."""
    from pyloss.tuner.datasets import load_dataset

    config = SimpleNamespace(data=source, mask_prompt=False, train_on="all", **options)
    train_set, held_out, _ = load_dataset(config, tokenizer)
    if not len(held_out):
        raise ValueError(
            f"{source!r} has no validation data to measure on: give valid_split, such as 0.1, the "
            "share that is held out"
        )
    return train_set, held_out
