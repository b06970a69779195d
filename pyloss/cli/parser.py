"""The command line: the flags of each command, and errors as one line. What the commands do is in `commands.py`."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from pyloss.checks.numbers import shown
from pyloss.errors import DeviceError, cut, nearest
from pyloss.io import console
from pyloss.runtime.precision import PRECISIONS
from pyloss.tuner.run.settings import DEFAULT_MODEL, LORA_DEFAULTS, SCHEMA
from pyloss.tuner.run.yaml_file import MOST_DIGITS

#: what bad input raises, and what is missing on a machine; anything else is a fault of ours and shows its traceback
BAD_INPUT = (ValueError, OSError, ImportError, NotImplementedError, MemoryError, DeviceError)


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line like all others, and whose help goes out like all text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = cut(message, 1000)  # what was given may be of any length
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but a command refuses what it does not know itself: its name and flags are at hand here."""
        found, rest = super().parse_known_args(args, namespace)
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


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS and text.strip().lstrip("+-").isdigit():
        raise argparse.ArgumentTypeError(f"an integer of {len(text)} digits is out of range")
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number") from None


def _command(commands: Any, name: str, text: str, usage: str = "[options]", **parts: str) -> Any:
    """Add a command: `text` in the list of all, `usage` behind its name, description and epilog in `parts`; gives its parser."""
    return commands.add_parser(name, usage=f"%(prog)s {usage}", help=text, **parts)


def _setting(group: Any, flag: str, text: str, *more: str, **options: Any) -> None:
    """Add a flag of a key of `SCHEMA`. Flags have no default of their own: what was not given comes from the file."""
    key = options.get("dest") or flag.removeprefix("--").replace("-", "_")
    default = SCHEMA[key].default if key in SCHEMA else LORA_DEFAULTS.get(key)
    if default is not None and not isinstance(default, bool) and "(" not in text:
        text += f" (default: {default})"
    if "action" in options:
        options["default"] = None
    else:
        options.setdefault(
            "metavar", {_whole: "N", _real: "X"}.get(options.get("type", str), "TEXT")
        )
    group.add_argument(flag, *more, help=text, **options)


def _model_flags(
    add: Callable[..., Any], *more: str, adapter: str | None = None, adapter_path: str | None = None
) -> None:
    """Add --model, under `more` names, and where `adapter` says what for, --adapter-path with its default."""
    add(
        "--model",
        *more,
        default=DEFAULT_MODEL,
        help=f"folder, .gguf file or known name (default: {DEFAULT_MODEL})",
    )
    if adapter:
        add("--adapter-path", default=adapter_path, help=adapter)


#: of --overwrite
_OVERWRITE = "replace what is there, which is otherwise kept in a folder previous-N beside"


def _ignored_flag(add: Callable[..., Any]) -> None:
    add(
        "--trust-remote-code",
        action="store_true",
        help="accepted: no code of a model's folder is ever run",
    )


def _data_flags(group: Any) -> None:
    _setting(
        group,
        "--data",
        "folder with train.jsonl, valid.jsonl, test.jsonl, or the name of a dataset of the hub",
        metavar="FOLDER",
    )
    _setting(
        group,
        "--mask-prompt",
        "train on the answers alone, not on the prompts",
        action="store_true",
    )
    _setting(
        group,
        "--train-on",
        "the last assistant turn, every assistant turn, or all tokens (default: all; last with --mask-prompt)",
        metavar="last|assistant|all",
    )
    _setting(
        group,
        "--max-seq-length",
        "tokens of a sample that are used; longer ones are cut",
        type=_whole,
    )
    _setting(group, "--batch-size", "samples in a batch", type=_whole)


def _device_flag(group: Any) -> None:
    _setting(
        group, "--device", "where to compute: cpu or opencl:<number> (default: cpu)", metavar="NAME"
    )


def _precision_flag(group: Any) -> None:
    text = "how layers multiply: float32, or bfloat16, whose speed depends on the processor (`pyloss bench` measures it)"
    _setting(group, "--matmul-precision", text, metavar="NAME")


