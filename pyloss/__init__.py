"""pyloss: fine-tunes language models, and computes their losses, on ordinary computers.

`import pyloss` imports NumPy and the C core. Models, data and training are imported at first use.
"""

from __future__ import annotations

# Before what takes time to import.
from pyloss import starting  # noqa: F401

# isort: split
import importlib
import os
from typing import TYPE_CHECKING, Any

from pyloss import _core, autograd, nn, optim, random
from pyloss.autograd.checkpointing import checkpoint
from pyloss.autograd.custom import custom_function, stop_gradient
from pyloss.autograd.differentiation import grad, value_and_grad, vjp
from pyloss.autograd.functions import (
    gelu,
    log_softmax,
    logsumexp,
    one_hot,
    relu,
    sigmoid,
    silu,
    softmax,
)
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tensor import Tensor
from pyloss.errors import DeviceError, FormatError
from pyloss.gradient_check import gradcheck
from pyloss.losses.pairs import (
    cosine_loss,
    js_div_loss,
    kl_div_loss,
    linear_cosine,
    linear_js_div,
    linear_kl_div,
    linear_skew_kl_div,
    linear_tvd,
    skew_kl_div_loss,
    tvd_loss,
)
from pyloss.losses.public import (
    binary_cross_entropy_with_logits,
    compute_accuracy,
    focal_loss,
    linear_cross_entropy,
    log_stablemax,
    softmax_cross_entropy,
    stablemax,
    stablemax_cross_entropy,
)
from pyloss.losses.sparse import linear_sparse_distillation, sparse_distillation_loss
from pyloss.ops.dot_product_attention import attention, scaled_dot_product_attention
from pyloss.runtime import precision
from pyloss.runtime.device import (
    Device,
    DeviceArray,
    default_device,
    devices,
    set_default_device,
    to_device,
)
from pyloss.runtime.precision import get_matmul_precision, set_matmul_precision
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

if TYPE_CHECKING:  # `as` makes them public to type checkers
    from pyloss import (
        distributed as distributed,
        evaluation as evaluation,
        models as models,
        tuner as tuner,
    )
    from pyloss.distillation.loss import DistillationLoss as DistillationLoss
    from pyloss.distillation.run import distill as distill
    from pyloss.exporting import export as export
    from pyloss.generation import (
        BatchGenerator as BatchGenerator,
        SamplingParams as SamplingParams,
        batch_generate as batch_generate,
        generate as generate,
        stream_generate as stream_generate,
    )
    from pyloss.loading import load as load
    from pyloss.losses.act import ACTLossHead as ACTLossHead
    from pyloss.models import load_model as load_model
    from pyloss.tuner import (
        CacheDataset as CacheDataset,
        ChatDataset as ChatDataset,
        CompletionsDataset as CompletionsDataset,
        LoRALinear as LoRALinear,
        TextDataset as TextDataset,
        TrainingArgs as TrainingArgs,
        TrainingCallback as TrainingCallback,
        evaluate as evaluate,
        iterate_batches as iterate_batches,
        linear_to_lora_layers as linear_to_lora_layers,
        load_adapters as load_adapters,
        load_dataset as load_dataset,
        save_adapter as save_adapter,
        train as train,
    )

__version__ = "0.1.0"

# Public names that are imported at first use, with their modules.
_LAZY = {
    "distributed": "",
    "evaluation": "",
    "models": "",
    "tuner": "",
    "ACTLossHead": "losses.act",
    "BatchGenerator": "generation",
    "SamplingParams": "generation",
    "batch_generate": "generation",
    "DistillationLoss": "distillation.loss",
    "distill": "distillation.run",
    "export": "exporting",
    "load": "loading",
    "load_model": "models",
    "generate": "generation",
    "stream_generate": "generation",
    "CacheDataset": "tuner",
    "ChatDataset": "tuner",
    "CompletionsDataset": "tuner",
    "LoRALinear": "tuner",
    "TextDataset": "tuner",
    "TrainingArgs": "tuner",
    "TrainingCallback": "tuner",
    "evaluate": "tuner",
    "iterate_batches": "tuner",
    "linear_to_lora_layers": "tuner",
    "load_adapters": "tuner",
    "load_dataset": "tuner",
    "save_adapter": "tuner",
    "train": "tuner",
}


_profiles = [
    name
    for name in ("PYLOSS_PROFILE", "PYLOSS_OPENCL_PROFILE")
    if os.environ.get(name, "0") not in ("", "0")
]
if _profiles:
    from pyloss.io import console
    from pyloss.runtime import profiling

    if "PYLOSS_PROFILE" in _profiles:
        profiling.start(console.say)
    if "PYLOSS_OPENCL_PROFILE" in _profiles:
        profiling.start_devices(console.say)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pyloss' has no attribute {name!r}")
    home = _LAZY[name]
    value = (
        getattr(importlib.import_module(f"pyloss.{home}"), name)
        if home
        else importlib.import_module(f"pyloss.{name}")
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def set_num_threads(n: int) -> None:
    """Sets how many threads kernels may use.

    The default is PYLOSS_NUM_THREADS, OMP_NUM_THREADS, or all processors that the process may use.
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads kernels may use."""
    return int(_core.num_threads())


def info() -> dict[str, Any]:
    """The version, instruction sets, threads, precision of products, NumPy, and reused buffers.

    `isa` is the instruction set in use, `isas` are those available. `bfloat16` is how products in
    that precision are computed: by "amx_bf16", by "avx512_bf16", or "emulated"; `bfloat16_reason`
    says why, and how fast they are beside float32's. `int8` and `int8_reason` say so of products in
    int8: by the dots of "avx512_vnni" or "avx_vnni", or the plain instructions of `isa`. `buffers`
    counts bytes.
    """
    import numpy

    form, int8 = precision.bfloat16_form(), precision.int8_form()
    return {
        "version": __version__,
        "isa": _core.isa(),
        "isas": _core.isas(),
        "threads": get_num_threads(),
        "matmul_precision": get_matmul_precision(),
        "bfloat16": form.name,
        "bfloat16_reason": form.reason,
        "int8": int8.name,
        "int8_reason": int8.reason,
        "numpy": numpy.__version__,
        "buffers": _core.buffer_stats(),
    }


__all__ = [
    "Device",
    "DeviceArray",
    "DeviceError",
    "FormatError",
    "Tensor",
    "Weight",
    "WeightStack",
    "autograd",
    "binary_cross_entropy_with_logits",
    "checkpoint",
    "default_device",
    "devices",
    "compute_accuracy",
    "cosine_loss",
    "focal_loss",
    "get_matmul_precision",
    "get_num_threads",
    "grad",
    "info",
    "js_div_loss",
    "kl_div_loss",
    "linear_cosine",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "linear_skew_kl_div",
    "linear_sparse_distillation",
    "linear_tvd",
    "log_stablemax",
    "nn",
    "optim",
    "random",
    "set_default_device",
    "set_matmul_precision",
    "set_num_threads",
    "skew_kl_div_loss",
    "softmax_cross_entropy",
    "sparse_distillation_loss",
    "stablemax",
    "stablemax_cross_entropy",
    "to_device",
    "tvd_loss",
    "value_and_grad",
    "custom_function",
    "gradcheck",
    "gelu",
    "log_softmax",
    "logsumexp",
    "no_grad",
    "one_hot",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "stop_gradient",
    "vjp",
    "attention",
    "scaled_dot_product_attention",
    *_LAZY,
]
