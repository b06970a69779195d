"""mlx_lm.fuse: merges an adapter into its model and writes that."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyloss import exporting
from pyloss.io.console import out
from pyloss.io.files import check_target
from pyloss.mlx_lm.command import as_command
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.utils import dequantize_model, load, save
from pyloss.tuner.utils import fuse_adapters

__all__ = ["main", "parse_arguments"]

__getattr__ = absent(__name__)

#: what keeps an adapter that the base's format would lose
_WAYS = "--dequantize, or `pyloss export --to mlx`, the adapter beside its base"


def parse_arguments() -> argparse.Namespace:
    """The flags of mlx_lm.fuse, from the command line."""
    parser = argparse.ArgumentParser(description="Fuse fine-tuned adapters into the base model.")
    add = parser.add_argument
    add("--model", default="mlx_model", help="the model: its folder, GGUF file or name")
    add("--save-path", default="fused_model", help="the folder to write")
    add("--adapter-path", type=str, default="adapters", help="folder of the adapter")
    add("--upload-repo", type=str, default=None, help="not supported: pyloss fuse --push uploads")
    add("--dequantize", action="store_true", help="write floats")
    add("--export-gguf", action="store_true", help="write a GGUF file, too")
    name = "ggml-model-f16.gguf"
    add("--gguf-path", type=str, default=name, help=f"its name in the folder (default {name})")
    text = "no effect: code of models is never run"
    add("--trust-remote-code", action="store_true", help=text)
    return parser.parse_args()


def main() -> None:
    """The command `python -m pyloss.mlx_lm.fuse`."""
    out("Loading pretrained model")
    args = parse_arguments()
    if args.upload_repo is not None:
        raise ValueError(
            "--upload-repo is not supported: `pyloss fuse --push owner/name` writes and uploads"
        )
    folder = Path(args.save_path)
    check_target(folder, folder=True)
    model, tokenizer, config = load(args.model, adapter_path=args.adapter_path, return_config=True)
    floats = args.dequantize or exporting.becomes_floats(model)
    fuse_adapters(model, floats, _WAYS)
    if args.dequantize:
        out("Dequantizing model")
        model = dequantize_model(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    save(folder, args.model, model, tokenizer, config, donate_model=False)
    if args.export_gguf:
        # As mlx.core.save_gguf, which adds the ending.
        ending = "" if args.gguf_path.endswith(".gguf") else ".gguf"
        path = folder / f"{args.gguf_path}{ending}"
        exporting.export(model, path, "gguf", tokenizer.plain, type="f16")


if __name__ == "__main__":
    as_command(main)
