"""The public names of MLX's modules beside pyloss's: same, different, or refused by a sentence.

`python tests/parity/mlx_names.py` writes the tables of docs/coming_from_mlx.md;
test_mlx_names_parity.py checks that they are as the installed MLX has them.
"""

from __future__ import annotations

import importlib
import inspect
import types
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "coming_from_mlx.md"
BEGIN, END = "<!-- names of MLX -->", "<!-- end of the names -->"

#: MLX's modules by the names in `REFUSED`.
MODULES = {
    "core": "core",
    "random": "core.random",
    "fast": "core.fast",
    "linalg": "core.linalg",
    "metal": "core.metal",
    "distributed": "core.distributed",
    "nn": "nn",
    "losses": "nn.losses",
    "init": "nn.init",
    "optimizers": "optimizers",
    "utils": "utils",
}

_AT_ONCE = "does nothing, or returns what it got: everything is computed at once"
_FACADE = "the processor, whatever is asked for"
_OWN_DRAWS = "other random numbers for the same seed"
_NO_GRADIENT = "without a gradient: TypeError where one would be lost"
_AFFINE = '`mode="affine"` alone'
_FLOAT32 = "computed in float32 for short floats, whose type the result has"
_STATE = "moments are float32, and a parameter keeps its type whatever the gradient's is"

DIFFERENCES: dict[str, dict[str, str]] = {
    "core": {
        "array": "ndarrays and pyloss's Tensors are instances too; an index outside raises "
        "IndexError; NumPy reads it as a copy",
        "Dtype": "NumPy's `dtype`: `x.dtype.itemsize` for `size`",
        "bfloat16": "ml_dtypes' bfloat16; matrices of it are multiplied in float32",
        "DtypeCategory": "its types are in `types`",
        "finfo": "limits are Python's numbers",
        **dict.fromkeys(
            ("eval", "async_eval", "compile", "disable_compile", "enable_compile", "synchronize",
             "clear_cache", "clear_streams", "set_cache_limit", "set_memory_limit",
             "set_wired_limit"), _AT_ONCE),
        **dict.fromkeys(
            ("Device", "DeviceType", "cpu", "gpu", "default_device", "set_default_device",
             "device_count", "device_info", "is_available", "Stream", "StreamContext", "stream",
             "default_stream", "set_default_stream", "new_stream"), _FACADE),
        **dict.fromkeys(
            ("get_peak_memory", "reset_peak_memory"), "of the process, by the system"),
        "get_memory_limit": "the machine's memory",
        **dict.fromkeys(
            ("cumprod", "cumulative_prod", "cummax", "cummin", "logcumsumexp", "median", "view",
             "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_invert", "left_shift",
             "right_shift", "bitwise_left_shift", "bitwise_right_shift", "quantize",
             "dequantize"), _NO_GRADIENT),
        "quantized_matmul": f"{_AFFINE}; the gradient is that of x",
        **dict.fromkeys(("argpartition", "partition", "topk"), "in ascending order"),
        "sign": "no gradient, as in MLX; constants are plain",
        "conv1d": "numbers for stride, padding and dilation",
        "load": "reads safetensors, npz and npy; GGUF files are read by `pyloss.load`",
        "save": "bfloat16 raises TypeError: `save_safetensors` writes it",
        "savez": "bfloat16 raises TypeError: `save_safetensors` writes it",
        "savez_compressed": "bfloat16 raises TypeError: `save_safetensors` writes it",
        "custom_function": "`vjp` alone; the function cannot use recorded values that are no "
        "arguments",
        "grad": "no gradients of gradients",
        "value_and_grad": "no gradients of gradients",
        "full": "its gradient is the sum over the copies",
        "array_equal": "an array of one bool, as in MLX",
        "imag": "complex numbers have no gradient",
        "real": "complex numbers have no gradient",
        "complex64": "complex numbers have no gradient",
    },
    "random": {
        **dict.fromkeys(
            ("bernoulli", "categorical", "gumbel", "laplace", "normal", "permutation", "randint",
             "truncated_normal", "uniform", "split", "key"), _OWN_DRAWS),
        "seed": "seeds `pyloss.random`",
    },
    "fast": {
        "cross_entropy": "a class of -100 gives 0, others outside raise ValueError",
        "scaled_dot_product_attention": "no `sinks`",
        **dict.fromkeys(("rms_norm", "layer_norm", "rope"), _FLOAT32),
    },
    "linalg": dict.fromkeys(
        ("inv", "pinv", "svd", "qr", "eigh", "eigvalsh", "cholesky", "solve", "det", "slogdet"),
        _NO_GRADIENT,
    ),
    "metal": {
        "is_available": "False",
        **dict.fromkeys(("clear_cache", "set_cache_limit", "set_memory_limit", "set_wired_limit"),
                        _AT_ONCE),
        **dict.fromkeys(("get_peak_memory", "reset_peak_memory"), "of the process, by the system"),
        "device_info": _FACADE,
    },
    "distributed": {
        "init": "by MPI: `backend` is any or mpi",
        "Group": "pyloss's group",
        "is_available": "whether mpi4py is installed",
        "all_sum": "in the order of the ranks",
    },
    "nn": {
        "Module": "a module of pyloss: no dict, but asked like one; names in its own order",
        **dict.fromkeys(("QuantizedLinear", "QuantizedEmbedding", "quantize"),
                        f"{_AFFINE}; scales and biases are never trained"),
        **dict.fromkeys(("Dropout", "Dropout2d", "Dropout3d"), _OWN_DRAWS),
        "value_and_grad": "for a model without trained parameters too",
        "Conv1d": "numbers for stride, padding and dilation",
    },
    "losses": {"cross_entropy": "a class of -100 gives 0, others outside raise ValueError"},
    "init": dict.fromkeys(
        ("normal", "uniform", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform",
         "sparse", "orthogonal"), _OWN_DRAWS),
    "optimizers": {
        **dict.fromkeys(("SGD", "Adam", "AdamW", "Lion", "Muon"), _STATE),
        "Optimizer": "`update` sets arrays of the model; a module of pyloss has flat names",
        "Adafactor": "MLX's, which differs from `pyloss.optim.Adafactor`, torch's",
    },
    "utils": {},
}  # fmt: skip


