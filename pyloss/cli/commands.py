"""What the commands of the command line do; each takes its flags as a dict and gives the exit code."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import pyloss
import pyloss.random
from pyloss import exporting, models
from pyloss.checks.numbers import real, whole
from pyloss.errors import counted
from pyloss.io.console import lost, out, say
from pyloss.io.files import check_target, user_path
from pyloss.models.text.special import encode_text
from pyloss.optim import Optimizer, Schedule, WarmUp, build_optimizer, build_schedule
from pyloss.runtime import precision
from pyloss.tuner.callbacks import get_reporting_callbacks
from pyloss.tuner.data.batching import NoTargets
from pyloss.tuner.data.system_prompt import system_prompt_of
from pyloss.tuner.datasets import load_dataset, resolve_train_on
from pyloss.tuner.run import checkpoints as state
from pyloss.tuner.run.run_folder import ADAPTER_FILE, portable, read_config
from pyloss.tuner.run.settings import DEFAULT_MODEL, merge_config, resumed_settings

Flags = dict[str, Any]


def _flag(name: str) -> str:
    """A flag as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _optimizer(config: SimpleNamespace) -> Optimizer:
    rate: float | Schedule = config.learning_rate
    if config.lr_schedule:
        rate = build_schedule(config.lr_schedule)
    elif config.warmup:
        rate = WarmUp(config.learning_rate, config.warmup)
    return build_optimizer(config.optimizer, rate, config.optimizer_config.get(config.optimizer))


def train(flags: Flags) -> int:
    """`pyloss train`: trains and tests, or shows what would be trained on."""
    config = merge_config(flags, flags.get("config"))
    if config.train and config.resume:
        config = _resumed(config, flags)
    if not (config.train or config.test):
        raise ValueError("nothing to do: train and test are both false")
    if config.resume and config.resume_adapter_file:
        raise ValueError(
            "--resume continues a run as it was, --resume-adapter-file starts a new one: give one of them"
        )
    optimizer = _optimizer(config)
    model, tokenizer = models.load(config.model)
    train_set, valid_set, test_set = load_dataset(config, tokenizer)
    if config.preview:
        from pyloss.tuner.data.preview import preview

        data = train_set if config.train else test_set
        out(preview(data, tokenizer, config.preview, max_seq_length=config.max_seq_length))
        return 0
    if config.train:
        _train(config, model, optimizer, train_set, valid_set)
    else:
        from pyloss.tuner.utils import load_adapters

        load_adapters(model, config.adapter_path)
        say(f"testing {config.model} with the adapter in {config.adapter_path}; --train trains")
        _move(model, config.device)
    if config.test:
        _evaluate(config, model, test_set, "test")
    return 0


def _trained_on(config: SimpleNamespace) -> str:
    return resolve_train_on(config.train_on, config.mask_prompt)


def _resumed(config: SimpleNamespace, flags: Flags) -> SimpleNamespace:
    """The settings of --resume: those of the run in the folder where neither a flag nor the file says otherwise."""
    saved = read_config(user_path(config.adapter_path))
    settings = resumed_settings(saved) if "peft_type" not in saved else {}
    config = merge_config(flags, flags.get("config"), settings)
    before = SimpleNamespace(**{"mask_prompt": False, "train_on": None, **settings})
    if settings and _trained_on(config) != (trained := _trained_on(before)):
        raise ValueError(
            f"the run to resume in {config.adapter_path} trains on {trained!r} tokens, and its losses are not those of "
            f"{_trained_on(config)!r}; give the same (--train-on {trained}), or start a new run with --resume-adapter-file"
        )
    return config


def _move(model: Any, device: str | None) -> None:
    """To the device that was asked for."""
    if device:
        pyloss.to_device(model, device)


