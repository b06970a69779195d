"""The names of mlx-lm that are here, what differs, and what is missing with the nearest thing.

A module's `__all__` has the names that are here. tests/parity/test_mlx_lm_names.py compares them,
their signatures and defaults with the installed mlx-lm; docs/coming_from_mlx.md has the table that
`table()` makes.
"""

from __future__ import annotations

import dis
import importlib
import sys
from collections.abc import Callable
from typing import Any

from pyloss.errors import nearest

#: the version of mlx-lm whose interface this is
VERSION = "0.32.2"

#: the modules that are here, without the package's name
MODULES = (
    "", "convert", "evaluate", "fuse", "generate", "lora", "models.base", "models.cache",
    "models.llama", "models.qwen2", "models.qwen3", "models.switch_layers", "perplexity",
    "sample_utils", "tokenizer_utils", "tuner", "tuner.callbacks", "tuner.datasets", "tuner.dora",
    "tuner.lora", "tuner.losses", "tuner.trainer", "tuner.utils", "utils",
)  # fmt: skip

#: modules of mlx-lm that are missing, with the nearest thing
MISSING_MODULES = {
    "benchmark": "`pyloss bench` measures a model",
    "cache_prompt": "`pyloss.mlx_lm.models.cache.save_prompt_cache` writes a cache",
    "chat": "`pyloss chat` talks to a model",
    "gguf": "`pyloss export --to gguf` writes GGUF files",
    "manage": "`huggingface-cli` manages the hub's cache",
    "quant.awq": "`pyloss quantize` tunes scales",
    "quant.dwq": "`pyloss quantize` tunes the scales of a quantized model by its teacher",
    "quant.dynamic_quant": "`convert(quant_predicate=...)` chooses bits by layer",
    "quant.gptq": "`pyloss quantize` tunes scales; GPTQ's folders are read",
    "server": "`pyloss export --to ollama` makes a model for a server",
    "share": "copy the folder of the model",
    "upload": "`pyloss fuse --push owner/name` uploads a model",
}

_CACHES = "keys and values of many sequences are in pyloss.models.batch_cache"
_HUB = "`pyloss fuse --push owner/name` writes a card and uploads a model"
_ONE_PROCESS = "pyloss trains in several processes by `mpirun -n 2 pyloss train`"
_SERVER = "pyloss has no server: pyloss.generation.BatchGenerator answers many prompts at a time"
_LAYERS = "pyloss.models.layers has the layers of all families"
_STATES = "pyloss keeps such states inside: use make_prompt_cache and the model's call"

#: names that are missing, with the nearest thing
REFUSED: dict[str, dict[str, str]] = {
    "evaluate": {
        "MLXLM": "pyloss.interop.lm_eval.PylossLM is the model of lm-evaluation-harness",
        "chat_template_fn": "pyloss.interop.lm_eval applies chat templates itself",
    },
    "generate": {
        "BatchGenerator": _SERVER,
        "GenerationBatch": _SERVER,
        "PromptProcessingBatch": _SERVER,
        "StopSequences": "pyloss.generation.SamplingParams(stop=...) ends answers at texts",
        "TextStateMachine": _SERVER,
        "make_stop_sequences": "pyloss.generation.SamplingParams(stop=...) ends answers at texts",
        "make_text_state_machine": _SERVER,
    },
    "models.base": {
        "BaseModelArgs": "pyloss.models.config has the configurations",
        "create_ssm_mask": _STATES,
        "gather_last_axis": "mx.take_along_axis gathers along an axis",
        "quantized_scaled_dot_product_attention": "mx.fast.scaled_dot_product_attention",
        "scaled_dot_product_attention": "mx.fast.scaled_dot_product_attention",
    },
    "models.cache": {
        "ArraysCache": _STATES,
        "BatchKVCache": _CACHES,
        "BatchRotatingKVCache": _CACHES,
        "CacheList": _STATES,
        "ChunkedKVCache": _STATES,
        "LRUPromptCache": "copy.deepcopy of a cache keeps a prefix for several prompts",
        "PromptTrie": "copy.deepcopy of a cache keeps a prefix for several prompts",
        "PromptTrieResult": "copy.deepcopy of a cache keeps a prefix for several prompts",
        "QuantizedKVCache": "keys and values stay float32: KVCache, or RotatingKVCache to bound it",
        "TokenBuffer": "a list of token ids does the same",
        "dynamic_roll": "numpy.roll moves elements",
    },
    "models.llama": dict.fromkeys(("Attention", "LlamaModel", "MLP", "TransformerBlock"), _LAYERS),
    "models.qwen2": dict.fromkeys(("Attention", "MLP", "Qwen2Model", "TransformerBlock"), _LAYERS),
    "models.qwen3": dict.fromkeys(("Attention", "MLP", "Qwen3Model", "TransformerBlock"), _LAYERS),
    "models.switch_layers": {
        "QuantizedSwitchLinear": "pyloss.nn.SwitchLinear holds quantized experts, too",
        "SwiGLU": "pyloss.ops has the activation of models",
        "SwitchGLU": "pyloss.models.moe has the experts' layers",
        "SwitchMLP": "pyloss.models.moe has the experts' layers",
    },
    "tokenizer_utils": {
        "NewlineTokenizer": "pyloss.models.tokenizer.Tokenizer reads tokenizer.json as it is",
    },
    "utils": {
        "DEFAULT_ALLOW_PATTERNS": "pyloss.models.reading.HUB_FILES has the patterns of files",
        "MODEL_ARCHITECTURE_REMAPPING": "pyloss.models.config.families lists the families",
        "MODEL_REMAPPING": "pyloss.models.config.families lists the families",
        "create_model_card": _HUB,
        "hf_repo_to_path": "pyloss.models.reading.resolve_model finds a model's folder",
        "infer_quant_config": "pyloss reads how a folder is quantized from its config.json",
        "pipeline_load": _ONE_PROCESS,
        "sharded_load": _ONE_PROCESS,
        "upload_to_hub": _HUB,
    },
}

