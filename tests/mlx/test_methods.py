"""MLX's methods of modules: of `nn.Module`, and of pyloss's models by `with_mlx_methods`."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import pyloss
import pyloss.mlx.core as mx
import pyloss.mlx.nn as nn
import pyloss.mlx.optimizers as optim
from pyloss.mlx.utils import tree_flatten, tree_map, tree_unflatten
from pyloss.weights.weight import Weight


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = mx.ones((2,))

    def __call__(self, x):
        return x * self.s.square()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = mx.arange(6.0).reshape(3, 2)
        self.b = mx.zeros((2,))
        self.parts = [Scale(), Scale()]

    def __call__(self, x):
        y = x @ self.w + self.b
        for part in self.parts:
            y = part(y)
        return y


def names(tree):
    return [name for name, _ in tree_flatten(tree)]


def test_parameters_are_a_tree():
    model = Net()
    assert names(model.parameters()) == ["w", "b", "parts.0.s", "parts.1.s"]
    assert isinstance(model.parameters()["parts"][1]["s"], mx.array)
    assert model.leaf_modules() == {"parts": model.parts}
    assert [type(m).__name__ for m in model.modules()] == ["Net", "Scale", "Scale"]
    assert "w" in model and "missing" not in model
    assert model["b"].shape == (2,) and model.get("missing", 3) == 3


def test_gradients_have_the_form_of_the_parameters():
    model = Net()
    x = mx.ones((4, 3))
    loss = lambda model, x: ((model(x) ** 2).sum(), 7)
    (value, more), grads = nn.value_and_grad(model, loss)(model, x)
    assert more == 7 and names(grads) == names(model.parameters())
    y = np.ones((4, 3)) @ np.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(value.item(), (y**2).sum())
    np.testing.assert_allclose(grads["w"].tolist(), np.ones((3, 4)) @ (2 * y))
    np.testing.assert_allclose(grads["parts"][0]["s"].tolist(), (4 * y**2).sum(0))
    model.parts[0].freeze()
    _, grads = nn.value_and_grad(model, loss)(model, x)
    assert names(grads) == ["w", "b", "parts.1.s"]


def test_arrays_keep_their_values_when_the_model_changes():
    model = Net()
    before = model.w
    made = [before.T, before[1:], before.astype(mx.float32), mx.stop_gradient(before),
            copy.copy(before), mx.contiguous(before), mx.reshape(before, (-1,)),
            mx.squeeze(before), before]  # fmt: skip
    values = [x.tolist() for x in made]
    optim.SGD(learning_rate=1.0).update(model, {"w": mx.ones((3, 2))})
    assert [x.tolist() for x in made] == values and model.w.sum().item() == 15 - 6
    model.update({"w": mx.zeros((3, 2))})
    assert before.sum().item() == 15 and model.w.sum().item() == 0


def test_what_changes_an_array_of_a_module_in_place_changes_the_module():
    model = Net()
    model.w += 1
    model.b[0] = 5
    w = model.w
    w *= 2
    assert model.w.sum().item() == 42 and model.b.tolist() == [5, 0]


@pytest.mark.parametrize("keys", ["b", ["b"]])
def test_freeze_by_keys(keys):
    model = Net()
    model.freeze()
    assert names(model.trainable_parameters()) == []
    model.unfreeze(keys=keys)
    assert names(model.trainable_parameters()) == ["b"]
    model.unfreeze(recurse=False)
    assert names(model.trainable_parameters()) == ["w", "b"]
    model.freeze(keys="nowhere")
    with pytest.raises(KeyError, match="nowhere"):
        model.freeze(keys="nowhere", strict=True)


def test_update_checks_names():
    model = Net()
    with pytest.raises(ValueError, match='named "c"'):
        model.update({"c": mx.ones(2)})
    model.update({"c": mx.ones(2), "b": mx.ones(2)}, strict=False)
    assert model.b.tolist() == [1, 1]
    with pytest.raises(ValueError, match="invalid type: int"):
        model.update({"b": 3})


def test_update_modules_and_apply():
    model = Net()
    new = Scale()
    model.update_modules({"parts": [new]})
    assert model.parts[0] is new
    with pytest.raises(ValueError, match="sub-module named"):
        model.update_modules({"other": new})
    model.apply(lambda p: p * 0)
    assert sum(p.sum().item() for _, p in tree_flatten(model.parameters())) == 0
    model.set_dtype(mx.bfloat16)
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.bfloat16}
    seen = []
    model.apply_to_modules(lambda name, module: seen.append(name))
    assert seen == ["", "parts.0", "parts.1"]


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_weights_go_through_files(tmp_path, ending):
    model, other = Net(), Net()
    model.apply(lambda p: p + 3)
    path = str(tmp_path / f"weights.{ending}")
    model.save_weights(path)
    other.load_weights(path)
    assert names(other.parameters()) == names(model.parameters())
    for (_, a), (_, b) in zip(*map(tree_flatten, (model, other)), strict=True):
        assert mx.array_equal(a, b)
    with pytest.raises(ValueError, match="Missing 3 parameters"):
        other.load_weights([("w", mx.ones((3, 2)))])
    with pytest.raises(ValueError, match="1 parameters not in model"):
        other.load_weights([*tree_flatten(model.parameters()), ("c", mx.ones(1))])
    with pytest.raises(ValueError, match=r"Expected shape \(3, 2\)"):
        other.load_weights({**tree_flatten(model, destination={}), "w": mx.ones((2, 3))})
    other.load_weights([("w", mx.ones((3, 2))), ("c", mx.ones(1))], strict=False)
    assert other.w.sum().item() == 6


class Plain(pyloss.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = pyloss.nn.Linear(4, 3)
        self.layers = [pyloss.nn.Linear(3, 2, bias=False)]

    def __call__(self, x):
        return self.layers[0](self.first(x))


def test_a_model_of_pyloss_gets_the_methods():
    model = nn.with_mlx_methods(Plain())
    flat = ["first.weight", "first.bias", "layers.0.weight"]
    assert isinstance(model, Plain) and names(model.parameters()) == flat
    x = mx.ones((5, 4))
    loss = lambda model, x: mx.mean(mx.square(model(x)))
    _, grads = nn.value_and_grad(model, loss)(model, x)
    assert names(grads) == flat
    # pyloss's own function gives the same
    _, own = pyloss.nn.value_and_grad(model, lambda m: np.mean(m(np.ones((5, 4), "f4")) ** 2))(
        model
    )
    for name in flat:
        np.testing.assert_allclose(grads[name].tolist(), own[name], rtol=1e-5)
    assert type(model(x)) is type(model.first(x)) is mx.array
    assert type(model.first(np.ones((5, 4), "f4"))) is np.ndarray
    model.freeze()
    model.layers[0].unfreeze()
    assert names(model.trainable_parameters()) == ["layers.0.weight"]
    nested = tree_unflatten(tree_flatten(tree_map(lambda p: p * 0 + 2, model.parameters())))
    model.update(nested)
    assert model.first.bias.tolist() == [2, 2, 2]
    model.update({"first.bias": mx.zeros(3)})
    assert model.first.bias.tolist() == [0, 0, 0]
    assert names(model.filter_and_map(nn.Module.trainable_parameter_filter)) == ["layers.0.weight"]
    other = copy.deepcopy(model)
    assert "weight" in other.first and other.first is not model.first


@pytest.fixture
def stored(tmp_path):
    """A pyloss model whose matrices of float32 are mapped from its file, with MLX's methods."""
    import tiny

    return nn.with_mlx_methods(tiny.load_tiny(tmp_path))


