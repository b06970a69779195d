"""Adapters of experts on disk: mlx-lm's layout, and PEFT's one pair for gate and up."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pyloss import nn
from pyloss.tuner import load_adapters, save_adapter
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.registry import adapter_class

EXPERTS, HIDDEN, INNER = 4, 6, 10
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.switch_mlp = nn.Module()
        for name, (rows, cols) in SHAPES.items():
            setattr(self.switch_mlp, name, nn.SwitchLinear(cols, rows, EXPERTS, bias=False))


class Layer(nn.Module):
    def __init__(self, block):
        super().__init__()
        setattr(self, block, Block())


class Model(nn.Module):
    def __init__(self, block="mlp"):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = [Layer(block), Layer(block)]
        self.lm_head = nn.Linear(HIDDEN, 3)
        self.adapter_config = None
        self.freeze()


def adapt(model, names, ranks=(3,), scales=(2.0,), kind="lora"):
    rng = np.random.default_rng(0)
    modules = dict(model.named_modules())
    for i, name in enumerate(names):
        base = modules[name]
        layer = adapter_class(base, kind).from_base(
            base, r=ranks[i % len(ranks)], scale=scales[i % len(scales)]
        )
        for part in ("lora_a", "lora_b"):
            getattr(layer, part)[...] = rng.standard_normal(getattr(layer, part).shape)
        model.set_module(name, layer)
    return model


def names(block="mlp", parts=SHAPES, layers=(0, 1)):
    return [f"model.layers.{i}.{block}.switch_mlp.{part}" for i in layers for part in parts]


def check(model, again):
    found = adapter_modules(again)
    for name, layer in adapter_modules(model).items():
        np.testing.assert_allclose(
            found[name].delta(), layer.delta(), rtol=1e-4, atol=1e-5, err_msg=name
        )
    for name in found.keys() - adapter_modules(model).keys():
        assert not found[name].delta().any(), name


def test_mlx_keeps_every_bit(tmp_path):
    model = adapt(Model(), names())
    save_adapter(model, tmp_path)
    arrays = load_file(tmp_path / "adapters.safetensors")
    assert arrays["model.layers.0.mlp.switch_mlp.down_proj.lora_a"].shape == (EXPERTS, 3, INNER)
    assert arrays["model.layers.0.mlp.switch_mlp.down_proj.lora_b"].shape == (EXPERTS, HIDDEN, 3)
    again = load_adapters(Model(), tmp_path)
    for name, layer in adapter_modules(model).items():
        found = adapter_modules(again)[name]
        assert (
            found.lora_a.tobytes() == layer.lora_a.tobytes()
            and found.lora_b.tobytes() == layer.lora_b.tobytes()
        )


def test_dora_is_in_our_own_files_alone(tmp_path):
    model = adapt(Model(), names(), kind="dora")
    for layer in adapter_modules(model).values():
        layer.m *= 1.5
    save_adapter(model, tmp_path / "own")
    again = adapter_modules(load_adapters(Model(), tmp_path / "own"))
    for name, layer in adapter_modules(model).items():
        assert all(
            getattr(again[name], part).tobytes() == getattr(layer, part).tobytes()
            for part in ("lora_a", "lora_b", "m")
        )
    with pytest.raises(ValueError, match="switch_mlp.gate_proj: mlx-lm has no DoRA over experts"):
        save_adapter(model, tmp_path / "mlx", one_rank=True)
    with pytest.raises(ValueError, match="switch_mlp.gate_proj: PEFT has no DoRA over experts"):
        save_adapter(model, tmp_path / "peft", "peft")
    assert not (tmp_path / "mlx").exists() and not (tmp_path / "peft").exists()


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize(
    "parts", [SHAPES, ["up_proj"], ["down_proj"], ["gate_proj", "down_proj"]], ids=len
)
def test_peft_has_gates_and_ups_in_one(tmp_path, block, parts):
    model = adapt(
        Model(block),
        [*names(block, parts), f"model.layers.1.{block}.gate", "lm_head"],
        ranks=(3, 2),
        scales=(2.0, 0.5, 2.0, 3.0),
    )
    save_adapter(model, tmp_path, "peft")
    config, arrays = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert config["target_modules"] == ["lm_head"]
    parameters = [
        p
        for p in ("gate_up_proj", "down_proj")
        if any(p[:4] == part[:4] or (part == "up_proj" and p[0] == "g") for part in parts)
    ]
    wanted = [f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in parameters]
    assert config["target_parameters"] == sorted([*wanted, "model.layers.1.mlp.gate.weight"])
    inner = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert (inner in arrays) == (len(parameters) == 2)
    check(model, load_adapters(Model(block), tmp_path))


def test_a_pair_from_peft_goes_back_as_it_came(tmp_path):
    """Gate and up that share lora_a are one pair of that rank."""
    rng = np.random.default_rng(1)
    at = "base_model.model.model.layers.1.mlp.experts.lora_"
    arrays = {
        f"{at}A.weight": rng.standard_normal((EXPERTS * 2, HIDDEN), np.float32),
        f"{at}B.weight": rng.standard_normal((2 * INNER, 2 * EXPERTS), np.float32),
    }
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 8,
        "rank_pattern": {"experts.gate_up_proj": 2},
        "lora_alpha": 3,
        "target_modules": [],
        "target_parameters": ["gate_up_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = load_adapters(Model(), tmp_path)
    a, b = arrays[f"{at}A.weight"], arrays[f"{at}B.weight"]
    for expert in range(EXPERTS):
        delta = (
            1.5
            * b.reshape(2 * INNER, 2, EXPERTS)[:, :, expert]
            @ a.reshape(EXPERTS, 2, HIDDEN)[expert]
        )
        for part, rows in (("gate_proj", slice(0, INNER)), ("up_proj", slice(INNER, None))):
            layer = adapter_modules(model)[f"model.layers.1.mlp.switch_mlp.{part}"]
            np.testing.assert_allclose(layer.delta()[expert], delta[rows], rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "again", "peft")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == arrays.keys() and all(
        again[name].tobytes() == arrays[name].tobytes() for name in arrays
    )


def own_layers(block="block_sparse_moe", names=("w1", "w3", "w2")):
    """Adapters as PEFT wrote them when every expert had its own layers."""
    rng, arrays = np.random.default_rng(2), {}
    for expert in range(EXPERTS):
        for name, (rows, cols) in zip(names, SHAPES.values()):
            at = f"base_model.model.model.layers.0.{block}.experts.{expert}.{name}.lora_"
            arrays |= {
                f"{at}A.weight": rng.standard_normal((2, cols), np.float32),
                f"{at}B.weight": rng.standard_normal((rows, 2), np.float32),
            }
    return arrays


def write_own(folder, arrays, **changes):
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["w1", "w2", "w3"],
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("block", "names"), [("block_sparse_moe", ("w1", "w3", "w2")), ("mlp", tuple(SHAPES))]
)
def test_experts_with_layers_of_their_own(tmp_path, block, names):
    arrays = own_layers(block, names)
    write_own(tmp_path, arrays, alpha_pattern={f"experts.3.{names[0]}": 6})
    layers = adapter_modules(load_adapters(Model(block), tmp_path))
    assert len(layers) == 3
    for name, ours in zip(names, SHAPES):
        for expert in range(EXPERTS):
            a, b = (
                arrays[
                    f"base_model.model.model.layers.0.{block}.experts.{expert}.{name}.lora_{half}.weight"
                ]
                for half in "AB"
            )
            scale = 3.0 if (expert, name) == (3, names[0]) else 1.5
            np.testing.assert_allclose(
                layers[f"model.layers.0.{block}.switch_mlp.{ours}"].delta()[expert],
                scale * b @ a,
                rtol=1e-5,
                atol=1e-5,
            )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda a: [a.pop(name) for name in list(a) if "experts.1.w1" in name],
            {},
            "gate_proj: has adapters for 3 experts, and none for expert 1",
        ),
        (
            lambda a: a.pop(
                "base_model.model.model.layers.0.block_sparse_moe.experts.2.w2.lora_B.weight"
            ),
            {},
            r"experts.2.w2: matrices of shapes \{'A': .*\} are not a pair of rank 2",
        ),
        (
            lambda a: None,
            {"rank_pattern": {"w3": 4}},
            "experts.0.w3: matrices of shapes .* are not a pair of rank 4",
        ),
        (
            lambda a: [a.pop(name) for name in list(a) if "experts.3." in name],
            {},
            r"gate_proj: lora_a \(3, 2, 6\) and lora_b .*expected \(4, r, 6\)",
        ),
    ],
)
def test_experts_of_their_own_that_do_not_fit(tmp_path, change, options, message):
    arrays = own_layers()
    change(arrays)
    write_own(tmp_path, arrays, **options)
    with pytest.raises(ValueError, match=message):
        load_adapters(Model("block_sparse_moe"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, a: c.update(target_parameters=["experts.gate_up_proj", "router.scale"]),
            "target_parameters = .*router.scale.* is not supported",
        ),
        (
            lambda c, a: c.update(target_parameters=["experts.down_proj"]),
            "tensors at 2 depths, where target_parameters has down_proj",
        ),
        (
            lambda c, a: c.update(target_parameters=None),
            "tensors at 2 depths, where target_parameters has none",
        ),
        (lambda c, a: a.pop(next(iter(a))), "half of a pair"),
        (
            lambda c, a: c.update(r=5, rank_pattern={}),
            r"lora_A \(\d+, \d+\) and lora_B .* are not those of experts of rank 5",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    save_adapter(adapt(Model(), names(layers=[0])), tmp_path, "peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    arrays = load_file(tmp_path / "adapter_model.safetensors")
    change(config, arrays)
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = Model()
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path)
    assert not adapter_modules(model)
