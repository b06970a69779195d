"""The argument parser, the types of arguments, and the flags that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from pyloss.checks.numbers import shown
from pyloss.errors import cut, nearest
from pyloss.io import console
from pyloss.tuner.run.settings import DEFAULT_MODEL, LORA_DEFAULTS, SCHEMA, allowed_values
from pyloss.tuner.run.yaml_file import MOST_DIGITS


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` and prints its help by `console`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = cut(message, 1000)  # an argument may be of any length
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown arguments in the command's own parser, which knows its name and flags.

        Words such as KEY=VALUE may stand before, between and after flags.
        """
        found, rest = super().parse_known_args(args, namespace)
        words = [each for each in self._actions if not each.option_strings and each.nargs == "*"]
        if words and rest and not any(text.startswith("-") for text in rest):
            # argparse gives such an argument only the first of the groups that flags separate.
            setattr(found, words[0].dest, [*getattr(found, words[0].dest), *rest])
            rest = []
        if rest:
            flags = [text for text in rest if text.startswith("-")]
            known = [
                text
                for action in self._actions
                for text in action.option_strings
                if text.startswith("--")
            ]
            near = nearest(flags[0].partition("=")[0], known) if flags else None
            self.error(
                f"unrecognized arguments: {' '.join(rest)}"
                + (f"; did you mean {near}?" if near else "")
            )
        return found, rest

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            console.out(message, end="")


def whole(text: str) -> int:
    if len(text) > MOST_DIGITS and text.strip().lstrip("+-").isdigit():
        raise argparse.ArgumentTypeError(f"an integer of {len(text)} digits is out of range")
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from None


def real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number") from None


def truth(text: str) -> bool:
    return text.lower() not in ("false", "f", "no", "0")


def command(commands: Any, name: str, text: str, usage: str = "[options]", **parts: str) -> Any:
    """Adds a command and returns its parser.

    `text` is its line in the list of commands, `usage` follows its name; `parts` are description
    and epilog.
    """
    return commands.add_parser(name, usage=f"%(prog)s {usage}", help=text, **parts)


def setting(group: Any, flag: str, text: str, *more: str, **options: Any) -> None:
    """Adds the flag of a key of `SCHEMA`.

    The flag has no default, so that the YAML file can set the key; the help shows the schema's.
    """
    key = options.get("dest") or flag.removeprefix("--").replace("-", "_")
    default = SCHEMA[key].default if key in SCHEMA else LORA_DEFAULTS.get(key)
    if default is not None and not isinstance(default, bool) and "(" not in text:
        text += f" (default: {default})"
    if "action" in options:
        options["default"] = None
    else:
        options.setdefault("metavar", {whole: "N", real: "X"}.get(options.get("type", str), "TEXT"))
    action = group.add_argument(flag, *more, help=text, **options)
    if key in SCHEMA and (allowed := allowed_values(SCHEMA[key].check)):
        action.completer = lambda **_: allowed


def model_flags(
    add: Callable[..., Any], *more: str, adapter: str | None = None, adapter_path: str | None = None
) -> None:
    """Adds --model, also under the names `more`.

    With `adapter`, its help text, adds --adapter-path with the default `adapter_path`; an unset
    --model is then None, for the adapter's.
    """
    usual = f"the one that the adapter names, else {DEFAULT_MODEL}" if adapter else DEFAULT_MODEL
    add(
        "--model",
        *more,
        default=None if adapter else DEFAULT_MODEL,
        help="folder, .gguf file, owner/name or owner/name:Q4_K_M of the hub, ollama:name:tag, or "
        f"known name (default: {usual})",
    )
    if adapter:
        add("--adapter-path", default=adapter_path, help=adapter)


def push_flags(add: Callable[..., Any], *more: str) -> None:
    """Adds --push, also under the names `more`, and --private."""
    add(
        "--push",
        *more,
        metavar="OWNER/NAME",
        help="also upload the folder to this repository of the hub, which is made if it is missing",
    )
    add("--private", action="store_true", help="with --push: make the repository a private one")


def group_size_flag(add: Callable[..., Any], *more: str, what: str = "") -> None:
    """Adds --group-size, also under the names `more`; `what` begins its help."""
    add(
        "--group-size",
        *more,
        type=whole,
        metavar="N",
        help=f"{what}number of values that share a scale (default: 64)",
    )


def dtype_flag(add: Callable[..., Any], text: str) -> None:
    """Adds --dtype, a type of floats."""
    add("--dtype", choices=("float32", "float16", "bfloat16"), help=text)


#: The help of --overwrite.
OVERWRITE = "replace earlier files; without it they move to a folder previous-N"


def ignored_flag(add: Callable[..., Any]) -> None:
    add(
        "--trust-remote-code",
        action="store_true",
        help="accepted and ignored: code in a model's folder is never run",
    )


def data_flags(
    group: Any, batch_text: str = "samples in a batch, of each process under mpirun"
) -> None:
    setting(
        group,
        "--data",
        "file of records (.jsonl, .json, .csv, .tsv, .txt, also with .gz or .zst; .parquet), "
        "folder with train.jsonl, valid.jsonl and test.jsonl, dataset on the hub "
        "(owner/name:CONFIG:SPLIT), or - for standard input; several with weights: "
        "a.jsonl:0.7 b.jsonl:0.3",
        nargs="+",
        metavar="PATH",
    )
    setting(
        group,
        "--valid-split",
        "share of the training data to validate on (default: 0.05 of a single file)",
        type=real,
    )
    setting(group, "--test-split", "share of the training data to test on", type=real)
    target_flags(group)
    setting(group, "--batch-size", batch_text, type=whole)


def target_flags(group: Any) -> None:
    """Adds the flags that say what the records are and which of their tokens are trained."""
    setting(
        group,
        "--map",
        "keys of the records, as prompt=question,completion=reply, where they are not recognized",
        metavar="LIST",
    )
    setting(
        group,
        "--mask-prompt",
        "train on the answers only, not on the prompts",
        action="store_true",
    )
    setting(
        group,
        "--train-on",
        "train on the last assistant turn, every assistant turn, or all tokens "
        "(default: all; last with --mask-prompt)",
        metavar="last|assistant|all",
    )
    setting(
        group,
        "--max-seq-length",
        "largest number of tokens of a sample; longer samples are cut",
        type=whole,
    )


def device_flag(group: Any) -> None:
    setting(
        group,
        "--device",
        "device to compute on: cpu or opencl:<number> (default: cpu)",
        metavar="NAME",
    )


def distributed_flag(group: Any) -> None:
    setting(
        group,
        "--distributed",
        "work together with the other processes of mpirun or srun: auto, where one of them "
        "started this process; off; mpi",
        metavar="NAME",
    )


def precision_flag(group: Any) -> None:
    text = (
        "precision of the layers' products: float32; bfloat16, whose speed depends on the "
        "processor (`pyloss bench` measures it); mixed: activations in bfloat16, too, "
        "which takes less memory; int8, for generation and evaluation with quantized weights"
    )
    setting(group, "--matmul-precision", text, "--precision", metavar="NAME")
