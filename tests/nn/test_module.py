"""Modules: the tree and its names, freezing, loading weights, and gradients of models."""

import numpy as np
import pytest

import pyloss
from pyloss import nn, ops
from pyloss.autograd.tensor import Tensor
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.layers = [nn.Linear(4, 4, bias=False), nn.RMSNorm(4)]
        self.parts = {"a": nn.Linear(4, 2), "b": (nn.Embedding(5, 4),)[0]}
        self.bias = np.zeros(2, np.float32)
        self._hidden = nn.Linear(9, 9)
        self.matrix = Weight.quantize(np.ones((2, 32), np.float32), "q4_0")
        self.number, self.text, self.numbers = 3, "text", [1, 2]

    def __call__(self, x):
        for layer in (self.first, *self.layers, self.parts["a"]):
            x = layer(x)
        return x + self.bias if isinstance(x, np.ndarray) else x + Tensor(self.bias)


class Plain(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)


NAMES = [
    "bias", "first.weight", "first.bias", "layers.0.weight", "layers.1.weight", "parts.a.weight", "parts.a.bias", "parts.b.weight",
]  # fmt: skip


def test_names():
    net = Net()
    assert sorted(net.parameters()) == sorted(NAMES)
    assert [name for name, _ in net.named_modules()] == [
        "",
        "first",
        "layers.0",
        "layers.1",
        "parts.a",
        "parts.b",
    ]
    assert [name for name, _ in net.children()] == [
        "first",
        "layers.0",
        "layers.1",
        "parts.a",
        "parts.b",
    ]
    assert [name for name, _ in net.named_modules("net")][:2] == ["net", "net.first"]
    assert net.parameters()["layers.0.weight"] is net.layers[0].weight
    assert net.stored() == {"matrix": net.matrix}
    assert net.trainable_parameters().keys() == net.parameters().keys()


def test_freezing():
    net = Net()
    assert net.freeze() is net and net.trainable_parameters() == {}
    net.layers[0].unfreeze()
    assert list(net.trainable_parameters()) == ["layers.0.weight"]
    net.unfreeze()
    net.freeze(keys=["bias"])
    assert sorted(net.trainable_parameters()) == sorted(n for n in NAMES if not n.endswith("bias"))
    net.unfreeze(keys=["bias"], recurse=False)
    assert "bias" in net.trainable_parameters() and "first.bias" not in net.trainable_parameters()
    net.freeze(recurse=False)
    assert "bias" not in net.trainable_parameters() and "first.weight" in net.trainable_parameters()
    net.unfreeze()
    assert sorted(net.trainable_parameters()) == sorted(NAMES)
    for method in (net.freeze, net.unfreeze):
        with pytest.raises(ValueError, match="'wieght'; the names are bias, weight"):
            method(keys=["bias", "wieght"])
    with pytest.raises(TypeError, match="not the string 'bias'"):
        net.freeze(keys="bias")
    assert sorted(net.trainable_parameters()) == sorted(NAMES)


def test_modes():
    net = Net()
    assert net.training and net.eval() is net
    assert not any(m.training for m in net.modules())
    net.train()
    assert all(m.training for m in net.modules())
    net.layers[1].eval()
    assert [m.training for m in net.layers] == [True, False]


@pytest.mark.parametrize("path", ["first", "layers.1", "parts.a", "inner.layers.0.deep"])
def test_set_module(path):
    net = Net()
    net.inner = Plain(layers=[Plain(deep=nn.RMSNorm(2))])
    new = nn.RMSNorm(7)
    net.set_module(path, new)
    assert dict(net.named_modules())[path] is new
    assert sum(m is new for m in net.modules()) == 1


@pytest.mark.parametrize("path", ["layers.9", "nowhere.deep", "parts.z.deep", "layers.x"])
def test_set_module_in_a_place_that_does_not_exist(path):
    with pytest.raises((AttributeError, LookupError, ValueError)):
        Net().set_module(path, nn.RMSNorm(2))


