"""The settings of a training run: the authors' YAML files, and one flat file alike.

The authors' `pretrain.py` reads `cfg_pretrain.yaml` by Hydra: its `defaults` name a file in the
folder `arch` beside it, and words such as `arch.L_layers=2 lr=1e-4` change single values.
`read_settings` reads the same files and words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pyloss.checks.durations import duration
from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import nearest
from pyloss.io.files import PathLike, user_path
from pyloss.recursive.config import IGNORED, RecursiveConfig
from pyloss.recursive.models import HRM, TRM, RecursiveModel
from pyloss.runtime.precision import check_precision
from pyloss.tuner.run.yaml_file import read_yaml, yaml_value

#: models by the authors' modules and by their own names
MODELS: dict[str, Callable[[RecursiveConfig], RecursiveModel]] = {
    "trm": TRM,
    "hrm": HRM,
    "hrm_act_v1": HRM,
}
LOSSES = ("stablemax_cross_entropy", "softmax_cross_entropy")
#: keys that an architecture gets from the data
FROM_DATA = ("seq_len", "vocab_size", "num_puzzle_identifiers")
#: the evaluator that votes on the answers to ARC's tasks
ARC = "arc@ARC"
#: keys of the authors' files that have no effect here
WITHOUT_EFFECT = ("hydra", "eval_save_outputs", "run_name")


@dataclass
class RecursiveArgs:
    """The settings of `train_recursive`, under the names of the authors' `cfg_pretrain.yaml`.

    Defaults are those of that file. The settings from `steps_per_report` on are pyloss's own.

    Attributes:
        global_batch_size: puzzles of an update.
        epochs: passes over the groups of puzzles; a pass takes one puzzle of each group.
        eval_interval: epochs between evaluations, a divisor of `epochs`; None: `epochs`.
        min_eval_interval: the number of intervals before the first evaluation.
        checkpoint_every_eval: keep the weights of each evaluation, `step_1000.safetensors`.
        lr, lr_warmup_steps, lr_min_ratio: the learning rate rises from 0 over the first updates,
            and falls along half a cosine to this share of it at the end; 1: it stays.
        beta1, beta2, weight_decay: of AdamATan2.
        puzzle_emb_lr, puzzle_emb_weight_decay: of the puzzle embeddings' SignSGD, which has the
            same warm-up and cosine.
        ema, ema_rate: evaluate and save an average of the weights, which keeps this share of
            itself at each update.
        freeze_weights: train the puzzle embeddings only.
        seed: of the first weights, the order of the puzzles, and exploration.
        steps_per_report: updates between reports.
        save_every: updates between saves of the run's state; it is also saved at each evaluation.
        max_time: stop after this time; seconds, or text such as "2h". A resumed run has it anew.
        matmul_precision: "float32", "bfloat16" or "mixed"; None: unchanged.
        progress: print progress and reports.

    Raises:
        TypeError, ValueError: names the setting, its value and what is allowed.
    """

    global_batch_size: int
    epochs: int
    eval_interval: int | None = None
    min_eval_interval: int = 0
    checkpoint_every_eval: bool = False
    lr: float = 1e-4
    lr_min_ratio: float = 1.0
    lr_warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    puzzle_emb_lr: float = 1e-2
    puzzle_emb_weight_decay: float = 0.1
    ema: bool = False
    ema_rate: float = 0.999
    freeze_weights: bool = False
    seed: int = 0
    steps_per_report: int = 100
    save_every: int = 1000
    max_time: float | str | None = None
    matmul_precision: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        least = {"global_batch_size": 1, "epochs": 1, "min_eval_interval": 0, "seed": 0}
        least |= {"lr_warmup_steps": 0, "steps_per_report": 1, "save_every": 1}
        for name, low in least.items():
            setattr(self, name, whole(_integer(getattr(self, name)), name, low))
        if self.eval_interval is not None:
            self.eval_interval = whole(_integer(self.eval_interval), "eval_interval", 1)
            if self.epochs % self.eval_interval:
                raise ValueError(
                    f"eval_interval is {self.eval_interval}; it must be a divisor of epochs, "
                    f"{self.epochs}"
                )
        for name in ("lr", "weight_decay", "puzzle_emb_lr", "puzzle_emb_weight_decay"):
            setattr(self, name, real(getattr(self, name), name, 0))
        for name in ("lr_min_ratio", "ema_rate"):
            setattr(self, name, real(getattr(self, name), name, 0, 1))
        for name in ("beta1", "beta2"):
            setattr(self, name, real(getattr(self, name), name, 0, below=1))
        for name in ("checkpoint_every_eval", "ema", "freeze_weights", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {shown(getattr(self, name))}; it must be true or false")
        if self.max_time is not None:
            self.max_time = duration(self.max_time, "max_time")
        if self.matmul_precision is not None:
            check_precision(self.matmul_precision)

    @property
    def rounds(self) -> int:
        """How many times the data are trained on for `eval_interval` epochs."""
        return self.epochs // (self.eval_interval or self.epochs)


@dataclass
class RecursiveSettings:
    """A run as a file describes it.

    Attributes:
        arch: the architecture, as `RecursiveConfig.of` takes it, with `name` and `loss`.
        training: the settings of `RecursiveArgs`.
        data_paths, data_paths_test: folders of puzzles; without the latter, the former's test split
            is evaluated.
        load_checkpoint: the weights to begin with.
        checkpoint_path: the folder of the run.
        project_name: for services that take reports.
        evaluators: "arc@ARC" where answers to ARC's tasks are voted on.
        unused: keys that have no effect here.
    """

    arch: dict[str, Any]
    training: dict[str, Any]
    data_paths: list[str] = field(default_factory=list)
    data_paths_test: list[str] = field(default_factory=list)
    load_checkpoint: str | None = None
    checkpoint_path: str | None = None
    project_name: str | None = None
    evaluators: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def args(self) -> RecursiveArgs:
        """The checked settings of the run. Raises ValueError naming the keys that are missing."""
        needed = ("global_batch_size", "epochs")
        if missing := [name for name in needed if self.training.get(name) is None]:
            raise ValueError(
                f"the settings lack {' and '.join(missing)}: give them in the file, or as "
                f"{' '.join(f'{name}=N' for name in missing)}"
            )
        return RecursiveArgs(**self.training)

    def as_mapping(self) -> dict[str, Any]:
        """The keys of a file that `read_settings` reads back."""
        names = ("data_paths", "data_paths_test", "evaluators")
        lists = {name: getattr(self, name) for name in names}
        return {"arch": self.arch, **lists, **self.training}


def check_arch(arch: Mapping[str, Any], **sizes: Any) -> RecursiveConfig:
    """The checked settings of an architecture, as `make_model` takes them."""
    for name in FROM_DATA:
        if name in arch and name in sizes and arch[name] != sizes[name]:
            raise ValueError(
                f"{name} is {shown(arch[name])} in the settings and {sizes[name]} in the data"
            )
    _kind(arch)
    _loss_type(arch)
    return RecursiveConfig.of(arch, **sizes)


def make_model(arch: Mapping[str, Any], **sizes: Any) -> RecursiveModel:
    """The model of an architecture, with new weights.

    `sizes` are `seq_len`, `vocab_size`, `num_puzzle_identifiers` of the data, and `batch_size`. A
    size that the architecture has, too, must be the same.

    Raises ValueError or TypeError naming the key.
    """
    return _kind(arch)(check_arch(arch, **sizes))


def make_head(arch: Mapping[str, Any], **sizes: Any) -> Any:
    """The model of `make_model` in its `ACTLossHead`."""
    from pyloss.losses.act import ACTLossHead

    return ACTLossHead(make_model(arch, **sizes), _loss_type(arch))


def read_settings(path: PathLike | None = None, words: Iterable[str] = ()) -> RecursiveSettings:
    """The settings of a YAML file, changed by words such as "arch.L_layers=2" and "lr=1e-4".

    The file is the authors' `cfg_pretrain.yaml`, whose `defaults` name a file in `arch/` beside it;
    a file with the key `arch`; or one whose keys are those of both, such as the authors'
    `arch/trm.yaml`. The word "arch=hrm" chooses another file in `arch/`.

    Raises:
        ValueError: an unknown key, with the nearest one; a value that a key cannot have.
        OSError: a file cannot be read.
    """
    content = {} if path is None else read_yaml(path)
    source = "the settings" if path is None else str(user_path(path))
    given = dict(_word(word) for word in words)
    chosen, files = given.pop("arch", None), {}
    if path is not None and ("defaults" in content or isinstance(chosen, str)):
        files = _arch_file(content.pop("defaults", []), chosen, user_path(path).parent)
    elif chosen is not None:
        raise ValueError("arch=NAME chooses a file in arch/ beside the settings: give their file")
    own = content.pop("arch", {})
    if not isinstance(own, Mapping):
        raise ValueError(f"{source}: arch is {shown(own)}; it must be a mapping")
    arch: dict[str, Any] = {**files, **own}
    rest: dict[str, Any] = {}
    for key, value in content.items():
        (arch if key in _ARCH else rest)[_NAMES.get(key, key)] = value
    for key, value in given.items():
        name = _NAMES.get(key, key.removeprefix("arch."))
        inner = key.startswith("arch.") or name in _ARCH
        known = (*_ARCH, _LOSS_TYPE) if inner else (*_OWN, *WITHOUT_EFFECT)
        _check_known({name: value}, known, "arch." if inner else "")
        (arch if inner else rest)[name] = value
    loss_type = arch.pop(_LOSS_TYPE, None)
    if loss_type is not None:
        arch["loss"] = {**_mapping_of(arch.get("loss", {})), "loss_type": loss_type}
    _check_known(arch, _ARCH, f"{source}: arch.")
    _check_known(rest, (*_OWN, *WITHOUT_EFFECT), f"{source}: ")
    unused = [key for key in WITHOUT_EFFECT if rest.get(key) not in (None, [])]
    if arch.get("forward_dtype") not in (None, "float32"):
        unused.append("forward_dtype (--precision sets the products' precision)")
    training = {key: rest[key] for key in _TRAINING if rest.get(key) is not None}
    others: dict[str, Any] = {
        key: _paths(rest[key], key) for key in _LISTS if rest.get(key) is not None
    }
    others |= {key: _text(rest[key], key) for key in _TEXTS if rest.get(key) is not None}
    others["evaluators"] = _evaluators(rest.get("evaluators"))
    arch = {key: value for key, value in arch.items() if value is not None or key == "loss"}
    return RecursiveSettings(arch, training, unused=unused, **others)


_ARCH = (*(each.name for each in fields(RecursiveConfig) if each.name != "batch_size"), *IGNORED)
_TRAINING = tuple(each.name for each in fields(RecursiveArgs))
_LISTS, _TEXTS = (
    ("data_paths", "data_paths_test"),
    ("load_checkpoint", "checkpoint_path", "project_name"),
)
_OWN = (*_TRAINING, *_LISTS, *_TEXTS, "evaluators")
#: the key inside of `loss`, as a word names it
_LOSS_TYPE = "loss.loss_type"
#: names of HRM's code for those of TRM's
_NAMES = {"data_path": "data_paths"}


def _kind(arch: Mapping[str, Any]) -> Callable[[RecursiveConfig], RecursiveModel]:
    """The class that `name` means: "trm", or the authors' "recursive_reasoning.trm@Class"."""
    name = arch.get("name")
    if name is None:
        raise ValueError("the settings lack name, the model: trm or hrm")
    module = str(name).partition("@")[0].rpartition(".")[2].lower()
    if not isinstance(name, str) or module not in MODELS:
        raise ValueError(
            f"name is {shown(name)}; it must be trm or hrm, or the authors' name of such a model, "
            "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"
        )
    return MODELS[module]