def _train_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        text="fine-tune a model: LoRA, DoRA or full",
        description="Fine-tune a language model with adapters (LoRA and DoRA, QLoRA over a quantised model) or in full.\n"
        "The flags and YAML files are those of mlx_lm.lora; flags go before the file, the file before defaults.",
        epilog="""examples:
  pyloss train --data examples/data --mask-prompt --iters 200 --learning-rate 1e-3
                              train the embedded small model; the adapter goes to adapters/
                              (the default rate is mlx-lm's 1e-5, and too low for so few iterations)
  pyloss train --data examples/data --mask-prompt --preview
                              show what would be trained on, and do nothing else
  pyloss train -c lora_config.yaml --iters 50
                              settings from a file, one of them changed
  pyloss train -c lora_config.yaml --resume
                              go on with a run that was stopped, as if it never had been
  pyloss train --adapter-path adapters --data examples/data --mask-prompt --test
                              only test the adapter that is there

An earlier run in the adapter's folder moves to previous-1, previous-2, ... there, unless --overwrite is given.
Ctrl-C (and SIGTERM) saves everything and says where; --resume continues from there.""",
    )
    group = parser.add_argument_group("what to train")
    _setting(group, "--train", "train; done anyway where --test is not given", action="store_true")
    _setting(group, "--model", "a model's folder, a .gguf file, or a known name", metavar="PATH")
    _setting(group, "--config", "YAML file with any of these settings", "-c", metavar="FILE")
    _setting(
        group, "--adapter-path", "folder for the adapter and the state of the run", metavar="FOLDER"
    )
    _setting(
        group,
        "--fine-tune-type",
        "lora and dora train adapters, full the layers' own weights",
        metavar="lora|dora|full",
    )
    group = parser.add_argument_group("data")
    _data_flags(group)
    _setting(
        group,
        "--preview",
        "print N decoded samples, trained tokens marked, and stop (N: 3)",
        **_PREVIEW,
    )
    group = parser.add_argument_group("layers and adapters")
    _setting(
        group, "--num-layers", "how many of the last layers are trained; -1 for all", type=_whole
    )
    _setting(group, "--rank", "rank of the adapters", type=_whole)
    _setting(group, "--scale", "factor of the adapters' output", type=_real)
    _setting(
        group,
        "--alpha",
        "in place of --scale: the factor times the rank, as PEFT has it",
        type=_real,
    )
    _setting(
        group,
        "--rslora",
        "with --alpha: the factor is alpha over the root of the rank",
        action="store_true",
    )
    _setting(group, "--dropout", "dropout of the adapters' input", type=_real)
    _setting(group, "--init", "how adapters begin: default, pissa or loftq", metavar="NAME")
    _setting(
        group,
        "--loftq-model",
        "for --init loftq: the float model that the base was quantised from",
        metavar="PATH",
    )
    _setting(
        group,
        "--lora-keys",
        "layers that get adapters (default: all linear ones)",
        nargs="+",
        metavar="KEY",
    )
    _setting(
        group,
        "--full-keys",
        "parts that full fine-tuning trains (default: all of the layers)",
        nargs="+",
        metavar="KEY",
    )
    group = parser.add_argument_group("optimisation")
    _device_flag(group)
    _setting(group, "--iters", "batches to train on", type=_whole)
    _setting(group, "--learning-rate", "step size of the optimiser", type=_real)
    _setting(group, "--warmup", "updates over which the learning rate rises from 0", type=_whole)
    _setting(
        group,
        "--loraplus-lr-ratio",
        "LoRA+: learning rate of the adapters' B, times that of the rest",
        type=_real,
    )
    _setting(group, "--optimizer", "adam, adamw, lion or sgd", metavar="NAME")
    _setting(
        group, "--grad-accumulation-steps", "batches whose gradients make one update", type=_whole
    )
    _setting(
        group, "--max-grad-norm", "scale gradients down to this norm (default: off)", type=_real
    )
    _setting(
        group,
        "--grad-checkpoint",
        "recompute activations: less memory, more time",
        action="store_true",
    )
    _precision_flag(group)
    _setting(
        group, "--seed", "seed of the adapters, the order of the data and dropout", type=_whole
    )
    group = parser.add_argument_group("validation, saving, resuming")
    _setting(
        group, "--steps-per-report", "iterations between reports of the training loss", type=_whole
    )
    _setting(group, "--steps-per-eval", "iterations between validations", type=_whole)
    _setting(group, "--val-batches", "batches of a validation, -1 for all, 0 for none", type=_whole)
    _setting(
        group,
        "--patience",
        "stop after N validations in a row without a lower loss (default: off)",
        type=_whole,
    )
    _setting(
        group,
        "--keep-last",
        "end with the last adapter instead of the one with the lowest validation loss",
        action="store_false",
        dest="keep_best",
    )
    _setting(group, "--save-every", "iterations between saves", type=_whole)
    _setting(
        group,
        "--resume",
        "continue the run in --adapter-path where it stopped, with its settings",
        action="store_true",
    )
    _setting(
        group,
        "--resume-adapter-file",
        "start a new run from these adapter weights, also those of a folder",
        metavar="FILE",
    )
    _setting(group, "--overwrite", _OVERWRITE, action="store_true")
    _setting(
        group,
        "--test",
        "evaluate on the test data: after training, or without --train alone",
        action="store_true",
    )
    _setting(group, "--test-batches", "batches of the test, -1 for all", type=_whole)
    group = parser.add_argument_group("reporting and compatibility")
    _setting(group, "--report-to", "also report to wandb, swanlab, or wandb,swanlab")
    _setting(group, "--project-name", "name of the project there")
    _setting(
        group, "--clear-cache-threshold", "accepted: there is no such cache here", metavar="SIZE"
    )
    _setting(
        group,
        "--trust-remote-code",
        "accepted: no code of a model's folder is ever run",
        action="store_true",
    )