def module(library: str, name: str) -> Any:
    """A module of MLX, or pyloss's for it: `library` is "mlx" or "pyloss.mlx"."""
    package, *parts = MODULES[name].split(".")
    found = importlib.import_module(f"{library}.{package}")
    for part in parts:
        found = getattr(found, part)
    return found


def public(name: str) -> list[str]:
    """The names that MLX's module offers, without modules and what it imports itself."""
    theirs = module("mlx", name)
    found = []
    for key in dir(theirs):
        value = getattr(theirs, key)
        home = getattr(value, "__module__", None)
        imported = isinstance(value, types.ModuleType) or (
            name not in ("core", "random", "fast", "linalg", "metal", "distributed")
            and (home is None or not str(home).startswith("mlx") or home == "mlx.core")
        )
        if not key.startswith("_") and (not imported or key in ("fft", "cuda")):
            found.append(key)
    own = {"utils": "mlx.utils", "losses": "mlx.nn.losses", "init": "mlx.nn.init"}.get(name)
    if own:
        found = [key for key in found if getattr(theirs, key).__module__ == own]
    if name == "optimizers":
        found = [k for k in found if getattr(theirs, k).__module__.startswith("mlx.optimizers")]
    return found


def status(name: str, key: str) -> tuple[str, str]:
    """("same", ""), ("different", how), ("refused", the nearest) or ("missing", "")."""
    from pyloss.mlx.core.refused import REFUSED

    if hasattr(module("pyloss.mlx", name), key):
        text = DIFFERENCES[name].get(key, "")
        return ("different", text) if text else ("same", "")
    nearest = REFUSED[name].get(key)
    return ("refused", nearest) if nearest else ("missing", "")


def tables() -> str:
    """The tables of the page."""
    lines = [BEGIN, ""]
    for name in MODULES:
        rows: dict[str, dict[str, list[str]]] = {"same": {}, "different": {}, "refused": {}}
        for key in public(name):
            kind, text = status(name, key)
            rows[kind].setdefault(text, []).append(f"`{key}`")
        lines += [f"#### mlx.{MODULES[name]}", "", "| names | |", "| --- | --- |"]
        for kind in rows:
            for text, keys in rows[kind].items():
                said = {"same": "same", "different": text, "refused": f"not here: {text}"}[kind]
                lines.append(f"| {', '.join(keys)} | {said} |")
        lines.append("")
    return "\n".join([*lines, END])


def parameters(function: Any) -> list[tuple[str, Any]] | None:
    """The names and defaults of a Python function's or class's parameters."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    return [(p.name, plain(p.default)) for p in found if p.name != "self"]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + tables() + after, encoding="utf-8")
