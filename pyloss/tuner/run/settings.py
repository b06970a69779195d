"""The settings of `pyloss train` and `pyloss eval`: mlx_lm.lora's YAML file merged with flags.

`SCHEMA` is the only list of keys. It holds each key's allowed values, its default, and the values
that mlx-lm allows but pyloss refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pyloss.checks.durations import duration, every
from pyloss.checks.numbers import LARGEST, real, shown, whole
from pyloss.distributed import BACKENDS
from pyloss.errors import nearest
from pyloss.io.files import PathLike, user_path
from pyloss.losses.distillation import KINDS as DIVERGENCES
from pyloss.losses.hidden import KINDS as HIDDEN_LOSSES
from pyloss.losses.sparse import RESTS
from pyloss.optim import OPTIMIZERS, build_schedule
from pyloss.runtime.precision import PRECISIONS
from pyloss.tuner.adapters.companions import BIASES, read_indices
from pyloss.tuner.adapters.lora_parameters import INITS, PEFT_NAMES, read_lora_parameters
from pyloss.tuner.adapters.registry import KINDS
from pyloss.tuner.callbacks import SERVICES, check_services
from pyloss.tuner.data.layouts import read_map
from pyloss.tuner.data.sources import check_data
from pyloss.tuner.run.yaml_file import read_yaml

DEFAULT_MODEL = "smollm2-135m"
LORA_DEFAULTS: dict[str, Any] = {"rank": 8, "dropout": 0.0, "scale": 20.0}


class Refused(ValueError):
    """Raised by a check; the message lists what is allowed."""


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        check: converts a given value to the used one; raises `Refused` for a value not allowed.
        default: the value if none is given.
    """

    check: Callable[[Any], Any]
    default: Any = None