def test_a_norm_with_an_offset():
    """The parameter is the weight minus the offset, also for gradients."""
    rng = np.random.default_rng(0)
    x, plain, shifted = (
        rng.standard_normal((5, 8)).astype(np.float32),
        nn.RMSNorm(8),
        nn.RMSNorm(8, offset=1.0),
    )
    assert (shifted.weight == 0).all()
    weight = rng.standard_normal(8).astype(np.float32)
    plain.weight, shifted.weight = weight + 1, weight
    np.testing.assert_array_equal(shifted(x), plain(x))
    (_, a), (_, b) = (
        nn.value_and_grad(norm, lambda norm=norm: (norm(x) * norm(x)).sum())()
        for norm in (plain, shifted)
    )
    np.testing.assert_array_equal(a["weight"], b["weight"])
    assert set(shifted.parameters()) == {"weight"}


def test_load_weights():
    net, rng = Net(), np.random.default_rng(0)
    arrays = dict(net.parameters())
    new = {name: rng.standard_normal(a.shape) for name, a in arrays.items()}
    assert net.load_weights(new) is net
    for name, array in net.parameters().items():
        assert array is arrays[name], "the array is kept, whose identity optimisers and tapes know"
        np.testing.assert_array_equal(array, new[name].astype(np.float32))
    net.load_weights({"bias": np.ones(2)}, strict=False)
    assert (net.bias == 1).all()


def test_load_weights_lists_all_that_is_wrong_and_changes_nothing():
    net = Net()
    before = {name: a.copy() for name, a in net.parameters().items()}
    new = {name: a + 1 for name, a in before.items() if name not in ("bias", "first.bias")}
    new["layers.0.weight"] = np.zeros((4, 3))
    new["parts.a.bias"] = np.float32(0)
    new["strange"] = np.zeros(1)
    with pytest.raises(ValueError) as caught:
        net.load_weights(new)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "strange: no such parameter",
        "layers.0.weight: shape (4, 3), expected (4, 4)",
        "parts.a.bias: shape (), expected (2,)",
        "bias: missing",
        "first.bias: missing",
    ]
    for name, array in net.parameters().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(ValueError, match="strange") as caught:
        net.load_weights(new, strict=False)
    assert "missing" not in str(caught.value)
    with pytest.raises(ValueError, match="and 10 more"):
        net.load_weights({f"n{i}": np.zeros(1) for i in range(30)}, strict=False)


def test_a_shared_array_is_trained_once():
    shared = np.array([1.0, 2.0], np.float32)
    model = Plain(a=Plain(w=shared), b=Plain(w=shared))
    assert list(model.trainable_parameters()) == ["a.w"]
    assert sorted(model.parameters()) == ["a.w", "b.w"]
    x = np.array([3.0, 5.0], np.float32)
    _, grads = nn.value_and_grad(
        model, lambda: ops.add(ops.swiglu(model.a.w, x), ops.swiglu(x, model.b.w)).sum()
    )()

    def f(w):
        return w / (1 + np.exp(-w)) * x + x / (1 + np.exp(-x)) * w

    w = shared.astype(np.float64)
    np.testing.assert_allclose(grads["a.w"], (f(w + 1e-6) - f(w - 1e-6)) / 2e-6, rtol=1e-5)
    # Frozen in one place, it is still trained through the other.
    model.a.freeze()
    assert list(model.trainable_parameters()) == ["b.w"]


def test_value_and_grad_of_a_model():
    net, x = Net(), np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)
    net.freeze()
    net.first.unfreeze()
    net.layers[1].unfreeze()
    net.parts["b"].unfreeze()

    def f(x, *, factor):
        y = net(x)
        return (y * y).sum() * factor, y, "more"

    (value, y, more), grads = nn.value_and_grad(net, f)(x, factor=2.0)
    assert value == pytest.approx(2 * (net(x).astype(np.float64) ** 2).sum(), rel=1e-6)
    assert type(y) is np.ndarray and more == "more"
    assert sorted(grads) == ["first.bias", "first.weight", "layers.1.weight", "parts.b.weight"]
    assert not grads["parts.b.weight"].any() and grads["parts.b.weight"].shape == (5, 4)
    for name, gradient in grads.items():
        array = net.parameters()[name]
        place = np.unravel_index(np.abs(gradient).argmax(), array.shape)
        before, ends = array[place], []
        for sign in (1, -1):
            array[place] = before + sign * 1e-2
            ends.append(2 * float((net(x).astype(np.float64) ** 2).sum()))
        array[place] = before
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(gradient[place], rel=2e-2, abs=1e-6)


