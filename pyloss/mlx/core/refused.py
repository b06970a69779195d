"""Names of MLX that are not here: an AttributeError with one sentence that names the nearest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pyloss.errors import nearest

_TRAIN = "pyloss.mlx is for training scripts"

#: Why a name is not here and what is nearest, by the module of MLX.
REFUSED: dict[str, dict[str, str]] = {
    "core": {
        "vmap": "call the function on arrays with one more axis, or stack its results",
        "jvp": "mx.vjp and mx.grad give gradients",
        "export_function": "mx.save_safetensors stores arrays",
        "import_function": "mx.load reads arrays",
        "exporter": "mx.save_safetensors stores arrays",
        "export_to_dot": "print(model) shows a module's tree",
        "FunctionExporter": "mx.save_safetensors stores arrays",
        "fft": "numpy.fft computes transforms of constants",
        "save_gguf": "pyloss.export writes GGUF files of models",
        "qqmm": "mx.quantized_matmul multiplies by quantized weights",
        "gather_qmm": "pyloss.nn.QuantizedSwitchLinear has quantized experts",
        "gather_qqmm": "pyloss.nn.QuantizedSwitchLinear has quantized experts",
        "gather_mm": "pyloss.nn.SwitchLinear has experts; mx.take and mx.matmul do the same",
        "segmented_mm": "mx.matmul of slices computes the same",
        "block_masked_mm": "mx.matmul of masked matrices computes the same",
        "from_fp8": "mx.dequantize reads affine groups",
        "to_fp8": "mx.quantize makes affine groups",
        "hadamard_transform": "mx.matmul with a Hadamard matrix computes the same",
        "conv2d": "mx.conv1d is the convolution here",
        "conv3d": "mx.conv1d is the convolution here",
        "conv_general": "mx.conv1d is the convolution here",
        "conv_transpose1d": "mx.conv1d is the convolution here",
        "conv_transpose2d": "mx.conv1d is the convolution here",
        "conv_transpose3d": "mx.conv1d is the convolution here",
        "convolve": "mx.conv1d is the convolution here",
        "einsum_path": "mx.einsum chooses its order itself",
        "erfinv": "mx.erf and mx.random.normal are here",
        "matrix_norm": "mx.linalg.norm computes norms",
        "result_type": "x.dtype of a computed array says it",
        "can_cast": "x.astype(dtype) casts",
        "isdtype": "mx.issubdtype compares types",
        "depends": "everything is computed at once here, so mx.eval suffices",
        "ArrayLike": "mx.array takes what numpy.asarray takes",
        "ArrayIterator": "iter(x) iterates over an array",
        "PrintOptions": "numpy.printoptions changes how arrays are printed",
        "printoptions": "numpy.printoptions changes how arrays are printed",
        "set_printoptions": "numpy.set_printoptions changes how arrays are printed",
        "get_printoptions": "numpy.get_printoptions says how arrays are printed",
        "new_thread_local_stream": "mx.new_stream gives the one stream there is",
        "new_thread_unsafe_stream": "mx.new_stream gives the one stream there is",
        "ThreadLocalStream": "mx.Stream is the one stream there is",
    },
    "fast": {
        "metal_kernel": "mx.custom_function takes a gradient written by hand",
        "cuda_kernel": "mx.custom_function takes a gradient written by hand",
        "precompiled_cuda_kernel": "mx.custom_function takes a gradient written by hand",
        "gated_delta_update": "pyloss.ops.delta_rule computes this recurrence",
    },
    "linalg": {
        "cholesky_inv": "mx.linalg.inv inverts matrices",
        "tri_inv": "mx.linalg.inv inverts matrices",
        "cross": "mx.multiply of rolled vectors computes it",
        "eig": "mx.linalg.eigh has the eigenvalues of symmetric matrices",
        "eigvals": "mx.linalg.eigvalsh has the eigenvalues of symmetric matrices",
        "lu": "mx.linalg.solve and mx.linalg.qr are here",
        "lu_factor": "mx.linalg.solve and mx.linalg.qr are here",
        "solve_triangular": "mx.linalg.solve solves equations",
    },
    "random": {
        "multivariate_normal": "mx.random.normal and a matrix compute the same",
    },
    "metal": {
        "start_capture": "pyloss's PYLOSS_PROFILE=1 prints where time goes",
        "stop_capture": "pyloss's PYLOSS_PROFILE=1 prints where time goes",
    },
    "distributed": {
        "send": "mx.distributed.all_sum exchanges arrays",
        "recv": "mx.distributed.all_sum exchanges arrays",
        "recv_like": "mx.distributed.all_sum exchanges arrays",
        "sum_scatter": "mx.distributed.all_sum exchanges arrays",
    },
    "nn": {
        "Conv2d": "nn.Conv1d is the convolution here",
        "Conv3d": "nn.Conv1d is the convolution here",
        "ConvTranspose1d": "nn.Conv1d is the convolution here",
        "ConvTranspose2d": "nn.Conv1d is the convolution here",
        "ConvTranspose3d": "nn.Conv1d is the convolution here",
        "AvgPool1d": "x.reshape and mx.max or mx.mean pool",
        "AvgPool2d": "x.reshape and mx.max or mx.mean pool",
        "AvgPool3d": "x.reshape and mx.max or mx.mean pool",
        "MaxPool1d": "x.reshape and mx.max or mx.mean pool",
        "MaxPool2d": "x.reshape and mx.max or mx.mean pool",
        "MaxPool3d": "x.reshape and mx.max or mx.mean pool",
        "RNN": "nn.MultiHeadAttention and pyloss's models are here",
        "GRU": "nn.MultiHeadAttention and pyloss's models are here",
        "LSTM": "nn.MultiHeadAttention and pyloss's models are here",
        "Upsample": "mx.repeat repeats elements",
        "QQLinear": "nn.QuantizedLinear has quantized weights",
        "AllToShardedLinear": "nn.average_gradients trains with several processes",
        "ShardedToAllLinear": "nn.average_gradients trains with several processes",
        "QuantizedAllToShardedLinear": "nn.average_gradients trains with several processes",
        "QuantizedShardedToAllLinear": "nn.average_gradients trains with several processes",
        "FullyShardedModule": "nn.average_gradients trains with several processes",
        "fully_shard": "nn.average_gradients trains with several processes",
    },
    "losses": {},
    "init": {},
    "optimizers": {},
    "utils": {},
}


#: Where modules of MLX are that do not stand directly in `mlx`.
_INSIDE = {"losses": "nn", "init": "nn"} | dict.fromkeys(
    ("fast", "linalg", "random", "metal", "distributed"), "core"
)


def _public(path: str) -> list[str]:
    """The names that a module of this package offers: `__all__`, or what it defines."""
    module = sys.modules[path]
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == path
    ]


def refusing(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that stands for MLX's of this name."""
    place = f"mlx.{_INSIDE[module]}.{module}" if module in _INSIDE else f"mlx.{module}"

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        instead = REFUSED[module].get(name)
        if instead is None:
            similar = nearest(name, _public(f"pyloss.{place}"))
            raise AttributeError(
                f"{place} has no {name!r} here{f', but {similar!r}' if similar else ''}: {_TRAIN}, "
                "and docs/coming_from_mlx.md lists its names"
            )
        raise AttributeError(f"{place}.{name} is not here ({_TRAIN}): {instead}")

    return __getattr__