_PREVIEW: dict[str, Any] = {"nargs": "?", "const": 3, "type": _whole, "metavar": "N"}


def _eval_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        text="loss and perplexity on test data",
        description="Measure the loss and perplexity of a model, with or without an adapter.",
        epilog="""examples:
  pyloss eval --data examples/data --mask-prompt                            the model as it is
  pyloss eval --data examples/data --mask-prompt --adapter-path adapters    with the adapter""",
    )
    _setting(parser, "--model", "a model's folder, a .gguf file, or a known name", metavar="PATH")
    parser.add_argument("--adapter-path", help="folder or file of an adapter (default: none)")
    _setting(parser, "--config", "YAML file with any of these settings", "-c", metavar="FILE")
    _data_flags(parser)
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="(default: test)"
    )
    _setting(parser, "--test-batches", "batches to measure, -1 for all", type=_whole)
    _device_flag(parser)
    _precision_flag(parser)


def _truth(text: str) -> bool:
    return text.lower() not in ("false", "f", "no", "0")


def _generate_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        text="answer a prompt",
        description="Generate text, as it comes, from a model with or without an adapter.",
        epilog="""examples:
  pyloss generate --prompt "What is a tensor?"
  pyloss generate --adapter-path adapters --prompt "turn off the lamp in the hall"
                              with the system prompt that the adapter was trained with, if there was one
  echo "Hello" | pyloss generate --prompt - --temp 0.7 --seed 1""",
    )
    add = parser.add_argument
    _model_flags(
        add,
        adapter="folder of an adapter, or a file such as adapters/0000100_adapters.safetensors (default: none)",
    )
    _device_flag(parser)
    add(
        "--prompt",
        "-p",
        default="hello",
        help="the user's message; - reads it from standard input (default: hello)",
    )
    add(
        "--system-prompt",
        metavar="TEXT",
        help="the system message (default: the one that the adapter was trained with, if any)",
    )
    add(
        "--no-system-prompt",
        action="store_true",
        help="leave out the system message that the adapter was trained with",
    )
    add("--prefill-response", help="how the answer begins")
    add("--max-tokens", "-m", type=_whole, default=100, help="(default: 100)")
    add(
        "--temp",
        type=_real,
        default=0.0,
        help="sampling temperature; 0 takes the likeliest token (default: 0)",
    )
    add(
        "--top-p",
        type=_real,
        default=1.0,
        help="sample from the likeliest tokens of this probability (default: 1)",
    )
    add(
        "--min-p",
        type=_real,
        default=0.0,
        help="leave out tokens less likely than this part of the first (default: 0)",
    )
    add(
        "--top-k",
        type=_whole,
        default=0,
        help="sample from the K likeliest tokens, 0 for all (default: 0)",
    )
    add("--seed", type=_whole, help="seed of the sampling")
    add(
        "--extra-eos-token",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="further tokens that end the answer",
    )
    add("--ignore-chat-template", action="store_true", help="take the prompt as it is")
    add(
        "--chat-template-config",
        metavar="JSON",
        help="further arguments of the chat template, as a JSON object",
    )
    add(
        "--verbose",
        type=_truth,
        default=True,
        metavar="T|F",
        help="print the speed behind the answer (default: T)",
    )
    _ignored_flag(add)


def _fuse_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "fuse",
        text="put an adapter into its model",
        description="Write a model with an adapter put into its weights.",
        epilog="example:\n  pyloss fuse --adapter-path adapters --save-path fused_model",
    )
    add = parser.add_argument
    _model_flags(add, adapter="folder of the adapter (default: adapters)", adapter_path="adapters")
    add("--save-path", default="fused_model", help="folder to write (default: fused_model)")
    add("--overwrite", action="store_true", help=_OVERWRITE)
    add(
        "--dequantize",
        "--de-quantize",
        action="store_true",
        help="keep the change in full: fused layers are never quantised",
    )
    add(
        "--export-gguf",
        action="store_true",
        help="write a GGUF file in float16 too; `pyloss export` has more to choose",
    )
    add(
        "--gguf-path",
        default="ggml-model-f16.gguf",
        metavar="FILE",
        help="its name (default: ggml-model-f16.gguf)",
    )
    for flag in ("--upload-repo", "--hf-path"):
        add(flag, help=argparse.SUPPRESS)
    _ignored_flag(add)