def test_a_model_without_anything_to_train():
    value, grads = nn.value_and_grad(Net().freeze(), lambda: np.float32(2))()
    assert value == 2 and grads == {}


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    layer = nn.Linear(33, 5, bias=bias)
    assert layer.shape == (5, 33) and (layer.bias is not None) == bias
    assert 0 < np.abs(layer.weight).max() <= 1 / np.sqrt(33) and np.abs(
        layer.weight
    ).max() > 0.9 / np.sqrt(33)
    x = np.random.default_rng(0).standard_normal((2, 3, 33))
    want = x @ layer.weight.T.astype(float) + (layer.bias if bias else 0)
    np.testing.assert_allclose(layer(x), want, atol=1e-5)
    assert repr(layer) == f"Linear(in=33, out=5, bias={bias}, float32)"


@pytest.mark.parametrize(
    ("format", "quantised"),
    [
        ("f32", False),
        ("bf16", False),
        ("f16", False),
        ("q8_0", True),
        ("q4_0", True),
        ("q4_1", True),
    ],
)
def test_layers_over_stored_matrices(format, quantised):
    weight = Weight.quantize(np.random.default_rng(0).standard_normal((6, 32)), format)
    linear, table = nn.Linear.from_weight(weight), nn.Embedding.from_weight(weight)
    assert type(linear) is (nn.QuantizedLinear if quantised else nn.Linear)
    assert type(table) is (nn.QuantizedEmbedding if quantised else nn.Embedding)
    assert linear.weight is weight and linear.parameters() == {}
    assert list(linear.stored()) == ["weight"] and list(table.stored()) == ["weight"]
    x, dense = (
        np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32),
        weight.dequantize(),
    )
    np.testing.assert_allclose(linear(x), x.astype(float) @ dense.T, atol=1e-4)
    np.testing.assert_allclose(table.as_linear(x), linear(x))
    np.testing.assert_allclose(table([[5, 0]]), dense[[[5, 0]]], rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_switch_linear(bias):
    layer = nn.SwitchLinear(33, 5, 3, bias=bias)
    assert layer.shape == (3, 5, 33) and list(layer.trainable_parameters()) == [
        "weight",
        *(["bias"] if bias else []),
    ]
    assert 0.9 / np.sqrt(33) < np.abs(layer.weight).max() <= 1 / np.sqrt(33) and (
        not bias or not layer.bias.any()
    )
    assert repr(layer) == f"SwitchLinear(in=33, out=5, experts=3, bias={bias}, float32)"
    if bias:
        layer.bias[...] = np.arange(15).reshape(3, 5)
    x, experts = (
        np.random.default_rng(0).standard_normal((6, 33)).astype(np.float32),
        np.array([0, 0, 2, 2, 2, 2]),
    )
    want = np.einsum("ni,noi->no", x.astype(float), layer.weight[experts]) + (
        layer.bias[experts] if bias else 0
    )
    np.testing.assert_allclose(layer(x, np.array([0, 2, 2, 6], np.int32)), want, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "quantised"), [("f32", False), ("bf16", False), ("q8_0", True), ("q4_1", True)]
)
def test_experts_over_stored_matrices(format, quantised):
    weight = WeightStack.quantize(np.random.default_rng(0).standard_normal((2, 6, 32)), format)
    layer = nn.SwitchLinear.from_weight(weight)
    assert type(layer) is (nn.QuantizedSwitchLinear if quantised else nn.SwitchLinear)
    assert (
        layer.weight is weight and layer.parameters() == {} and layer.stored() == {"weight": weight}
    )
    x = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    want = np.concatenate(
        [x[:1] @ weight.matrices[0].dequantize().T, x[1:] @ weight.matrices[1].dequantize().T]
    )
    np.testing.assert_allclose(layer(x, np.array([0, 1, 5], np.int32)), want, atol=1e-4)