def _loss_type(arch: Mapping[str, Any]) -> str:
    """The loss of `loss`, which is its name or the authors' mapping."""
    loss = arch.get("loss", LOSSES[0])
    found = loss.get("loss_type") if isinstance(loss, Mapping) else loss
    if found not in LOSSES:
        raise ValueError(
            f"loss is {shown(loss)}; it must be {' or '.join(LOSSES)}, or a mapping that has one "
            "of them as its loss_type"
        )
    return str(found)


def _mapping_of(loss: Any) -> Mapping[str, Any]:
    return loss if isinstance(loss, Mapping) else {}


def _arch_file(defaults: Any, chosen: Any, folder: Path) -> dict[str, Any]:
    """The content of the file that Hydra's `defaults` name for `arch`, or `chosen` instead."""
    name = chosen
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry == "_self_":
            continue
        if not isinstance(entry, Mapping) or set(entry) != {"arch"}:
            raise ValueError(
                f"defaults has {shown(entry)}; read are `arch: NAME`, which names arch/NAME.yaml, "
                "and _self_"
            )
        name = chosen if chosen is not None else entry["arch"]
    if name is None:
        return {}
    if not isinstance(name, str):
        raise ValueError(f"arch is {shown(name)}; it must be the name of a file in arch/")
    return read_yaml(folder / "arch" / f"{name.removesuffix('.yaml')}.yaml")