def _train(
    config: SimpleNamespace, model: Any, optimizer: Optimizer, train_set: Any, valid_set: Any
) -> None:
    from pyloss.tuner.trainer import TrainingArgs, train as run
    from pyloss.tuner.utils import add_adapters, unfreeze_layers

    folder = user_path(config.adapter_path)
    if folder.is_file():
        advice = "training writes a folder (--resume-adapter-file reads a file)"
        raise ValueError(f"--adapter-path {config.adapter_path} is a file: {advice}")
    pyloss.random.seed(config.seed)
    if config.fine_tune_type == "full":
        unfreeze_layers(model, config.num_layers, config.full_keys)
    else:
        add_adapters(model, config.fine_tune_type, config.num_layers, config.lora_parameters)
    if config.resume_adapter_file:
        file = _adapter_file(config.resume_adapter_file)
        state.restore_arrays(model.trainable_parameters(), _weights(file), str(file))
        say(f"starting from the adapter in {file}")
    _move(model, config.device)
    shared = [
        "batch_size",
        "iters",
        "val_batches",
        "steps_per_report",
        "steps_per_eval",
        "max_seq_length",
        "seed",
    ]
    shared += [
        "matmul_precision",
        "grad_checkpoint",
        "grad_accumulation_steps",
        "max_grad_norm",
        "loraplus_lr_ratio",
    ]
    shared += ["patience", "keep_best", "resume", "overwrite"]
    args = TrainingArgs(
        **{name: getattr(config, name) for name in shared},
        steps_per_save=config.save_every,
        adapter_file=folder / ADAPTER_FILE,
        adapter_config=vars(config) | (model.adapter_config or {}),
    )
    callback = get_reporting_callbacks(
        config.report_to, config.project_name, str(folder), vars(config)
    )
    run(model, optimizer, train_set, valid_set or None, args, training_callback=callback)


def _adapter_file(path: str) -> Path:
    """The file of --resume-adapter-file, which may be its folder."""
    place = user_path(path)
    file = place / ADAPTER_FILE if place.is_dir() else place
    if not file.is_file():
        found = f"the folder has no {ADAPTER_FILE}" if place.is_dir() else "no such file"
        raise ValueError(
            f"--resume-adapter-file {path}: {found}; give an {ADAPTER_FILE}, a numbered one, or their folder"
        )
    return file


def _weights(file: Path) -> dict[str, Any]:
    from pyloss.io.safetensors import read_safetensors

    return {name: tensor.array() for name, tensor in read_safetensors(file).tensors.items()}


def _evaluate(config: SimpleNamespace, model: Any, dataset: Any, split: str) -> None:
    from pyloss.tuner.run.evaluation import evaluate as measure

    _note_other_targets(config)
    with precision.matmul_precision(config.matmul_precision):
        try:
            loss = measure(
                model, dataset, config.batch_size, config.test_batches, config.max_seq_length
            )
        except NoTargets as error:
            raise NoTargets(f"the {split} data: {error}") from None
    perplexity = math.exp(loss) if loss < 700 else math.inf
    count = (
        len(dataset)
        if config.test_batches == -1
        else min(len(dataset), config.test_batches * config.batch_size)
    )
    out(f"loss {loss:.4f}, perplexity {perplexity:.4f}, {counted(count, 'sample')}")


def _note_other_targets(config: SimpleNamespace) -> None:
    """Say where a loss is not comparable with those that the adapter's run reported."""
    if config.adapter_path is None:
        return
    place = user_path(config.adapter_path)
    saved = read_config(place.parent if place.is_file() else place)
    trained = saved.get("train_on") or ("last" if saved.get("mask_prompt") else "all")
    if "mask_prompt" in saved and trained != (measured := _trained_on(config)):
        say(
            f"note: the adapter was trained on {trained!r} tokens, and this loss is that of {measured!r} (--train-on {trained})"
        )


def evaluate(flags: Flags) -> int:
    """`pyloss eval`: prints loss and perplexity."""
    split = flags.pop("split")
    config = merge_config(flags, flags.get("config"), {"adapter_path": None})
    config.train, config.test = split == "train", split == "test"
    say(
        f"model {config.model}, adapter {config.adapter_path or 'none'}, data {config.data or 'hf_dataset'}, split {split}"
    )
    model, tokenizer = models.load(config.model, adapter_path=config.adapter_path)
    found = dict(zip(("train", "valid", "test"), load_dataset(config, tokenizer), strict=True))
    if not found[split]:
        raise ValueError(f"no {split} data in {config.data!r}")
    _move(model, config.device)
    _evaluate(config, model, found[split], split)
    return 0