def _export_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        usage="--to FORMAT --output PATH [options]",
        text="write a model or an adapter for another program",
        description="Write a model, with an adapter put into its weights, or an adapter alone, in another program's format.",
        epilog="""examples:
  pyloss export --adapter-path adapters --to peft --output peft_adapter
                              the adapter for PEFT and transformers; --to mlx for mlx-lm
  pyloss export --adapter-path adapters --to gguf --dequantize --type q8_0 --output model.gguf
                              model and adapter as one file for llama.cpp
  pyloss export --adapter-path adapters --to gguf --adapter-only --output lora.gguf
                              the adapter alone, for llama.cpp's --lora
  pyloss export --model some_folder --to gguf --type q8_0 --output model.gguf
                              a model converted""",
    )
    add = parser.add_argument
    _model_flags(add, adapter="folder of an adapter, in mlx-lm's or PEFT's layout (default: none)")
    add("--to", required=True, choices=("peft", "mlx", "gguf", "hf"), help="what to write")
    add(
        "--output", required=True, metavar="PATH", help="the file of gguf, the folder of the others"
    )
    add("--overwrite", action="store_true", help=_OVERWRITE)
    add(
        "--type",
        help="gguf: store matrices as f32, f16, bf16, q8_0, q5_0, q5_1, q4_0 or q4_1 (default: as they are)",
    )
    add("--adapter-only", action="store_true", help="gguf: the adapter alone")
    add(
        "--dequantize",
        "--de-quantize",
        action="store_true",
        help="keep the change in full: fused layers are never quantised",
    )
    add(
        "--name",
        help="the model's name in the file, or the base's in PEFT's configuration (default: --model)",
    )


def _convert_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        usage="--output FOLDER [options]",
        text="write a model as a Hugging Face folder, quantised or not",
        description="Write a model as a Hugging Face folder. The flags of mlx_lm.convert are taken too.",
        epilog="""examples:
  pyloss convert --model some_folder --quantize q4 --output quantised
                              4 bits in groups of 64, as mlx-lm reads them
  pyloss convert --model some_folder --quantize nf4 --output quantised
                              QLoRA's NF4, as transformers reads it with bitsandbytes
  pyloss convert --model model.gguf --dtype bfloat16 --dequantize --output floats
                              a GGUF file as a plain folder""",
    )
    add = parser.add_argument
    _model_flags(add, "--hf-path")
    add("--output", "--mlx-path", required=True, metavar="FOLDER", help="folder to write")
    add("--overwrite", action="store_true", help=_OVERWRITE)
    text = "q2, q3, q4, q5, q6 or q8 (mlx's layout) or nf4 (bitsandbytes'); alone: q4, or what --q-bits says"
    add("-q", "--quantize", nargs="?", const="", metavar="KIND", help=text)
    add(
        "--group-size",
        "--q-group-size",
        type=_whole,
        metavar="N",
        help="values that share a scale (default: 64)",
    )
    add("--q-bits", type=_whole, metavar="N", help="the same as --quantize qN")
    add("--q-mode", default="affine", choices=("affine",), help=argparse.SUPPRESS)
    add("--single-quant", action="store_true", help="nf4: do not quantise the scales too")
    add(
        "--loftq-rank",
        type=_whole,
        metavar="N",
        help="leave out what adapters of this rank can begin with (--init loftq)",
    )
    add(
        "--loftq-rounds",
        type=_whole,
        default=4,
        metavar="N",
        help="for --loftq-rank: how often (default: 4)",
    )
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of what is not quantised (default: the model's)",
    )
    add(
        "-d",
        "--dequantize",
        action="store_true",
        help="write floats, whatever the model is stored as",
    )
    _ignored_flag(add)


