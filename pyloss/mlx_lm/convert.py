"""mlx_lm.convert: writes a model in other types, quantized or dequantized."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pyloss.io.console import out
from pyloss.io.files import user_path
from pyloss.mlx_lm.command import as_command
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.utils import dequantize_model, load, quantized, write
from pyloss.models.saving import model_dtype

__all__ = [
    "MODEL_CONVERSION_DTYPES",
    "QUANT_RECIPES",
    "configure_parser",
    "convert",
    "main",
    "mixed_quant_predicate_builder",
]

__getattr__ = absent(__name__)

#: bits of most layers and of the important ones, by recipe
_RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}

QUANT_RECIPES = list(_RECIPES)

MODEL_CONVERSION_DTYPES = ["float16", "bfloat16", "float32"]


def mixed_quant_predicate_builder(
    recipe: str, model: Any, group_size: int = 64
) -> Callable[[str, Any], bool | dict[str, Any]]:
    """A predicate that gives important layers more bits, as a recipe of `QUANT_RECIPES` says.

    These are the head, and v_proj and down_proj of the first and last eighth of the layers and of
    every third one between. Raises ValueError for an unknown recipe.
    """
    if recipe not in _RECIPES:
        raise ValueError(f"Invalid quant recipe {recipe}; there are {', '.join(_RECIPES)}")
    low, high = _RECIPES[recipe]
    paths = [path for path, _ in model.named_modules() if "down_proj" in path]
    if not paths:
        raise ValueError("Model does not have expected keys for mixed quant.")
    place = next((i for i, part in enumerate(paths[0].split(".")) if part.isdigit()), 0)
    count = len(model.layers)

    def predicate(path: str, module: Any) -> dict[str, Any]:
        parts = path.split(".")
        index = int(parts[place]) if len(parts) > place else 0
        important = index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
        names = ("v_proj", "v_a_proj", "v_b_proj", "down_proj")
        more = "lm_head" in path or (important and any(name in path for name in names))
        return {"group_size": group_size, "bits": high if more else low, "mode": "affine"}

    return predicate


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: Any = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the model `hf_path` into the new folder `mlx_path`.

    Floats take the type `dtype`, by default that of the model's configuration. `quant_predicate`
    is a function as of `utils.quantize_model`, or a recipe of `QUANT_RECIPES`.

    Raises ValueError for a folder that exists, for `quantize` with `dequantize`, and for
    `upload_repo`.
    """
    place = user_path(mlx_path)
    if place.exists():
        raise ValueError(
            f"Cannot save to the path {place} as it already exists."
            " Please delete the file/directory or specify a new path to save to."
        )
    if upload_repo is not None:
        raise ValueError(
            "upload_repo is not supported: `pyloss convert --push owner/name` writes and uploads"
        )
    if quantize and dequantize:
        raise ValueError("Choose either quantize or dequantize, not both.")
    if isinstance(quant_predicate, str) and q_mode != "affine":
        raise ValueError("Quant predicates only support 'affine' quantization.")
    out("[INFO] Loading")
    model, tokenizer, config = load(hf_path, return_config=True, revision=revision)
    if isinstance(quant_predicate, str):
        size = q_group_size or 64
        quant_predicate = mixed_quant_predicate_builder(quant_predicate, model, size)
    wanted = dtype or config.get("torch_dtype") or config.get("dtype")
    wanted = wanted if wanted in MODEL_CONVERSION_DTYPES else None
    if wanted is not None:
        out(f"[INFO] Using dtype: {wanted}")
    if quantize:
        out("[INFO] Quantizing")
        given = (config, q_group_size, q_bits, q_mode, False, quant_predicate)
        model, config = quantized(model, *given, wanted or model_dtype(model))
    if dequantize:
        out("[INFO] Dequantizing")
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        model = dequantize_model(model)
    write(place, hf_path, model, tokenizer, config, wanted)


def configure_parser() -> argparse.ArgumentParser:
    """The parser of mlx_lm.convert's flags."""
    parser = argparse.ArgumentParser(description="Convert Hugging Face model to MLX format")
    add = parser.add_argument
    add("--hf-path", "--model", type=str, help="the model: its folder, GGUF file or name")
    add("--mlx-path", type=str, default="mlx_model", help="the folder to write")
    add("-q", "--quantize", action="store_true", help="write a quantized model")
    add("--q-group-size", type=int, default=None, help="numbers per group (default 64)")
    add("--q-bits", type=int, default=None, help="bits of a number (default 4)")
    modes = ["affine", "mxfp4", "nvfp4", "mxfp8"]
    add("--q-mode", type=str, default="affine", choices=modes, help="affine alone is supported")
    add("--quant-predicate", type=str, choices=QUANT_RECIPES, required=False, help="a recipe")
    text = "type of the floats; by default the model's"
    add("--dtype", type=str, choices=MODEL_CONVERSION_DTYPES, default=None, help=text)
    add("--upload-repo", type=str, default=None, help="not supported: pyloss convert --push")
    add("-d", "--dequantize", action="store_true", default=False, help="write floats")
    text = "no effect: code of models is never run"
    add("--trust-remote-code", action="store_true", default=False, help=text)
    return parser


def main() -> None:
    """The command `python -m pyloss.mlx_lm.convert`."""
    args = vars(configure_parser().parse_args())
    if not args["hf_path"]:
        raise ValueError("--hf-path names the model, and is not given")
    convert(**args)


if __name__ == "__main__":
    as_command(main)