_ADAPTER = "`from_base` calls its argument `layer`, and freezes it"
_MODELS = {
    "Model": "a function that makes pyloss's model",
    "ModelArgs": "the keys of config.json, with its defaults",
}
_LOGS = "gradients go to both arguments; mlx-lm's Metal kernels give the teacher's none"
_SAVED = "a model that is in the folder moves to `previous-N`"

#: names that are here with a difference
DIFFERENT: dict[str, dict[str, str]] = {
    "convert": {
        "convert": "`q_mode` other than affine is refused, and so is `upload_repo`",
    },
    "evaluate": {"main": "without `--chat-template-args`, `--temp`, `--top-p`, `--top-k`"},
    "fuse": {
        "main": "adapters that 4 bits would lose are refused; `--export-gguf` takes all families"
    },
    "generate": {
        "BatchResponse": "`stats` has pyloss's fields",
        "batch_generate": "with `max_kv_size`, prompts are answered one by one",
        "generate_step": "`kv_bits` and `input_embeddings` are refused",
        "maybe_quantize_kv_cache": "`kv_bits` is refused",
        "wired_limit": "does nothing",
    },
    "lora": {
        "run": "the given `training_callback` is called, which mlx-lm drops",
        "main": "unknown keys of a YAML file are named in a warning",
    },
    "models.cache": {
        "KVCache": "the arrays are copies of pyloss's; quantized and batched ones are missing",
        "RotatingKVCache": "a prompt longer than `max_size` is read token by token",
    },
    "models.llama": _MODELS,
    "models.qwen2": _MODELS,
    "models.qwen3": _MODELS,
    "models.switch_layers": {"SwitchLinear": "pyloss's layer, which may be quantized"},
    "perplexity": {"main": "prints the perplexity and its error alone"},
    "tokenizer_utils": {
        "BPEStreamingDetokenizer": "over pyloss's decoder",
        "SPMStreamingDetokenizer": "over pyloss's decoder",
        "TokenizerWrapper": "over pyloss's tokenizer, with the names of transformers' that scripts"
        " use",
        "load": "reads GGUF files, too; other keys than eos_token and chat_template are refused",
    },
    "tuner.callbacks": {
        "SUPPORT_CALLBACK": "has pyloss's services, too",
        "SwanLabCallback": "`config` may be None",
        "WandBCallback": "`config` may be None",
    },
    "tuner.dora": {"DoRAEmbedding": _ADAPTER, "DoRALinear": _ADAPTER},
    "tuner.lora": {
        "LoRAEmbedding": _ADAPTER,
        "LoRALinear": _ADAPTER,
        "LoRASwitchLinear": _ADAPTER,
    },
    "tuner.losses": {"js_div_loss": _LOGS, "kl_div_loss": _LOGS},
    "tuner.trainer": {
        "default_loss": "a batch without targets has loss 0, not NaN",
        "evaluate": "data without targets is an error, not NaN",
        "grad_checkpoint": "of one model, not of all models with such layers",
        "train": "an earlier run's files move to `previous-N`; a loss that is not finite stops it",
    },
    "tuner.utils": {
        "build_schedule": "an unknown name is a ValueError",
        "get_total_parameters": "counts adapters, too",
        "print_trainable_parameters": "counts adapters in the total, too",
        "linear_to_lora_layers": "the base is frozen; keys that name no layer at all are refused",
        "remove_lora_layers": "removes all kinds of adapters",
    },
    "utils": {
        "compute_bits_per_weight": "of the weights as they are stored",
        "dequantize_model": "to float32",
        "get_total_parameters": "counts adapters, too",
        "load": "with an adapter, its parameters alone can be trained; GGUF files and ollama's"
        " names are read; changes by `model_config` are refused",
        "load_model": "`get_model_classes` is refused",
        "quantize_model": "`mode` other than affine is refused",
        "save": _SAVED,
        "save_model": _SAVED + ", and config.json is written",
    },
}