def test_norm_and_embedding():
    norm, table = nn.RMSNorm(4, eps=0.5), nn.Embedding(7, 3)
    x = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    np.testing.assert_allclose(norm(x), x / np.sqrt(7.5 + 0.5), rtol=1e-6)
    assert table.weight.shape == (7, 3) and (table(np.array([6, 6])) == table.weight[[6, 6]]).all()


def test_a_seed_gives_the_same_weights():
    made = []
    for seed in (1, 1, 2):
        pyloss.random.seed(seed)
        made.append((nn.Linear(4, 4).weight, nn.Embedding(4, 4).weight))
    assert all((a == b).all() for a, b in zip(made[0], made[1], strict=True))
    assert all((a != b).any() for a, b in zip(made[0], made[2], strict=True))


def test_a_module_without_a_forward():
    with pytest.raises(NotImplementedError, match="Plain"):
        Plain()(1)


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({}, "affine4"),
        ({"bits": 8, "group_size": 32}, "affine8"),
        ({"bits": 2, "group_size": 128}, "affine2"),
    ],
)
def test_quantised_layers_of_their_own(options, format):
    """Stored in the named format with mlx's defaults; random like the plain layer."""
    x, size = (
        np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32),
        options.get("group_size", 64),
    )
    made = {}
    for name, arguments in (
        ("Linear", (256, 5)),
        ("Embedding", (5, 256)),
        ("SwitchLinear", (256, 5, 2)),
    ):
        pyloss.random.seed(3)
        plain = getattr(nn, name)(*arguments)
        pyloss.random.seed(3)
        made[name] = layer = getattr(nn, f"Quantized{name}")(*arguments, **options)
        matrices = layer.weight.matrices if name == "SwitchLinear" else [layer.weight]
        assert layer.weight.format == format and all(
            matrix.groups.size == size for matrix in matrices
        )
        assert list(layer.trainable_parameters()) == (["bias"] if name != "Embedding" else [])
        want = [
            Weight.quantize(matrix, format, group_size=size)
            for matrix in plain.weight.reshape(-1, 5, 256)
        ]
        for matrix, other in zip(matrices, want, strict=True):
            np.testing.assert_array_equal(matrix.dequantize(), other.dequantize())
    dense = made["Linear"].weight.dequantize()
    np.testing.assert_allclose(
        made["Linear"](x), x @ dense.T.astype(float) + made["Linear"].bias, atol=1e-4
    )
    np.testing.assert_allclose(
        made["Embedding"]([1, 4]),
        made["Embedding"].weight.dequantize()[[1, 4]],
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.QuantizedLinear(96, 5), ValueError, "rows of a multiple of the group size 64, got 96"),
        (lambda: nn.QuantizedLinear(128, 5, bits=7), ValueError, "bits is 7; it must be one of 2, 3, 4, 5, 6, 8"),
        (lambda: nn.QuantizedEmbedding(128, 64, group_size=48), ValueError, "group_size must be a power of two"),
        (lambda: nn.QuantizedEmbedding(128, 64, bits="4"), TypeError, "bits is '4'; it must be a whole number"),
        (lambda: nn.QuantizedSwitchLinear(128, 5, 0), ValueError, "num_experts is 0; it must be a whole number of at least 1"),
        (lambda: nn.Linear(0, 5), ValueError, "input_dims is 0; it must be a whole number of at least 1"),
        (lambda: nn.Linear(5, 1 << 70), ValueError, "output_dims is 1180591620717411303424; it must be"),
        (lambda: nn.Linear(5, 2.0), TypeError, "output_dims is 2.0; it must be a whole number"),
        (lambda: nn.Embedding(-1, 4), ValueError, "num_embeddings is -1; it must be"),
        (lambda: nn.RMSNorm(4, eps=float("nan")), ValueError, "eps is nan; it must be a finite number of at least 0"),
    ],
)  # fmt: skip
def test_sizes_that_layers_do_not_have(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_trainable_parameters_follow_every_change_of_the_modules():
    """They are found by a walk that is kept until a module changes."""
    model = nn.Module()
    model.layers = [nn.Linear(2, 3), nn.Linear(3, 4)]
    model.named = {"a": nn.Linear(2, 2, bias=False)}

    def found():
        parameters = model.trainable_parameters()
        assert parameters == {n: p for n, p in model.parameters().items() if n not in frozen}
        return list(parameters)

    frozen = set()
    assert len(found()) == 5 and len(found()) == 5
    model.layers[0].weight = np.ones((3, 2), np.float32)
    assert model.trainable_parameters()["layers.0.weight"] is model.layers[0].weight
    model.layers.append(nn.Linear(4, 5))  # no attribute is set
    assert len(found()) == 7
    model.layers[1] = nn.Linear(7, 7, bias=False)
    assert len(found()) == 6
    model.named["b"] = model.named.pop("a")
    assert "named.b.weight" in found()
    model.layers[0].freeze(keys=["bias"])
    frozen = {"layers.0.bias"}
    assert "layers.0.bias" not in found()
    model.set_module("layers.2", nn.Linear(1, 1, bias=False))
    assert len(found()) == 4
    del model.named
    assert len(found()) == 3
    model.tied = model.layers[0]
    model.layers = []
    frozen = {"tied.bias"}
    assert found() == ["tied.weight"]


def test_a_module_in_itself_is_refused():
    parent, child = nn.Sequential(), nn.Linear(2, 2)
    parent.layers.append(child)
    child.owner = parent
    for ask in (parent.parameters, parent.freeze, parent.train, child.buffers):
        with pytest.raises(ValueError, match="is one that it is in.*begin with '_'"):
            ask()
    del child.owner
    child._owner = parent
    assert list(parent.parameters()) == ["layers.0.weight", "layers.0.bias"]


def test_load_weights_refuses_what_an_array_cannot_hold():
    net = nn.Module()
    net.w, net.ids = np.ones(2, np.float32), np.arange(2, dtype=np.uint8)
    net.mask = np.ones(2, bool)
    good = {"w": np.zeros(2, np.float16), "ids": np.array([3, 4]), "mask": np.zeros(2, bool)}
    for name, wrong in (
        ("w", np.array(["a", "b"])), ("w", np.ones(2, complex)), ("w", [None, 1]),
        ("ids", np.array([1.5, 2])), ("ids", np.array([1, 300])), ("ids", np.array([1, -1])),
        ("mask", np.array([0.5, 1])), ("mask", np.array([1, 2])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: values of .* cannot hold"):
            net.load_weights({**good, name: wrong}, strict=False)
        assert net.w[0] == 1 and net.ids[0] == 0 and net.mask[0]
    net.load_weights(good)
    assert net.w[0] == 0 and net.ids[0] == 3 and not net.mask[0]


def test_weights_are_saved_while_they_are_differentiated(tmp_path):
    net = nn.Linear(2, 2)
    nn.value_and_grad(net, lambda: (net.save_weights(tmp_path / "w"), net.weight.sum())[1])()
    other = nn.Linear(2, 2).load_weights(tmp_path / "w")
    np.testing.assert_array_equal(other.weight, net.weight)


def test_a_module_without_super_init_is_named():
    class Forgetful(nn.Module):
        def __init__(self):
            self.weight = np.ones(2, np.float32)

    parent = nn.Sequential(Forgetful())
    for ask in (Forgetful().parameters, parent.trainable_parameters, parent.eval):
        with pytest.raises(TypeError, match=r"Forgetful\.__init__ .*super\(\)\.__init__\(\)"):
            ask()


def test_numbers_and_arrays_of_a_class_are_not_trained_and_say_so():
    class Scaled(nn.Module):
        shared = np.ones(2, np.float32)
        own = np.ones(2, np.float32)
        _table = np.ones(2, np.float32)
        steps = np.arange(2)

        def __init__(self):
            super().__init__()
            self.alpha, self.beta, self._gamma = np.float32(1), 1.0, np.float32(2)
            self.own = np.ones(2, np.float32)

    model = nn.Sequential(Scaled())
    with pytest.warns(UserWarning, match=r"not trained.*: layers\.0\.alpha, layers\.0\.shared\."):
        assert list(model.trainable_parameters()) == ["layers.0.own"]