def test_stored_floats_are_parameters_that_train_once_they_are_unfrozen(stored):
    name = "model.layers.0.mlp.up_proj.weight"
    layer = stored.layers[0].mlp.up_proj
    values = np.array(dict(tree_flatten(stored.parameters()))[name])
    assert values.shape == (64, 32) and np.array_equal(values, layer["weight"])
    assert stored.trainable_parameters() == {}
    assert pyloss.nn.count_parameters(stored) == (
        0,
        sum(v.size for _, v in tree_flatten(stored.parameters())),
    )
    layer.unfreeze()
    assert list(stored.trainable_parameters()) == [name]
    assert isinstance(vars(layer)["weight"], np.ndarray)
    step = nn.value_and_grad(stored, lambda model, x: mx.square(model(x)).mean())
    _, grads = step(stored, mx.array([[1, 2, 3]]))
    assert list(grads) == [name] and mx.abs(grads[name]).max() > 0
    stored.update({name: mx.zeros((64, 32))})
    assert not np.any(layer.weight)


def test_stored_floats_take_weights_also_where_they_are_frozen(stored):
    name = "model.layers.1.self_attn.o_proj.weight"
    new = np.arange(1024, dtype=np.float32).reshape(32, 32)
    stored.load_weights([(name, mx.array(new))], strict=False)
    np.testing.assert_array_equal(stored.parameters()[name], new)
    assert stored.trainable_parameters() == {}