#: names that modules of mlx-lm import from others, and scripts from there
IMPORTED = {
    "convert": {"quantize_model": "utils", "save": "utils", "upload_to_hub": "utils"},
    "evaluate": {
        "batch_generate": "generate",
        "load": "utils",
        "make_prompt_cache": "models.cache",
        "make_sampler": "sample_utils",
    },
    "fuse": {"upload_to_hub": "utils"},
    "generate": {
        "QuantizedKVCache": "models.cache",
        "TokenBuffer": "models.cache",
        "can_trim_prompt_cache": "models.cache",
        "does_model_support_input_embeddings": "utils",
        "greedy_sampler": "sample_utils",
        "make_prompt_cache": "models.cache",
        "maybe_set_recommended_wired_limit": "utils",
        "trim_prompt_cache": "models.cache",
    },
    "lora": {"save_config": "utils", "train": "tuner.trainer"},
    "perplexity": {"get_total_parameters": "utils"},
    "tuner.lora": {
        "QuantizedSwitchLinear": "models.switch_layers",
        "SwitchLinear": "models.switch_layers",
    },
    "tuner.losses": {"can_run_metal": "utils"},
    "tuner.trainer": {"maybe_set_recommended_wired_limit": "utils"},
    "tuner.utils": {
        "QuantizedSwitchLinear": "models.switch_layers",
        "SwitchLinear": "models.switch_layers",
    },
}

#: methods that classes lack
LACKING: dict[str, tuple[str, ...]] = {
    "models.cache.KVCache": ("merge", "to_quantized"),
    "models.cache.RotatingKVCache": ("merge", "to_quantized"),
    "models.switch_layers.SwitchLinear": (
        "input_dims",
        "num_experts",
        "output_dims",
        "to_quantized",
    ),
}


def absent(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module of this package: what it lacks is named in one sentence.

    Raises AttributeError, or ImportError where an import statement asks.
    """
    inside = module.removeprefix("pyloss.mlx_lm").lstrip(".")

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        theirs = f"mlx_lm.{inside}" if inside else "mlx_lm"
        path = f"{inside}.{name}" if inside else name
        reason = REFUSED.get(inside, {}).get(name) or MISSING_MODULES.get(path)
        if reason is None:
            if path in MODULES:
                return importlib.import_module(f"{module}.{name}")
            if home := IMPORTED.get(inside, {}).get(name):
                return getattr(importlib.import_module(f"pyloss.mlx_lm.{home}"), name)
            similar = nearest(name, getattr(sys.modules[module], "__all__", ()))
            reason = f"the nearest name is {similar!r}; " if similar else ""
            reason += "docs/coming_from_mlx.md lists what is here"
        text = f"{theirs}.{name} is not in pyloss: {reason}"
        asking = sys._getframe(1)
        while asking.f_code.co_name == "__getattr__" and asking.f_back is not None:
            asking = asking.f_back
        raise ImportError(text) if _imports(asking) else AttributeError(text)

    return __getattr__


def _imports(frame: Any) -> bool:
    """Whether a frame executes `from ... import`, which would hide an AttributeError's text."""
    code = frame.f_code.co_code
    return bool(0 <= frame.f_lasti < len(code)) and code[frame.f_lasti] == dis.opmap["IMPORT_FROM"]


def table() -> str:
    """The table of docs/coming_from_mlx.md: each public name of mlx-lm, and what it is here."""
    lines = ["| module | name | here |", "| --- | --- | --- |"]
    for module in MODULES:
        home = importlib.import_module(f"pyloss.mlx_lm.{module}".rstrip("."))
        differs, refused = DIFFERENT.get(module, {}), REFUSED.get(module, {})
        label = f"`mlx_lm.{module}`".replace(".`", "`")
        same = [f"`{name}`" for name in home.__all__ if name not in differs]
        if same:
            lines.append(f"| {label} | {', '.join(same)} | same |")
        lines += [f"| {label} | `{name}` | {differs[name]} |" for name in sorted(differs)]
        lines += [f"| {label} | `{name}` | missing: {refused[name]} |" for name in sorted(refused)]
    lines += [
        f"| `mlx_lm.{module}` | | missing: {MISSING_MODULES[module]} |"
        for module in sorted(MISSING_MODULES)
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
