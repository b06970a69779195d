"""Flags of the commands that write models: `pyloss fuse`, `export` and `convert`."""

from __future__ import annotations

import argparse
from typing import Any

from pyloss.cli.parser import (
    OVERWRITE,
    command,
    dtype_flag,
    group_size_flag,
    ignored_flag,
    model_flags,
    push_flags,
    whole,
)


def fuse_parser(commands: Any) -> None:
    parser = command(
        commands,
        "fuse",
        text="merge an adapter into its model",
        description="Write a model with an adapter merged into its weights.",
        epilog="example:\n  pyloss fuse --adapter-path adapters --save-path fused_model",
    )
    add = parser.add_argument
    model_flags(add, adapter="folder of the adapter (default: adapters)", adapter_path="adapters")
    add("--save-path", default="fused_model", help="folder to write (default: fused_model)")
    add("--overwrite", action="store_true", help=OVERWRITE)
    add(
        "--dequantize",
        "--de-quantize",
        action="store_true",
        help="store all layers in float32, which keeps the whole adapter",
    )
    add(
        "--export-gguf",
        nargs="?",
        const="f16",
        metavar="TYPE",
        help="also write a GGUF file, in float16 or in a type of `pyloss export`, such as q4_k_m",
    )
    add(
        "--gguf-path",
        metavar="FILE",
        help="name of the GGUF file (default: ggml-model-TYPE.gguf)",
    )
    push_flags(add, "--upload-repo")
    add(
        "--hf-path",
        metavar="OWNER/NAME",
        help="name of the base on the hub, for the model card (default: --model)",
    )
    ignored_flag(add)


def export_parser(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        usage="--to FORMAT --output PATH [options]",
        text="write a model or an adapter for another program",
        description="Write a model, with or without an adapter merged into it, or an adapter\n"
        "alone, in another program's format.",
        epilog="""examples:
  pyloss export --adapter-path adapters --to peft --output peft_adapter
                              the adapter for PEFT and transformers; --to mlx for mlx-lm
  pyloss export --adapter-path adapters --to gguf --dequantize --type q8_0 --output model.gguf
                              model and adapter as one file for llama.cpp
  pyloss export --adapter-path adapters --to gguf --adapter-only --output lora.gguf
                              the adapter alone, for llama.cpp's --lora
  pyloss export --model some_folder --to gguf --type q4_k_m --output model.gguf
                              a model converted
  pyloss export --adapter-path adapters --to ollama --output tuned
                              for Ollama: then `ollama create tuned -f tuned/Modelfile`""",
    )
    add = parser.add_argument
    model_flags(add, adapter="folder of an adapter, in mlx-lm's or PEFT's layout (default: none)")
    add(
        "--to",
        required=True,
        choices=("peft", "mlx", "gguf", "hf", "ollama"),
        help="format to write",
    )
    add("--output", required=True, metavar="PATH", help="file to write for gguf, else a folder")
    add("--overwrite", action="store_true", help=OVERWRITE)
    add(
        "--type",
        help="gguf, ollama: store matrices as f32, f16, bf16, q8_0, q5_0, q5_1, q4_0 or q4_1, or "
        "as a mixture: q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_l, q3_k_m, q3_k_s, q2_k, q2_k_s, "
        "iq4_nl or iq4_xs (default: as they are; ollama: q4_k_m)",
    )
    add(
        "--importance-data",
        metavar="FILE",
        help="with a mixture as type: text or records (as --data) that say which columns of the "
        "matrices matter",
    )
    add(
        "--split-max-size",
        metavar="SIZE",
        help="gguf: split a larger model into files of at most 2G, 500M, ... "
        "(NAME-00001-of-00003.gguf and so on)",
    )
    dtype_flag(add, "hf: type of all floats (default: their own)")
    add(
        "--shard-size",
        metavar="SIZE",
        help="hf: split a larger model into files of at most 2GB, ...",
    )
    add("--adapter-only", action="store_true", help="gguf: write the adapter alone")
    push_flags(add)
    add(
        "--dequantize",
        "--de-quantize",
        action="store_true",
        help="store fused layers as floats, which keeps the whole adapter",
    )
    add(
        "--name",
        help="name of the model in the file, or of the base in PEFT's configuration "
        "(default: --model)",
    )


def convert_parser(commands: Any) -> None:
    parser = command(
        commands,
        "convert",
        usage="--output FOLDER [options]",
        text="write a model as a Hugging Face folder, quantized or not",
        description="Write a model as a Hugging Face folder. Flags of mlx_lm.convert are accepted.",
        epilog="""examples:
  pyloss convert --model some_folder --quantize q4 --output quantized
                              4 bits in groups of 64, as mlx-lm reads them
  pyloss convert --model some_folder --quantize nf4 --output quantized
                              QLoRA's NF4, as transformers reads it with bitsandbytes
  pyloss convert --model model.gguf --dtype bfloat16 --dequantize --output floats
                              a GGUF file as a plain folder""",
    )
    add = parser.add_argument
    model_flags(add, "--hf-path")
    add("--output", "--mlx-path", required=True, metavar="FOLDER", help="folder to write")
    add("--overwrite", action="store_true", help=OVERWRITE)
    text = (
        "q2, q3, q4, q5, q6 or q8 (mlx's layout) or nf4 (bitsandbytes'); "
        "without a value q4, or the bits of --q-bits"
    )
    add("-q", "--quantize", nargs="?", const="", metavar="KIND", help=text)
    group_size_flag(add, "--q-group-size")
    add("--q-bits", type=whole, metavar="N", help="same as --quantize qN")
    add("--q-mode", default="affine", choices=("affine",), help=argparse.SUPPRESS)
    add("--single-quant", action="store_true", help="nf4: do not quantize the scales")
    add(
        "--loftq-rank",
        type=whole,
        metavar="N",
        help="quantize for adapters of this rank that begin with --init loftq",
    )
    add(
        "--loftq-rounds",
        type=whole,
        default=4,
        metavar="N",
        help="for --loftq-rank: number of rounds (default: 4)",
    )
    dtype_flag(add, "type of the tensors that are not quantized (default: the model's)")
    add(
        "-d",
        "--dequantize",
        action="store_true",
        help="write a quantized model as floats",
    )
    ignored_flag(add)


def prune_parser(commands: Any) -> None:
    parser = command(
        commands,
        "prune",
        usage="[MODEL] (--layers LIST | --keep N) --output FOLDER [options]",
        text="write a shallower model: some of a model's layers",
        description="Write a Hugging Face folder with some of a model's decoder layers: a student\n"
        "that starts from its teacher. Its answers are poor until it is trained (pyloss distill).",
        epilog="""examples:
  pyloss prune --keep 12 --output student
                              12 layers of the embedded small model, at even distances
  pyloss prune some_folder --layers 0-19,28-29 --output student
                              the layers as listed""",
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="MODEL", help="the model, as --model")
    model_flags(add)
    add("--layers", metavar="LIST", help="layers to keep: numbers and ranges, from 0")
    add("--keep", type=whole, metavar="N", help="number of layers to keep, at even distances")
    add("--output", required=True, metavar="FOLDER", help="folder to write")
    add("--overwrite", action="store_true", help=OVERWRITE)
    dtype_flag(add, "type of the tensors that are not quantized (default: the model's)")