def test_a_stored_weight_is_an_array_to_scripts(stored, tmp_path):
    layer = stored.layers[0].mlp.up_proj
    values = np.array(layer["weight"])
    weight, x = layer.weight, mx.ones((2, 32))
    assert isinstance(weight, mx.array) and weight.dtype == mx.float32 and weight.ndim == 2
    same = {
        "operators": (2 * weight - weight / 4 + (-weight) ** 2, 1.75 * values + values**2),
        "product": (x @ weight.T, np.ones((2, 32)) @ values.T),
        "function": (mx.abs(weight).sum(axis=0), np.abs(values).sum(0)),
        "method": (weight.astype(mx.float16), values.astype(np.float16)),
        "index": (weight[3:5, 0], values[3:5, 0]),
        "array": (mx.array(weight), values),
        "stacked": (mx.stack([weight, weight]), [values, values]),
    }
    for name, (found, want) in same.items():
        assert type(found) is mx.array, name
        np.testing.assert_allclose(np.array(found), want, rtol=1e-5, atol=1e-6, err_msg=name)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"w": weight})
    assert mx.array_equal(mx.load(str(tmp_path / "w.safetensors"))["w"], values)
    mx.eval(weight)
    with pytest.raises(TypeError, match="elements of a weight in a model's file cannot be set"):
        weight[0] = 1
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = weight.no_such_name
    assert np.array_equal(copy.deepcopy(weight), values)
    layer.weight *= 2
    np.testing.assert_array_equal(layer["weight"], 2 * values)
    assert stored.trainable_parameters() == {}
    _, grads = nn.value_and_grad(
        stored, lambda m, x: (m(x) * m.layers[1].mlp.up_proj.weight.sum()).sum()
    )(stored, mx.array([[1, 2]]))
    assert not grads


