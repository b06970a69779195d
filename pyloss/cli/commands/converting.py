"""The commands that write models: `pyloss fuse`, `export` and `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyloss import exporting, models
from pyloss.checks.numbers import whole
from pyloss.cli.commands.shared import (
    Flags,
    choose_model,
    flag_text,
    refuse_source,
    say_system_prompt,
)
from pyloss.cli.publishing import check_publishing, publish
from pyloss.io.console import say
from pyloss.io.files import check_target, user_path
from pyloss.tuner.run.run_folder import portable


def fuse(flags: Flags) -> int:
    """`pyloss fuse`: merges an adapter into its model and writes that."""
    from pyloss.models import conversion
    from pyloss.models.fusing import mean_kept
    from pyloss.tuner.adapters.adapter import adapter_modules
    from pyloss.tuner.utils import fuse_adapters

    check_publishing(flags)
    choose_model(flags)
    folder = user_path(flags["save_path"])
    check_target(folder, folder=True)
    refuse_source("save_path", flags)
    kind = flags["export_gguf"]
    path = folder / user_path(flags["gguf_path"] or f"ggml-model-{kind}.gguf")
    if kind:
        exporting.check_request(path, "gguf", type=kind)
    elif flags["gguf_path"]:
        raise ValueError("--gguf-path names the file of --export-gguf, which is not given")
    model, tokenizer = models.load(flags["model"], adapter_path=flags["adapter_path"])
    adapters = adapter_modules(model) if kind else {}
    ways = "--dequantize, or `pyloss export --to mlx`, the adapter beside its base"
    kept = fuse_adapters(model, flags["dequantize"] or exporting.becomes_floats(model), ways)
    if kind:
        # With the adapter, so that a type that would lose it is refused before anything is written.
        fused = {name: each for name, each in model.named_modules() if name in adapters}
        _put(model, adapters)
        exporting.export(model, path, "gguf", tokenizer, type=kind, overwrite=flags["overwrite"])
        say(f"saved the fused model to {path}")
        _put(model, fused)
    if kept and min(kept.values()) < 1:
        least = min(kept, key=kept.__getitem__)
        say(
            f"storing the fused weights keeps {mean_kept(kept):.1%} of the adapter, "
            f"{max(kept[least], 0):.1%} at worst ({least})"
        )
    if flags["dequantize"]:
        conversion.dequantize_model(model, "float32")
    model.save(folder, tokenizer, overwrite=flags["overwrite"])
    say(f"saved the fused model to {folder}")
    say_system_prompt(model)
    publish(flags, folder, base=flags["hf_path"], adapter=flags["adapter_path"])
    return 0


def _put(model: Any, modules: Mapping[str, Any]) -> None:
    for name, module in modules.items():
        model.set_module(name, module)


def export(flags: Flags) -> int:
    """`pyloss export`: writes a model or an adapter in another program's format."""
    adapter, to, output = flags["adapter_path"], flags["to"], flags["output"]
    if adapter is None and (flags["adapter_only"] or to in ("peft", "mlx")):
        raise ValueError(
            "--to peft, --to mlx and --adapter-only write an adapter: "
            "give its folder as --adapter-path"
        )
    choose_model(flags)
    names = (
        *("adapter_only", "type", "dequantize", "split_max_size", "importance_data"),
        *("dtype", "shard_size"),
    )
    options = {key: flags[key] for key in names}
    if flags["push"] is not None and to != "hf":
        raise ValueError(f"--push uploads what --to hf writes, and --to is {to}")
    check_publishing(flags)
    exporting.check_request(output, to, **options)
    refuse_source("output", flags)
    model, tokenizer = models.load(flags["model"], adapter_path=adapter)
    # The adapter's configuration names no path of this machine, unless --name does.
    name = flags["name"] or (portable(flags["model"], "model") if to == "peft" else None)
    written = exporting.export(
        model, output, to, tokenizer, **options, name=name, overwrite=flags["overwrite"]
    )
    say(f"wrote {output if written == user_path(output) else written}")
    if to == "ollama":
        name = user_path(output).name
        say(f"next: ollama create {name} -f {user_path(output) / 'Modelfile'}")
    if to in ("gguf", "hf"):
        say_system_prompt(model)
    if to == "hf":
        publish(flags, user_path(output), adapter=adapter)
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
            whole(flags[name], flag_text(name), 1)
    if kind is not None and flags["dequantize"]:
        raise ValueError("choose either --quantize or --dequantize")
    check_target(flags["output"], folder=True)
    refuse_source("output", flags)
    model, tokenizer = models.load(flags["model"])
    if kind is not None:
        name = kind or f"q{bits or 4}"
        left = conversion.quantize_model(
            model, name, flags["group_size"], flags["dtype"], double=not flags["single_quant"]
        )
        if left:
            say(f"not quantized: {conversion.left_text(left)}")
        if flags["loftq_rank"]:
            from pyloss.tuner.adapters.initial import loftq_quantize

            originals = dict(models.load_model(flags["model"]).named_modules())
            loftq_quantize(model, originals, flags["loftq_rank"], flags["loftq_rounds"])
    elif flags["dequantize"]:
        conversion.dequantize_model(model, flags["dtype"] or "float32")
    saving.save_model(model, flags["output"], tokenizer, flags["dtype"], flags["overwrite"])
    say(f"saved the model to {flags['output']}")
    return 0


def prune(flags: Flags) -> int:
    """`pyloss prune`: writes a model with some of its layers as a Hugging Face folder."""
    from pyloss.models import pruning, saving

    if (flags["layers"] is None) == (flags["keep"] is None):
        raise ValueError("give either --layers, such as 0-19,28-29, or --keep and their number")
    flags["model"] = flags.pop("source") or flags["model"]
    listed = None if flags["layers"] is None else pruning.parse_layers(flags["layers"])
    check_target(flags["output"], folder=True)
    refuse_source("output", flags)
    model, tokenizer = models.load(flags["model"])
    count = len(model.layers)
    layers = pruning.even_layers(count, flags["keep"]) if listed is None else listed
    pruning.prune_model(model, layers)
    saving.save_model(model, flags["output"], tokenizer, flags["dtype"], flags["overwrite"])
    kept = ", ".join(map(str, layers))
    say(f"kept layers {kept} of {count}; saved the model to {flags['output']}")
    return 0
