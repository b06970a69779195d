"""Adapter folders of mlx-lm and PEFT whose configuration, tensors or model do not fit together."""

import tempfile
from pathlib import Path

import tiny_files
from mutation import words_of
from running import put_files
from target_safetensors import broken

import pyloss

SOURCES = (
    "tuner/adapters/mlx",
    "tuner/adapters/peft",
    "tuner/adapters/peft_experts",
    "tuner/adapters/low_rank",
    "tuner/adapters/folder",
    "tuner/adapters/layout",
    "tuner/adapters/lora_parameters",
    "tuner/adapters/full",
    "tuner/adapters/selection",
    "tuner/adapters/companions",
    "tuner/adapters/tables",
)
WORDS = [
    *words_of(*SOURCES),
    "model.layers.0.self_attn.q_proj",
    "q_proj",
    "lm_head",
    "(",
    ".*",
]
#: What is trained beside the adapters of some cases.
BESIDE = {"modules_to_save": ["norm"], "trainable_token_indices": [3, 5], "bias": "lora_only"}
_MODELS = {}  # per family: the model and its modules without adapters
_CONFIGS = {}
CASES = []


def prepare():
    """Make adapters of each kind, over models with an MLP and with experts."""
    from pyloss.tuner import linear_to_lora_layers, save_adapter, unfreeze_layers

    if CASES:
        return
    for family in ("llama", "mixtral"):
        model = tiny_files.model(family)
        _MODELS[family] = model, {name: module for name, module in model.named_modules() if name}
        _CONFIGS[family] = model.config
    for family, dora, layout in (
        ("llama", 0, "mlx"),
        ("llama", 1, "mlx"),
        ("llama", 0, "peft"),
        ("llama", 1, "peft"),
        ("mixtral", 0, "mlx"),
        ("mixtral", 0, "peft"),
        ("llama", 2, "mlx"),
        ("llama", 3, "mlx"),
        ("llama", 3, "peft"),
    ):
        model = tiny_files.model(family)
        pyloss.random.seed(1)
        if dora == 2:
            unfreeze_layers(model, 1, ["self_attn.q_proj"])
        else:
            linear_to_lora_layers(
                model,
                -1,
                {"rank": 2, "scale": 2.0, "dropout": 0.1, **(BESIDE if dora == 3 else {})},
                use_dora=dora == 1,
            )
        with tempfile.TemporaryDirectory() as place:
            save_adapter(model, place, layout)
            CASES.append(
                (
                    family,
                    {
                        file.name: file.read_bytes()
                        for file in sorted(Path(place).iterdir())
                        if not file.name.startswith(".")
                    },
                )
            )


def make(m):
    family, files = m.pick(CASES)
    files = dict(files)
    tensors = next(name for name in files if name.endswith(".safetensors"))
    if m.chance(0.55):
        files["adapter_config.json"] = m.json(files["adapter_config.json"], WORDS)
    else:
        files[tensors] = broken(m, files[tensors])
    if not m.pristine and m.chance(0.03):
        files.pop(m.pick(list(files)))
    return {"family": family.encode(), **files}


def _model(family, full):
    """A model without an adapter: a new one if `full`, else the shared one, its layers restored."""
    if full:
        return tiny_files.model(family)
    model, modules = _MODELS[family]
    for name, module in modules.items():
        model.set_module(name, module)
    model.adapter_config, model.lm_head, model.config = (
        None,
        modules.get("lm_head"),
        _CONFIGS[family],
    )
    return model


def use(files, folder):
    from pyloss.tuner import load_adapters
    from pyloss.tuner.utils import fuse_adapters

    files = dict(files)
    model = _model(files.pop("family").decode(), b"full" in files.get("adapter_config.json", b""))
    put_files(folder, files)
    with tiny_files.quiet():
        load_adapters(model, folder)
        tiny_files.exercise(model)
        fuse_adapters(model)
        tiny_files.exercise(model)