def _read_input() -> str:
    """All of standard input, UTF-8 whatever the locale is."""
    if sys.stdin is None:
        raise ValueError("--prompt - reads standard input, which is closed")
    try:
        raw = getattr(sys.stdin, "buffer", None)
        return str(sys.stdin.read() if raw is None else raw.read().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text (byte {error.start})") from None


def _utf8(flags: Flags, *names: str) -> None:
    """Read texts of the command line as UTF-8: a locale without it leaves escaped bytes in them."""

    def read(text: str) -> str:
        return (
            text
            if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
            else os.fsencode(text).decode()
        )

    for name in names:
        given = flags[name]
        try:
            if given:
                flags[name] = (
                    read(given) if isinstance(given, str) else [read(text) for text in given]
                )
        except UnicodeError:
            raise ValueError(f"{_flag(name)} is not UTF-8 text") from None


def _system_prompt(flags: Flags, model: Any) -> str | None:
    """The system prompt that was given, or else the one that the adapter was trained with, which is said."""
    if flags["no_system_prompt"] or flags["system_prompt"] is not None:
        return None if flags["no_system_prompt"] else str(flags["system_prompt"])
    prompt = system_prompt_of(getattr(model, "adapter_config", None))
    if prompt is not None:
        say(f"with the adapter's system prompt (--no-system-prompt leaves it out): {prompt}")
    return prompt


def _say_prompt(model: Any) -> None:
    """Files of whole models have no place for the system prompt of the adapter in them."""
    if (prompt := system_prompt_of(getattr(model, "adapter_config", None))) is not None:
        say(
            f"the adapter was trained with this system prompt, which has to be given to the model: {prompt}"
        )


def _prompt_ids(flags: Flags, tokenizer: Any, model: Any) -> list[int]:
    text = flags["prompt"].replace("\\n", "\n").replace("\\t", "\t")
    if text == "-":
        text = _read_input()
    options: Flags = {}
    if flags["chat_template_config"]:
        try:
            options = json.loads(flags["chat_template_config"])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--chat-template-config is {flags['chat_template_config']!r}: not JSON: {error}"
            ) from None
        if not isinstance(options, dict):
            raise ValueError(
                f"--chat-template-config is {flags['chat_template_config']!r}; a JSON object is needed"
            )
    if flags["ignore_chat_template"] or not tokenizer.chat_template:
        return encode_text(tokenizer, text + (flags["prefill_response"] or ""))
    messages = [{"role": "user", "content": text}]
    if (system := _system_prompt(flags, model)) is not None:
        messages.insert(0, {"role": "system", "content": system})
    options = {"add_generation_prompt": True} | options
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options) + (
        flags["prefill_response"] or ""
    )
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def generate(flags: Flags) -> int:
    """`pyloss generate`: prints the answer as it comes."""
    from pyloss.generation import stream_generate

    for name, least in (("max_tokens", 1), ("top_k", 0)) + (
        (("seed", 0),) if flags["seed"] is not None else ()
    ):
        whole(flags[name], _flag(name), least)
    for name, most in (("temp", None), ("top_p", 1), ("min_p", 1)):
        real(flags[name], _flag(name), 0, most)
    _utf8(
        flags,
        "prompt",
        "system_prompt",
        "prefill_response",
        "extra_eos_token",
        "chat_template_config",
    )
    if flags["no_system_prompt"] and flags["system_prompt"] is not None:
        raise ValueError(
            "--system-prompt and --no-system-prompt contradict each other: give one of them"
        )
    model, tokenizer = models.load(flags["model"], adapter_path=flags["adapter_path"])
    for token in flags["extra_eos_token"]:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"--extra-eos-token {token!r} is {len(ids)} tokens; one that is a single token is needed"
            )
        tokenizer.eos_token_ids.add(ids[0])
    _move(model, flags["device"])
    last = None
    for last in stream_generate(
        model,
        tokenizer,
        _prompt_ids(flags, tokenizer, model),
        max_tokens=flags["max_tokens"],
        temperature=flags["temp"],
        top_p=flags["top_p"],
        min_p=flags["min_p"],
        top_k=flags["top_k"],
        seed=flags["seed"],
    ):
        out(last.text, end="", flush=True)
        if lost():
            return 0  # nobody reads on; `main` says that the answer was lost
    out("")
    if flags["verbose"] and last is not None:
        speeds = (
            f"prompt {last.prompt_tps:.1f} tokens/s, generation {last.generation_tps:.1f} tokens/s"
        )
        say(f"[{speeds}, ended by {last.finish_reason}]")
    return 0


