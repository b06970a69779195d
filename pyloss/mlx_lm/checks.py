"""The settings that mlx_lm.lora takes: each is checked before a model is loaded or a file moves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import choices
from pyloss.tuner.run.settings import LORA_SCHEMA, SCHEMA, Refused

KINDS = ("lora", "dora", "full")

#: settings whose values are those of `pyloss train`
_AS_OURS = (
    "model", "train", "seed", "batch_size", "iters", "val_batches", "steps_per_report",
    "steps_per_eval", "resume_adapter_file", "save_every", "test", "test_batches",
    "max_seq_length", "grad_checkpoint", "grad_accumulation_steps", "mask_prompt",
    "prompt_feature", "completion_feature", "chat_feature", "text_feature", "project_name",
)  # fmt: skip
#: the keys of lora_parameters that mlx-lm has; it ignores others
_LORA_KEYS = ("rank", "scale", "dropout", "keys")


def check_settings(args: Any, optimizers: Mapping[str, Any]) -> None:
    """Check the settings that `args` has; whole numbers such as 1e3 become ints.

    `optimizers` are the classes by their names. Raises ValueError naming the setting, its value
    and what is allowed.
    """
    checks: dict[str, Callable[[Any], Any]] = {name: SCHEMA[name].check for name in _AS_OURS}
    checks |= {
        "data": SCHEMA["model"].check,
        "fine_tune_type": _one_of(KINDS),
        "optimizer": _one_of(tuple(optimizers), capitals=True),  # as in mlx-lm
        "optimizer_config": _options_by_name,
        "num_layers": _layers,
        "learning_rate": _rate,
        "adapter_path": _adapter_path,
        "lora_parameters": _lora_parameters,
        "hf_dataset": _hf_dataset,
        "report_to": SCHEMA["project_name"].check,
    }
    for name, check in checks.items():
        if not hasattr(args, name):
            continue
        value = getattr(args, name)
        try:
            found = check(value)
        except Refused as refusal:
            raise ValueError(f"{name} is {shown(value)}; allowed: {refusal}") from None
        if isinstance(value, float) and isinstance(found, int):
            setattr(args, name, found)


def check_options(name: str, kind: Any, options: Mapping[str, Any]) -> None:
    """Check the options of an optimizer of the class `kind`, against those that it takes.

    Raises ValueError naming the option and what is allowed.
    """
    parameters = inspect.signature(kind).parameters
    known = {key: p.default for key, p in parameters.items() if key != "learning_rate"}
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"optimizer_config: {name} has no option {shown(key)}; allowed: {choices([*known])}"
            )
        try:
            _check_option(f"optimizer_config: {name}: {key}", value, known[key])
        except TypeError as error:
            raise ValueError(str(error)) from None


def _check_option(what: str, value: Any, default: Any) -> None:
    """`value` must be of the kind of the option's default; a number where that is None."""
    if value is None and default is None:
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{what} is {shown(value)}; it must be true or false")
    elif isinstance(default, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            raise ValueError(f"{what} is {shown(value)}; it must be a list of {len(default)}")
        for item in value:
            real(item, what)
    elif isinstance(default, int):
        whole(value, what)
    else:
        real(value, what)


def _one_of(allowed: tuple[str, ...], capitals: bool = False) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or (value.lower() if capitals else value) not in allowed:
            raise Refused(", ".join(allowed))
        return value

    return check


def _layers(value: Any) -> int:
    try:
        return whole(int(value) if isinstance(value, float) and value.is_integer() else value, "")
    except (TypeError, ValueError):
        raise Refused("a whole number; -1 stands for all layers") from None


def _rate(value: Any) -> Any:
    # A script may give a schedule.
    return value if callable(value) else SCHEMA["learning_rate"].check(value)


def _adapter_path(value: Any) -> Any:
    # A test of the model alone has an empty one.
    return value if value == "" else SCHEMA["adapter_path"].check(value)


def _options_by_name(value: Any) -> Any:
    wanted = "a mapping of optimizers to their options such as {adamw: {weight_decay: 0.1}}"
    if value is None:
        return value
    if not isinstance(value, Mapping):
        raise Refused(wanted)
    if not all(options is None or isinstance(options, Mapping) for options in value.values()):
        raise Refused(wanted)
    return value


def _lora_parameters(value: Any) -> Any:
    if value is None:  # of a full fine-tuning
        return value
    if not isinstance(value, Mapping):
        raise Refused("a mapping such as {rank: 8, scale: 20.0, dropout: 0.0}")
    for key in _LORA_KEYS:
        if key in value:
            try:
                LORA_SCHEMA[key].check(value[key])
            except Refused as refusal:
                raise ValueError(
                    f"lora_parameters.{key} is {shown(value[key])}; allowed: {refusal}"
                ) from None
    return value


def _hf_dataset(value: Any) -> Any:
    if not value:
        return value
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise Refused("a mapping with a 'path', or a list of such")
    return value