def _word(word: str) -> tuple[str, Any]:
    """Key and value of "lr=1e-4"; Hydra's `+` before a new key has no effect."""
    key, equals, value = word.lstrip("+").partition("=")
    if not (equals and key.strip()):
        raise ValueError(f"{shown(word)} is no setting: give KEY=VALUE, such as lr=1e-4")
    return key.strip(), yaml_value(value)


def _check_known(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key, value in given.items():
        if key not in names:
            hint = {"batch_size": "global_batch_size", "learning_rate": "lr"}.get(str(key))
            hint = hint or nearest(str(key), (*names, *_OWN))
            ask = f": did you mean {hint}?" if hint else ";"
            raise ValueError(
                f"{where}{key} (value {shown(value)}) is not known{ask} known are "
                f"{', '.join(names)}"
            )


def _paths(value: Any, key: str) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{key} is {shown(value)}; it must be a folder's path or a list of them")
    return paths


def _evaluators(value: Any) -> list[str]:
    """The names of the authors' list of mappings."""
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    names = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in entries]
    if any(name != ARC for name in names):
        raise ValueError(f"evaluators is {shown(value)}; it must be a list, of {ARC} or empty")
    return [ARC for _ in names]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}; it must be text")
    return value


def _integer(value: Any) -> Any:
    """1e3 is a float in YAML."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