def _refuse_source(name: str, flags: Flags) -> None:
    """ValueError where the flag `name` says that the result goes where the model or the adapter is."""
    target = user_path(flags[name]).resolve()
    for what, source in (("model", flags["model"]), ("adapter", flags.get("adapter_path"))):
        place = None if source is None else user_path(source).resolve()
        # The adapter's folder is the adapter, also where one file of it is named.
        if place is not None and target in {
            place,
            *([place.parent] if what == "adapter" and place.is_file() else []),
        }:
            raise ValueError(
                f"{_flag(name)} {flags[name]} is the {what} itself: give another place"
            )


def fuse(flags: Flags) -> int:
    """`pyloss fuse`: writes a model with its adapter in its weights."""
    from pyloss.models.files.gguf_writer import refuse_model
    from pyloss.tuner.utils import fuse_adapters

    for name in ("upload_repo", "hf_path"):
        if flags[name]:
            raise ValueError(
                f"{_flag(name)} is not available: nothing is uploaded; --save-path writes a folder"
            )
    folder = user_path(flags["save_path"])
    check_target(folder, folder=True)
    _refuse_source("save_path", flags)
    path = folder / user_path(flags["gguf_path"])
    if flags["export_gguf"]:
        exporting.check_request(path, "gguf", type="f16")
    model, tokenizer = models.load(flags["model"], adapter_path=flags["adapter_path"])
    if flags["export_gguf"]:
        refuse_model(model, tokenizer)
    ways = "--dequantize, or `pyloss export --to mlx`, the adapter beside its base"
    kept = fuse_adapters(model, flags["dequantize"] or exporting.becomes_floats(model), ways)
    if kept and min(kept.values()) < 1:
        mean, least = max(sum(kept.values()) / len(kept), 0), min(kept, key=kept.__getitem__)
        say(
            f"storing the fused weights keeps {mean:.1%} of the adapter, {max(kept[least], 0):.1%} at worst ({least})"
        )
    model.save(folder, tokenizer, overwrite=flags["overwrite"])
    say(f"saved the fused model to {folder}")
    _say_prompt(model)
    if flags["export_gguf"]:
        exporting.export(model, path, "gguf", tokenizer, type="f16", overwrite=flags["overwrite"])
        say(f"saved the fused model to {path}")
    return 0


def export(flags: Flags) -> int:
    """`pyloss export`: writes a model or an adapter in another program's format."""
    adapter, to, output = flags["adapter_path"], flags["to"], flags["output"]
    if adapter is None and (flags["adapter_only"] or to in ("peft", "mlx")):
        raise ValueError(
            "--to peft, --to mlx and --adapter-only write an adapter: give its folder as --adapter-path"
        )
    options = {key: flags[key] for key in ("adapter_only", "type", "dequantize")}
    exporting.check_request(output, to, **options)
    _refuse_source("output", flags)
    model, tokenizer = models.load(flags["model"], adapter_path=adapter)
    # A configuration that goes wherever the adapter goes says no place of this machine, unless --name does.
    name = flags["name"] or (portable(flags["model"], "model") if to == "peft" else None)
    exporting.export(
        model, output, to, tokenizer, **options, name=name, overwrite=flags["overwrite"]
    )
    say(f"wrote {output}")
    if to in ("gguf", "hf"):
        _say_prompt(model)
    return 0