def _integer(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():  # 1e3 is a float in YAML
            value = int(value)
        try:
            return whole(value, "", least)
        except (TypeError, ValueError):
            text = f"a whole number of at least {least}"
            raise Refused(
                text
                if not isinstance(value, int) or value <= LARGEST
                else f"{text} and at most {LARGEST}"
            ) from None

    return check


def _number(
    least: float, most: float | None = None, below: float | None = None, above: bool = False
) -> Callable[[Any], float]:
    allowed = f"a finite number {'above' if above else 'of at least'} {least:g}"
    allowed += "" if most is None else f" and at most {most:g}"
    allowed += "" if below is None else f" and below {below:g}"

    def check(value: Any) -> float:
        try:
            return real(
                value,
                "",
                None if above else least,
                most,
                above=least if above else None,
                below=below,
            )
        except (TypeError, ValueError):
            raise Refused(allowed) from None

    return check


def _duration(value: Any) -> float:
    try:
        return duration(value, "")
    except ValueError:
        raise Refused("a time such as 2h, 90m or 1h30m, or a number of seconds above 0") from None


def _every(value: Any) -> int | str:
    try:
        return every(value, "")
    except ValueError:
        raise Refused(
            "a part of an epoch such as 0.1ep, or a whole number of iterations of at least 1"
        ) from None


def _always(value: Any) -> bool:
    if value is not True:
        raise Refused("true, which is always so: batches are computed without padding")
    return True


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused("text")
    return value


def _path(value: Any) -> str:
    """A path of a file or folder; `~` is expanded."""
    try:
        return os.fspath(user_path(value))
    except (TypeError, ValueError):
        raise Refused("the path of a file or folder") from None


def _place(value: Any) -> str:
    """A path, or a name such as a model's on the hub."""
    if isinstance(value, str) and not value.startswith("~") and value:
        return value
    return _path(value)


def _data(value: Any) -> str | list[str]:
    """A path or the name of a dataset, or a list of them; `~` is expanded."""
    try:
        found = check_data(value)
    except (TypeError, ValueError) as error:
        raise Refused(str(error).removeprefix("it must be ")) from None
    return _place(found) if isinstance(found, str) else [_place(item) for item in found]


def _size(value: Any) -> int | str:
    """A memory size as in mlx-lm: a number of bytes, or text such as 2GB."""
    return value if isinstance(value, str) else _integer(0)(value)


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def optional(value: Any) -> Any:
        return None if value is None else check(value)

    optional.allowed = allowed_values(check)  # type: ignore[attr-defined]
    return optional


def allowed_values(check: Callable[[Any], Any]) -> tuple[str, ...]:
    """The values that a check takes, where they are a list; for the completion of shells."""
    return getattr(check, "allowed", ())


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        name = str(value).lower()
        if not isinstance(value, str) or name not in allowed:
            raise Refused(", ".join(allowed))
        return name

    check.allowed = allowed  # type: ignore[attr-defined]
    return check


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise Refused("a mapping of names to values")
    return dict(value)


def _names(value: Any) -> list[str]:
    if (
        not isinstance(value, (list, tuple))
        or not value
        or not all(isinstance(item, str) for item in value)
    ):
        raise Refused("a list of layer names such as [self_attn.q_proj, self_attn.v_proj]")
    return list(value)


def _hf_dataset(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value:
        return [_mapping(item) for item in value]
    return _mapping(value)


def _optimizer_config(value: Any) -> dict[str, Any]:
    """Options by optimizer; those of the optimizers that are not chosen have no effect."""
    for name, options in _mapping(value).items():
        if name not in OPTIMIZERS:
            raise Refused(f"a mapping with the keys {', '.join(OPTIMIZERS)}")
        if options is not None:
            _mapping(options)
    return {name: dict(options or {}) for name, options in value.items()}


def _lr_schedule(value: Any) -> dict[str, Any]:
    build_schedule(_mapping(value))
    return dict(value)


def _ranks(value: Any) -> dict[str, int]:
    try:
        return {name: _integer(1)(rank) for name, rank in _mapping(value).items()}
    except Refused:
        raise Refused("a mapping of layer names to ranks such as {self_attn.q_proj: 16}") from None


def _pairs(value: Any) -> str | list[list[int]]:
    """Pairs of layers: text such as "3:7,11:29", which the loss reads, or a list of pairs."""
    if isinstance(value, str):
        return value
    allowed = "pairs of layers of the student and the teacher such as 3:7,11:29"
    if not isinstance(value, (list, tuple)) or not value:
        raise Refused(allowed)
    try:
        pairs = [[_integer(0)(layer) for layer in pair] for pair in value]
    except (Refused, TypeError):
        raise Refused(allowed) from None
    if any(len(pair) != 2 for pair in pairs):
        raise Refused(allowed)
    return pairs


def _map(value: Any) -> dict[str, str]:
    try:
        return read_map(value)
    except ValueError as error:
        raise Refused(str(error)) from None


def _services(value: Any) -> str:
    try:
        return ",".join(check_services(_text(value)))
    except Refused:
        raise
    except ValueError:
        raise Refused(f"{', '.join(SERVICES)}, or several with commas") from None


def _tokens(value: Any) -> Any:
    try:
        read_indices(value)
    except TypeError:
        raise Refused("a list of token ids, or such lists by the name of their table") from None
    return value


LORA_SCHEMA = {
    "rank": Key(_integer(1)),
    "scale": Key(_number(0, above=True)),
    "alpha": Key(_number(0, above=True)),
    "rslora": Key(_boolean),
    "dropout": Key(_number(0, below=1)),
    "keys": Key(_optional(_names)),
    "rank_pattern": Key(_ranks),
    "init": Key(_one_of(*INITS)),
    "loftq_model": Key(_optional(_place)),
    "modules_to_save": Key(_optional(_names)),
    "trainable_token_indices": Key(_optional(_tokens)),
    "bias": Key(_one_of(*BIASES)),
    "ensure_weight_tying": Key(_boolean),
}


def _lora_over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `given` over `base`; a given scale replaces an alpha and rslora, an alpha a scale."""
    other = {"scale": ("alpha", "rslora"), "alpha": ("scale",)}
    dropped = {name for key in given for name in other.get(key, ())} - set(given)
    return {key: value for key, value in base.items() if key not in dropped} | dict(given)


def _lora_parameters(value: Any) -> dict[str, Any]:
    found = _lora_over(LORA_DEFAULTS, _checked(_mapping(value), LORA_SCHEMA, "lora_parameters."))
    read_lora_parameters(found)
    return found


#: the keys of `distillation`, which `pyloss distill` reads, with the defaults of `DistillationLoss`
DISTILLATION_SCHEMA: dict[str, Key] = {
    "teacher": Key(_optional(_place)),
    "kind": Key(_one_of(*DIVERGENCES), "forward-kl"),
    "temperature": Key(_number(0, above=True), 1.0),
    "alpha": Key(_number(0, 1), 0.0),
    "beta": Key(_number(0, 1), 0.5),
    "skew": Key(_number(0, below=1), 0.1),
    "rest": Key(_optional(_one_of(*RESTS))),  # None: bucket
    "on_policy": Key(_number(0, 1), 0.0),
    "max_new_tokens": Key(_integer(1), 128),
    "hidden_loss": Key(_optional(_one_of(*HIDDEN_LOSSES))),  # None: no such term
    "hidden_layers": Key(_optional(_pairs)),  # None: evenly, see `HiddenStates`
    "hidden_weight": Key(_number(0, above=True), 1.0),
}


def _distillation(value: Any) -> dict[str, Any]:
    return _checked(_mapping(value), DISTILLATION_SCHEMA, "distillation.")


SCHEMA: dict[str, Key] = {
    "model": Key(_place, DEFAULT_MODEL),
    "train": Key(_optional(_boolean)),  # None: true unless test is set
    "fine_tune_type": Key(_one_of(*KINDS, "full"), "lora"),
    "optimizer": Key(_one_of(*OPTIMIZERS), "adam"),
    "optimizer_config": Key(_optimizer_config, {}),
    "data": Key(_optional(_data)),
    "hf_dataset": Key(_optional(_hf_dataset)),
    "seed": Key(_integer(0), 0),
    "num_layers": Key(_integer(-1), 16),
    "batch_size": Key(_integer(1), 4),
    "iters": Key(_integer(0), 1000),
    "val_batches": Key(_integer(-1), 25),
    "learning_rate": Key(_number(0), 1e-5),
    "steps_per_report": Key(_integer(1), 10),
    "steps_per_eval": Key(_integer(0), 200),
    "resume_adapter_file": Key(_optional(_path)),
    "adapter_path": Key(_path, "adapters"),
    "save_every": Key(_integer(1), 100),
    "test": Key(_optional(_boolean)),
    "test_batches": Key(_integer(-1), 500),
    "max_seq_length": Key(_integer(2), 2048),
    "grad_checkpoint": Key(_boolean, False),
    "matmul_precision": Key(_one_of(*PRECISIONS), "float32"),
    "grad_accumulation_steps": Key(_integer(1), 1),
    "clear_cache_threshold": Key(_size, 0),
    "lr_schedule": Key(_optional(_lr_schedule)),
    "lora_parameters": Key(_lora_parameters, LORA_DEFAULTS),
    "mask_prompt": Key(_boolean, False),
    "prompt_feature": Key(_optional(_text)),
    "completion_feature": Key(_optional(_text)),
    "chat_feature": Key(_optional(_text)),
    "text_feature": Key(_optional(_text)),
    "report_to": Key(_optional(_services)),
    "project_name": Key(_optional(_text)),
    "trust_remote_code": Key(_boolean, False),
    "training_mode": Key(_one_of("normal"), "normal"),
    "config": Key(_optional(_path)),
    # keys that mlx-lm does not have
    "device": Key(_optional(_text)),
    "shard_optimizer": Key(_boolean, False),
    "distributed": Key(_one_of(*BACKENDS), "auto"),
    "map": Key(_optional(_map)),
    "valid_split": Key(_optional(_number(0, below=1))),  # None: 0.05 of a single file
    "test_split": Key(_optional(_number(0, below=1))),
    "train_on": Key(_optional(_one_of("last", "assistant", "all"))),
    "max_grad_norm": Key(_optional(_number(0, above=True))),
    "warmup": Key(_integer(0), 0),
    "full_keys": Key(_optional(_names)),
    "loraplus_lr_ratio": Key(_number(0, above=True), 1.0),
    "patience": Key(_optional(_integer(1))),
    "max_time": Key(_optional(_duration)),
    "epochs": Key(_optional(_number(0, above=True))),  # instead of iters
    "val_every": Key(_optional(_every)),  # instead of steps_per_eval
    "packing": Key(_optional(_always)),
    "keep_best": Key(_boolean, True),
    "resume": Key(_boolean, False),
    "overwrite": Key(_boolean, False),
    "preview": Key(_integer(0), 0),
    "distillation": Key(_optional(_distillation)),
}

#: command-line flags and the lora_parameters keys they set
LORA_FLAGS = {
    name: name for name in ("rank", "scale", "alpha", "rslora", "dropout", "init", "loftq_model")
}
LORA_FLAGS["lora_keys"] = "keys"

#: command-line flags of `pyloss distill` and the distillation keys they set
DISTILLATION_FLAGS = {name: name for name in DISTILLATION_SCHEMA if name != "alpha"}
DISTILLATION_FLAGS["label_share"] = "alpha"

#: names from other versions and tools, with pyloss's name for each
RENAMED = {
    "lora_layers": "num_layers",
    "steps_per_save": "save_every",
    "adapter_file": "resume_adapter_file",
    "lr": "learning_rate",
    "max_length": "max_seq_length",
    "gradient_accumulation_steps": "grad_accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "gradient_clipping": "max_grad_norm",
    "lora_plus_ratio": "loraplus_lr_ratio",
    "logging_steps": "steps_per_report",
    "eval_steps": "steps_per_eval",
    "save_steps": "save_every",
    "max_steps": "iters",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "val_split": "valid_split",
    "val_set_size": "valid_split",
    "use_dora": "fine_tune_type",
    "warmup_steps": "warmup",
    **PEFT_NAMES,
}


def _checked(
    given: Mapping[str, Any], schema: Mapping[str, Key], prefix: str = ""
) -> dict[str, Any]:
    result = {}
    for key, value in given.items():
        if key not in schema:
            hint, place = RENAMED.get(str(key)) or nearest(str(key), schema), prefix
            if not prefix and (hint or key) in LORA_SCHEMA:
                hint, place = hint or key, "lora_parameters."
            ask = f": did you mean {place}{hint}?" if hint in schema or place != prefix else ";"
            raise ValueError(
                f"unknown key {prefix}{key} (value {shown(value)}){ask} allowed are "
                f"{', '.join(schema)}"
            )
        try:
            result[key] = schema[key].check(value)
        except Refused as refusal:
            raise ValueError(f"{prefix}{key} is {shown(value)}; allowed: {refusal}") from None
    return result


def check_settings(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the checked values of `given`.

    Raises ValueError naming `source`, the key, the value and what is allowed.
    """
    try:
        return _checked(given, SCHEMA)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


#: keys that describe one call of the command, not the run
_OF_ONE_CALL = (
    "config",
    "adapter_path",
    "resume",
    "resume_adapter_file",
    "overwrite",
    "preview",
    "max_time",
    "distributed",
    "train",
    "test",
)


def resumed_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a run's `adapter_config.json`: defaults of the resumed run.

    Raises ValueError naming the key of a value that is not allowed.
    """
    known = {
        key: value
        for key, value in saved.items()
        if key in SCHEMA and key not in _OF_ONE_CALL and value is not None
    }
    return check_settings(known, "the run to resume")


#: settings that say one thing in two ways
_EITHER = (("iters", "epochs"), ("steps_per_eval", "val_every"))


def _choose_one(settings: dict[str, Any], *layers: tuple[dict[str, Any], str]) -> None:
    """Unset what a later layer says in the first way. Raises ValueError for both ways in one layer.

    In all layers together, the second way has precedence: the first has a default.
    """
    below = [settings]
    for values, source in layers:
        for steps, epochs in _EITHER:
            if steps in values and epochs in values:
                raise ValueError(f"{source}: {steps} and {epochs} are given; give one of them")
            if steps in values:
                for lower in below:
                    lower.pop(epochs, None)
        below.append(values)


def merge_settings(
    flags: Mapping[str, Any],
    path: PathLike | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> SimpleNamespace:
    """Merge all settings.

    The first of these that has a value decides: `flags` (None: unset), the YAML file `path`,
    `defaults`, the schema's defaults.

    An unset `train` is true unless `test` is true, so that `test` alone only tests. The flags in
    `LORA_FLAGS` override the file's `lora_parameters`, those in `DISTILLATION_FLAGS` its
    `distillation`.
    """
    settings = {key: entry.default for key, entry in SCHEMA.items()} | dict(defaults or {})
    from_file = check_settings(read_yaml(path), os.fspath(path)) if path is not None else {}
    given = {key: value for key, value in flags.items() if value is not None}
    lora = {name: given.pop(flag) for flag, name in LORA_FLAGS.items() if flag in given}
    distilling = {
        name: given.pop(flag) for flag, name in DISTILLATION_FLAGS.items() if flag in given
    }
    given = check_settings(given, "command line")
    _choose_one(settings, (from_file, os.fspath(path or "")), (given, "command line"))
    settings = {"epochs": None, "val_every": None} | settings | from_file | given
    try:
        if distilling:
            distilling = _checked(distilling, DISTILLATION_SCHEMA, "distillation.")
            settings["distillation"] = (settings["distillation"] or {}) | distilling
        lora = _checked(lora, LORA_SCHEMA, "lora_parameters.")
        settings["lora_parameters"] = _lora_over(settings["lora_parameters"], lora)
        read_lora_parameters(settings["lora_parameters"])
    except ValueError as error:
        raise ValueError(f"command line: {error}") from None
    settings["test"] = bool(settings["test"])
    if settings["train"] is None:
        settings["train"] = not settings["test"]
    settings["optimizer_config"] = dict(settings["optimizer_config"])
    if settings["full_keys"] and settings["fine_tune_type"] != "full":
        raise ValueError(
            "full_keys says what fine_tune_type full trains; for adapters, lora_parameters has "
            "keys (--lora-keys)"
        )
    if settings["lr_schedule"] and settings["warmup"]:
        raise ValueError("warmup is given twice: put it into lr_schedule, where a schedule is used")
    return SimpleNamespace(**settings)