@pytest.mark.parametrize("half", [False, True])
def test_the_groups_of_a_quantized_layer(stored, half):
    layer = stored.layers[0].mlp.up_proj
    if half:
        layer.weight = mx.array(layer.weight).astype(mx.bfloat16)
        layer.freeze()
    codes, scales, biases = mx.quantize(mx.array(layer.weight), group_size=32, bits=8)
    nn.quantize(stored, group_size=32, bits=8)
    layer = stored.layers[0].mlp.up_proj
    assert layer.group_size == 32 and layer.mode == "affine" and layer.scales.dtype == scales.dtype
    assert mx.array_equal(layer.scales, scales) and mx.array_equal(layer.biases, biases)
    found = mx.dequantize(codes, layer.scales, layer.biases, 32, 8)
    close = {"rtol": 0, "atol": 4e-3 if half else 0}  # of an array in bfloat16
    np.testing.assert_allclose(np.array(found, np.float32), layer.weight.dequantize(), **close)
    assert layer.bits == 8 and isinstance(layer.weight, mx.array) and layer.weight.shape == (64, 32)
    assert mx.array_equal(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 8), found)
    assert layer.weight.dtype == mx.uint32 and mx.array_equal(mx.array(layer.weight), codes)
    x = mx.ones((2, 32))
    products = [
        mx.quantized_matmul(x, w, scales, biases, group_size=layer.group_size, bits=layer.bits)
        for w in (layer.weight, codes)
    ]
    assert mx.array_equal(*products)
    # what scripts do to get the sizes of packed matrices
    inputs = layer.weight.shape[1]
    inputs *= 32 // layer.bits
    assert (inputs, layer.weight.shape[1] * 32 // layer.bits) == (32, 32)
    assert (layer.weight.size * 32 // layer.bits, 20 // layer.bits) == (2048, 2)
    other = pyloss.nn.Linear.from_weight(Weight.quantize(np.ones((4, 64), np.float32), "q4_0"))
    with pytest.raises(AttributeError, match="has the format q4_0, which has no scales of MLX's"):
        _ = nn.with_mlx_methods(other).scales


def test_layers_of_pyloss_are_instances_of_mlx_classes(stored):
    layer = stored.layers[0]
    assert isinstance(layer.mlp.up_proj, nn.Linear) and isinstance(
        layer.input_layernorm, nn.RMSNorm
    )
    assert isinstance(stored.model.embed_tokens, nn.Embedding)
    assert not isinstance(layer.mlp.up_proj, nn.Embedding | nn.QuantizedLinear | nn.LayerNorm)

    class Own(nn.Linear):
        pass

    assert not isinstance(layer.mlp.up_proj, Own) and isinstance(Own(2, 3), nn.Linear)
    expected = mx.quantize(mx.array(layer["mlp"].up_proj["weight"]), group_size=32, bits=4)
    nn.quantize(stored, group_size=32, bits=4, class_predicate=lambda path, m: "up_proj" in path)
    quantized = stored.layers[0].mlp.up_proj
    assert isinstance(quantized, nn.QuantizedLinear) and not isinstance(quantized, nn.Linear)
    assert isinstance(stored.layers[0].mlp.down_proj, nn.Linear)
    np.testing.assert_array_equal(quantized.weight.dequantize(), mx.dequantize(*expected, 32, 4))
    assert quantized.weight.groups.scale_format == "f32"  # the type of the floats, as in MLX


def test_layers_that_are_put_in_later_have_mlx_methods_too(stored):
    from pyloss.tuner import LoRALinear

    attention = stored.layers[0].self_attn
    attention.q_proj = LoRALinear.from_base(attention.q_proj, 2)
    attention.q_proj.lora_a = mx.ones((32, 2))
    assert type(vars(attention.q_proj)["lora_a"]) is np.ndarray
    assert names(stored.trainable_parameters()) == [
        f"model.layers.0.self_attn.q_proj.lora_{part}" for part in "ab"
    ]


def test_optimizers_go_on_from_the_nested_state_of_a_file(stored):
    from pyloss.mlx import optimizers as optim

    stored.model.norm.unfreeze()
    grads = {"model.norm.weight": mx.ones((32,))}
    runs = []
    for restored in (False, True):
        stored.update({"model.norm.weight": mx.ones((32,))})
        optimizer = optim.Adam(0.1)
        for i in range(4):
            optimizer.update(stored, grads)
            if restored and i == 1:
                flat = tree_flatten(optimizer.state)
                optimizer = optim.Adam(0.1)
                optimizer.state = tree_unflatten(flat)
        runs.append(np.array(stored.parameters()["model.norm.weight"]))
    np.testing.assert_array_equal(*runs)