def convert(flags: Flags) -> int:
    """`pyloss convert`: writes a model as a Hugging Face folder."""
    from pyloss.models import conversion, saving

    kind, bits = flags["quantize"], flags["q_bits"]
    if kind and bits and kind != f"q{bits}":
        raise ValueError(
            f"--quantize {kind} and --q-bits {bits} say different things: give one of them"
        )
    if kind is None and (
        bits or flags["group_size"] or flags["single_quant"] or flags["loftq_rank"]
    ):
        raise ValueError(
            "--q-bits, --group-size, --single-quant and --loftq-rank belong to --quantize"
        )
    for name in ("loftq_rank", "loftq_rounds", "group_size"):
        if flags[name] is not None:
            whole(flags[name], _flag(name), 1)
    if kind is not None and flags["dequantize"]:
        raise ValueError("choose either --quantize or --dequantize")
    check_target(flags["output"], folder=True)
    _refuse_source("output", flags)
    model, tokenizer = models.load(flags["model"])
    if kind is not None:
        name = kind or f"q{bits or 4}"
        left = conversion.quantize_model(
            model, name, flags["group_size"], flags["dtype"], double=not flags["single_quant"]
        )
        for layer, reason in left.items():
            say(f"not quantised: {layer} ({reason})")
        if flags["loftq_rank"]:
            from pyloss.tuner.adapters.initial import loftq_quantize

            originals = dict(models.load_model(flags["model"]).named_modules())
            loftq_quantize(model, originals, flags["loftq_rank"], flags["loftq_rounds"])
    elif flags["dequantize"]:
        conversion.dequantize_model(model, flags["dtype"] or "float32")
    saving.save_model(model, flags["output"], tokenizer, flags["dtype"], flags["overwrite"])
    say(f"saved the model to {flags['output']}")
    return 0


def bench(flags: Flags) -> int:
    """`pyloss bench`: measures this machine, and prints each figure when it is known."""
    from pyloss import measuring
    from pyloss.models.synthetic import random_model
    from pyloss.tuner.run.plan import size_text

    for name in ("rank", "batch_size", "max_seq_length", "train_tokens"):
        whole(flags[name], _flag(name), 1)
    title = flags["model"] or DEFAULT_MODEL
    try:
        model = models.load_model(title)
    except FileNotFoundError:
        if flags["model"]:
            raise
        model, title = random_model(format="q4_1"), "random weights of SmolLM2-135M's shape"
    found = pyloss.info()
    out(
        f"pyloss {found['version']}: {found['isa']} (of {', '.join(found['isas'])}), {found['threads']} threads",
        flush=True,
    )
    weights: dict[str, Any] = measuring.typical_weights(model)
    batch, tokens = flags["batch_size"], flags["max_seq_length"]
    config, dora = {"rank": flags["rank"], "scale": 2.0}, flags["fine_tune_type"] == "dora"
    step = measuring.training_step(model, config, dora, flags["grad_checkpoint"])
    with precision.matmul_precision(flags["matmul_precision"]):
        # first: the others need memory of their own
        speed, peak = measuring.step_speed(step, model.vocab_size, batch, tokens)
    options = ", checkpointing" if flags["grad_checkpoint"] else ""
    options += ", products in bfloat16" if flags["matmul_precision"] == "bfloat16" else ""
    out(
        f"{'DoRA' if dora else 'LoRA'} step of {title}, rank {flags['rank']}, {batch} x {tokens} tokens{options}:"
    )
    out(f"  {speed:.0f} tokens/s, peak memory {size_text(peak)}")
    out(
        f"  {flags['train_tokens']:,} tokens take about {flags['train_tokens'] / speed / 60:.1f} minutes",
        flush=True,
    )
    out(f"memory: {measuring.memory_speed() / 1e9:.0f} GB/s")
    out(f"products of {batch * tokens} tokens with weights, forward and backward:")
    for format, weight in (
        {"f32": np.ones(next(iter(weights.values())).shape, np.float32)} | weights
    ).items():
        speeds = [f"{measuring.product_speed(weight, batch * tokens) / 1e9:.0f} GFLOP/s"]
        if precision.has_instructions():
            with precision.matmul_precision("bfloat16"):
                speeds.append(
                    f"{measuring.product_speed(weight, batch * tokens) / 1e9:.0f} as bfloat16"
                )
        out(f"  {format}, {weight.shape[1]} to {weight.shape[0]}: {', '.join(speeds)}", flush=True)
    return 0


def info(flags: Flags) -> int:
    """`pyloss info`: prints what is in use."""
    for name, value in pyloss.info().items():
        out(f"{name}: {value}")
        if name == "bfloat16":
            out(
                "  measured: with it, steps were 1.6 times as fast on an AMD EPYC (Zen 4), 0.6 times on an Intel Xeon with"
            )
            out("  amx_bf16; `pyloss bench` compares both on this machine")
    return 0


COMMANDS: dict[str, Callable[[Flags], int]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "fuse": fuse,
    "export": export,
    "convert": convert,
    "bench": bench,
    "info": info,
}