def _bench_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        text="what this machine gives",
        description="Measure the speed of memory, of matrix products and of a training step on this machine.",
        epilog="""examples:
  pyloss bench
  pyloss bench --model model.gguf --batch-size 1 --max-seq-length 2048 --grad-checkpoint --train-tokens 500000""",
    )
    add = parser.add_argument
    text = f"folder, .gguf file or known name (default: {DEFAULT_MODEL}, or where that is missing random weights of its shape)"
    add("--model", help=text)
    add(
        "--fine-tune-type",
        choices=("lora", "dora"),
        default="lora",
        help="adapters to train (default: lora)",
    )
    add("--rank", type=_whole, default=8, metavar="N", help="rank of the adapters (default: 8)")
    add("--batch-size", type=_whole, default=4, metavar="N", help="samples in a batch (default: 4)")
    add(
        "--max-seq-length",
        type=_whole,
        default=256,
        metavar="N",
        help="tokens of each (default: 256)",
    )
    add(
        "--grad-checkpoint",
        action="store_true",
        help="recompute activations: less memory, more time",
    )
    add(
        "--matmul-precision",
        default="float32",
        choices=PRECISIONS,
        help="of the step's products (default: float32)",
    )
    add(
        "--train-tokens",
        type=_whole,
        default=1_000_000,
        metavar="N",
        help="say how long so many tokens take (default: 1000000)",
    )


def build_parser(prog: str = "pyloss") -> argparse.ArgumentParser:
    """The parser of all commands, started as `prog`; what it parses has the command's name under `command`."""
    parser = Parser(
        prog=prog,
        description="Fine-tune language models on ordinary computers.",
        epilog="""a first run:
  pyloss train --data examples/data --mask-prompt --iters 100 --learning-rate 1e-3
  pyloss generate --adapter-path adapters --prompt "turn off the lamp in the hall"

`pyloss COMMAND --help` explains a command. With PYLOSS_DEBUG=1 errors show where they come from.""",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    _train_parser(commands)
    _eval_parser(commands)
    _generate_parser(commands)
    _fuse_parser(commands)
    _export_parser(commands)
    _convert_parser(commands)
    _bench_parser(commands)
    commands.add_parser(
        "info", help="version, processor and threads in use", description="What is in use."
    )
    return parser


class _Lines(logging.Handler):
    """The library's log as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        console.say(self.format(record))


def main(argv: Sequence[str] | None = None, prog: str = "pyloss") -> int:
    """Run one command; `prog` is what help and errors call the program.

    0: done; 1: training failed, or the result could not be written to standard output; 2: bad input, said in one line on
    standard error; 130: Ctrl-C; 143: SIGTERM, which ends a command as Ctrl-C does.
    """
    console.begin()
    with _terminated_as_interrupted() as terminated:
        code = _run(argv, prog)
    if code == 130 and terminated:
        code = 143
    if not console.finish() and code == 0:
        code = 1
        # Who reads the beginning of an answer only, as `head` does, knows that there is more; a figure is wanted whole.
        if console.why_lost() != os.strerror(errno.EPIPE):
            console.say(f"pyloss: error: cannot write to standard output: {console.why_lost()}")
    return code


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """SIGTERM in the block is a KeyboardInterrupt, so that what Ctrl-C saves is saved; gives the list that it is added to."""
    seen: list[int] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield seen  # a program that embeds this one handles it, or nobody may
        return

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: Sequence[str] | None, prog: str) -> int:
    log, handler = logging.getLogger("pyloss"), _Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    command = ""
    try:
        arguments = vars(build_parser(prog).parse_args(argv))
        command = arguments.pop("command")
        from pyloss.cli import commands

        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            return commands.COMMANDS[command](arguments)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt as interrupt:
        return _fail(interrupt, 130, str(interrupt) or "interrupted")
    except FloatingPointError as error:
        return _fail(error, 1, f"error: {error}")
    except BAD_INPUT as error:
        return _fail(error, 2, f"error: {_text(error, command)}")
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _text(error: BaseException, command: str) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{cut(os.fsdecode(error.filename), 500)}: {error.strerror}"
    if isinstance(error, MemoryError):
        options = {
            "train": "--batch-size or --max-seq-length, or --grad-checkpoint,",
            "eval": "--batch-size or --max-seq-length",
        }
        options["bench"] = options["train"]
        advice = f"; a smaller {options[command]} needs less" if command in options else ""
        return f"out of memory{advice}" + (f" ({error})" if str(error) else "")
    # values that were given may be of any length
    return cut(str(error), 3000) or type(error).__name__


def _warn(
    message: Warning | str,
    category: Any,
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Warnings as users of a command read them: without the place in the code."""
    console.say(f"pyloss: warning: {' '.join(str(message).split())}")


def _fail(error: BaseException, code: int, text: str) -> int:
    if os.environ.get("PYLOSS_DEBUG") == "1":
        import traceback

        console.say("".join(traceback.format_exception(error)).rstrip())
    console.say(f"pyloss: {' '.join(text.split())}")
    return code
