"""Functions of mlx.core beside the installed MLX on the processor: values, types and gradients."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")
import mlx.core as theirs

import pyloss.mlx.core as ours

theirs.set_default_device(theirs.cpu)

#: Inputs by name: their shape, and how they are drawn.
INPUTS = {
    "x": ((3, 4), lambda r, s: r.normal(size=s)),
    "y": ((3, 4), lambda r, s: r.normal(size=s)),
    "row": ((4,), lambda r, s: r.normal(size=s)),
    "p": ((3, 4), lambda r, s: r.uniform(0.1, 0.9, s)),
    "q": ((3, 4), lambda r, s: r.uniform(1.1, 2.0, s)),
    "w": ((5, 4), lambda r, s: r.normal(size=s)),
    "m": ((2, 4, 3), lambda r, s: r.normal(size=s)),
    "z": ((2, 3, 4), lambda r, s: r.normal(size=s)),
    "i": ((3, 4), lambda r, s: r.integers(-3, 4, s).astype(np.int32)),
    "j": ((3, 2), lambda r, s: r.integers(0, 4, s).astype(np.int32)),
    "b": ((3, 4), lambda r, s: r.random(s) < 0.5),
}

#: (a function of mx and arrays, the arrays' names, how many of them get a gradient)
CASES = {
    **{
        name: (lambda mx, a, name=name: getattr(mx, name)(a), inputs, 1)
        for names, inputs in [
            ("exp expm1 sin cos tan sinh cosh tanh arcsinh arctan sigmoid square negative abs erf "
             "positive asinh atan degrees radians conj", "x"),
            ("log log2 log10 log1p sqrt rsqrt reciprocal arcsin arccos arctanh asin acos atanh",
             "p"),
            ("arccosh acosh", "q"),
        ]
        for name in names.split()
    },
    **{
        name: (lambda mx, a, name=name: getattr(mx, name)(a), inputs, 0)
        for names, inputs in [
            ("sign floor ceil trunc isnan isinf isfinite logical_not round isposinf isneginf", "x"),
            ("abs negative square sign exp sqrt_of_abs", "i"),
        ]
        for name in names.split()
        if name != "sqrt_of_abs" and not (inputs == "i" and name in ("exp", "abs"))
    },
    **{
        name: (lambda mx, a, b, name=name: getattr(mx, name)(a, b), "x y", 2)
        for name in "add subtract multiply divide maximum minimum logaddexp arctan2 atan2 inner "
        "outer kron".split()
    },
    **{
        name: (lambda mx, a, b, name=name: getattr(mx, name)(a, b), "x y", 0)
        for name in "equal not_equal less less_equal greater greater_equal floor_divide".split()
    },
    **{
        name: (lambda mx, a, b, name=name: getattr(mx, name)(a, b), "b b", 0)
        for name in "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor".split()
    },
    **{
        f"{name} {axis} {keep}": (
            lambda mx, a, name=name, axis=axis, keep=keep: getattr(mx, name)(
                a, axis=axis, keepdims=keep
            ),
            "z",
            1,
        )
        for name in ("sum", "mean", "var", "std", "max", "min", "logsumexp", "prod")
        for axis, keep in [(None, False), (1, True), (-1, False), ([0, 2], False)]
    },
    **{
        f"{name} of {kind}": (lambda mx, a, name=name: getattr(mx, name)(a, axis=-1), kind, 0)
        for name in ("sum", "mean", "var", "max", "prod", "cumsum", "softmax", "logsumexp", "all",
                     "any", "argmax", "argmin", "sort", "argsort", "cummax", "cummin", "cumprod")
        for kind in ("i", "b", "x")
    },
    "remainder": (lambda mx, a, b: mx.remainder(a, b), "q p", 2),
    "power": (lambda mx, a, b: mx.power(a, b), "p x", 2),
    "power of a number": (lambda mx, a: a**3 + 2**a, "x", 1),
    "int power": (lambda mx, a: a**2, "i", 0),
    "int times float": (lambda mx, a: a * 2.5, "i", 0),
    "int divided": (lambda mx, a: a / 2, "i", 0),
    "bool plus int": (lambda mx, a: a + 1, "b", 0),
    "mask times float": (lambda mx, a, b: a * b, "x b", 1),
    "int and float": (lambda mx, a, b: a * b + b, "x i", 1),
    "divmod": (lambda mx, a, b: mx.divmod(a, b)[0], "q p", 0),
    "where": (lambda mx, a, b, c: mx.where(c, a, b), "x y b", 2),
    "where inf": (lambda mx, a, c: mx.exp(mx.where(c, a, -float("inf"))), "x b", 1),
    "clip": (lambda mx, a: mx.clip(a, -0.5, 0.5), "x", 1),
    "clip below": (lambda mx, a: mx.clip(a, None, 0.5), "x", 1),
    "nan_to_num": (lambda mx, a: mx.nan_to_num(a / mx.floor(mx.abs(a))), "x", 0),
    "softmax all": (lambda mx, a: mx.softmax(a), "z", 1),
    "softmax": (lambda mx, a: mx.softmax(a, axis=1, precise=True), "z", 1),
    "cumsum": (lambda mx, a: mx.cumsum(a, axis=1), "z", 1),
    "cumsum back": (lambda mx, a: mx.cumsum(a, axis=0, reverse=True, inclusive=False), "z", 1),
    "cumsum flat": (lambda mx, a: mx.cumsum(a), "z", 1),
    "cumprod exclusive": (lambda mx, a: mx.cumprod(a, axis=1, inclusive=False), "z", 0),
    "logcumsumexp": (lambda mx, a: mx.logcumsumexp(a, axis=1), "z", 0),
    "median": (lambda mx, a: mx.median(a, axis=1), "z", 0),
    "sort grad": (lambda mx, a: mx.sort(a, axis=0), "z", 1),
    "topk": (lambda mx, a: mx.sort(mx.topk(a, 2, axis=-1), axis=-1), "z", 0),
    "minmax": (lambda mx, a: mx.minmax(a, axis=1)[1], "z", 0),
    "count_nonzero": (lambda mx, a: mx.count_nonzero(a, axis=1), "i", 0),
    "searchsorted": (lambda mx, a, b: mx.searchsorted(mx.sort(a), b), "row x", 0),
    "reshape": (lambda mx, a: mx.reshape(a, (4, -1)), "z", 1),
    "flatten": (lambda mx, a: mx.flatten(a, 1, 2), "z", 1),
    "unflatten": (lambda mx, a: mx.unflatten(a, -1, (2, -1)), "z", 1),
    "squeeze": (lambda mx, a: mx.squeeze(mx.expand_dims(a, (0, 2)), axis=2), "z", 1),
    "moveaxis": (lambda mx, a: mx.moveaxis(a, 0, -1), "z", 1),
    "swapaxes": (lambda mx, a: mx.swapaxes(a, 0, 2), "z", 1),
    "transpose": (lambda mx, a: mx.transpose(a, (2, 0, 1)), "z", 1),
    "permute_dims": (lambda mx, a: mx.permute_dims(a), "z", 1),
    "matrix_transpose": (lambda mx, a: mx.matrix_transpose(a), "z", 1),
    "flip": (lambda mx, a: mx.flip(a, 1), "z", 1),
    "roll": (lambda mx, a: mx.roll(a, 2, 1), "z", 1),
    "broadcast_to": (lambda mx, a: mx.broadcast_to(a, (3, 4)), "row", 1),
    "broadcast_arrays": (lambda mx, a, b: mx.broadcast_arrays(a, b)[1], "x row", 2),
    "concatenate": (lambda mx, a, b: mx.concatenate([a, b], axis=1), "x y", 2),
    "concat": (lambda mx, a, b: mx.concat([a, b], axis=None), "x row", 2),
    "stack": (lambda mx, a, b: mx.stack([a, b], axis=1), "x y", 2),
    "unstack": (lambda mx, a: mx.unstack(a, axis=1)[2], "z", 1),
    "split": (lambda mx, a: mx.split(a, 2, axis=-1)[1], "z", 1),
    "split places": (lambda mx, a: mx.split(a, [1, 3], axis=-1)[1], "z", 1),
    "repeat": (lambda mx, a: mx.repeat(a, 3, axis=1), "z", 1),
    "tile": (lambda mx, a: mx.tile(a, (2, 1)), "x", 1),
    "pad": (lambda mx, a: mx.pad(a, [(1, 2), (0, 1)], constant_values=2.0), "x", 1),
    "pad edge": (lambda mx, a: mx.pad(a, 1, mode="edge"), "x", 1),
    "take": (lambda mx, a, b: mx.take(a, b, axis=1), "x j", 1),
    "take flat": (lambda mx, a, b: mx.take(a, b), "x j", 1),
    "take_along_axis": (lambda mx, a, b: mx.take_along_axis(a, b, axis=1), "x j", 1),
    "put_along_axis": (
        lambda mx, a, b: mx.put_along_axis(a, mx.array([[1], [0], [2]]), b[:, :1], axis=1),
        "x y",
        2,
    ),
    "tril": (lambda mx, a: mx.tril(a, 1), "x", 1),
    "triu": (lambda mx, a: mx.triu(a, -1), "z", 1),
    "diag": (lambda mx, a: mx.diag(a, 1), "row", 1),
    "diagonal": (lambda mx, a: mx.diagonal(a, 1), "x", 1),
    "trace": (lambda mx, a: mx.trace(a), "x", 1),
    "diff": (lambda mx, a: mx.diff(a, axis=0), "z", 1),
    "atleast_2d": (lambda mx, a: mx.atleast_2d(a), "row", 1),
    "atleast_3d": (lambda mx, a: mx.atleast_3d(a), "x", 1),
    "as_strided": (lambda mx, a: mx.as_strided(a, (3, 2), (1, 4), 1), "x", 1),
    "contiguous": (lambda mx, a: mx.contiguous(a.T), "x", 1),
    "view": (lambda mx, a: mx.view(a, mx.int32), "x", 0),
    "slice": (lambda mx, a: mx.slice(a, mx.array([1]), (0,), (2, 4)), "x", 1),
    "slice_update": (
        lambda mx, a, b: mx.slice_update(a, b[:2, :2], mx.array([1, 2]), (0, 1)), "x y", 2,
    ),
    "matmul": (lambda mx, a, b: a @ b, "z m", 2),
    "matmul vector": (lambda mx, a, b: mx.matmul(a, b), "x row", 2),
    "addmm": (lambda mx, a, b, c: mx.addmm(a[:, :3], b[0], c[0], 0.5, 2.0), "x z m", 3),
    "tensordot": (lambda mx, a, b: mx.tensordot(a, b.T, 1), "x w", 2),
    "tensordot axes": (lambda mx, a, b: mx.tensordot(a, b, [[1], [0]]), "x row", 2),
    "vecdot": (lambda mx, a, b: mx.vecdot(a, b), "x y", 2),
    "einsum": (lambda mx, a, b: mx.einsum("bij,bjk->ik", a, b), "z m", 2),
    "linalg.norm": (lambda mx, a: mx.linalg.norm(a, axis=-1, keepdims=True), "x", 1),
    "linalg.norm 1": (lambda mx, a: mx.linalg.norm(a, ord=1, axis=-1), "x", 1),
    "linalg.norm all": (lambda mx, a: mx.linalg.norm(a), "x", 1),
    "index": (lambda mx, a: a[1], "z", 1),
    "index list": (lambda mx, a, b: a[:, b[0]], "x j", 1),
    "index pairs": (lambda mx, a, b: a[mx.arange(3), b[:, 0]], "x j", 1),
    "index none": (lambda mx, a: a[..., None, ::2], "z", 1),
    "set": (lambda mx, a, b: _set(a, (slice(1, None), 0), b[:2, 0]), "x y", 2),
    "set number": (lambda mx, a: _set(a, (slice(None), 1), -1.0), "x", 1),
    "at add": (lambda mx, a, b, c: a.at[:, c[0]].add(b[:, :2]), "x y j", 2),
    "at subtract": (lambda mx, a, b: a.at[0].subtract(b[1]), "x y", 2),
    "at multiply": (lambda mx, a, b: a.at[0].multiply(b[1]), "x y", 2),
    "at divide": (lambda mx, a, b: a.at[1:].divide(b[1:]), "x q", 2),
    "at maximum": (lambda mx, a, b: a.at[0].maximum(b[1]), "x y", 0),
    "in place": (lambda mx, a, b: _in_place(a * 1, b), "x y", 2),
    "rsub": (lambda mx, a: 1 - a + 2 / (3 + a * a) - (-a), "x", 1),
    "rms_norm": (lambda mx, a, b: mx.fast.rms_norm(a, b, 1e-5), "z row", 2),
    "rms_norm plain": (lambda mx, a: mx.fast.rms_norm(a, None, 1e-5), "z", 1),
    "layer_norm": (lambda mx, a, b: mx.fast.layer_norm(a, b, 2 * b, 1e-5), "z row", 2),
    "layer_norm plain": (lambda mx, a: mx.fast.layer_norm(a, None, None, 1e-5), "z", 1),
    "cross_entropy": (lambda mx, a, b: mx.fast.cross_entropy(a, b[:, 0]), "x j", 1),
    "stop_gradient": (lambda mx, a: mx.stop_gradient(a * 2) * a, "x", 1),
    # MLX 0.32's gradient of full on the processor is not the sum of the copies' gradients.
    "full": (lambda mx, a: mx.full((2, 3, 4), a), "x", 0),
    "conv1d": (
        lambda mx, a, b: mx.conv1d(a, mx.stack([b[0].T, b[1].T, b[0].T]), padding=1, stride=2),
        "z m",
        2,
    ),
}  # fmt: skip


def _set(a, index, value):
    a[index] = value
    return a


def _in_place(a, b):
    c = a
    a += b
    a *= 2
    a -= 1
    a /= 3
    return c + a


def drawn(names):
    rng = np.random.default_rng(7)
    values = {}
    for name, (shape, draw) in INPUTS.items():
        found = draw(rng, shape)
        values[name] = found.astype(np.float32) if found.dtype == np.float64 else found
    return [values[name] for name in names.split()]


def plain(mx, x):
    return np.array(x.astype(mx.float32)) if x.dtype == mx.bfloat16 else np.array(x)


@pytest.mark.parametrize("name", CASES)
def test_values_and_types(name):
    function, inputs, _ = CASES[name]
    values = drawn(inputs)
    want, found = (plain(mx, function(mx, *map(mx.array, values))) for mx in (theirs, ours))
    assert found.shape == want.shape and found.dtype == want.dtype
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_gradients(name):
    function, inputs, count = CASES[name]
    values = drawn(inputs)
    shape = np.array(function(theirs, *map(theirs.array, values))).shape
    factors = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    found = []
    for mx in (theirs, ours):
        loss = lambda *xs, mx=mx: (function(mx, *xs) * mx.array(factors)).sum()
        grads = mx.grad(loss, argnums=list(range(count)))(*map(mx.array, values))
        found.append([np.array(g) for g in (grads if count > 1 else [grads])])
    for mine, its in zip(found[1], found[0], strict=True):
        assert mine.dtype == its.dtype
        np.testing.assert_allclose(mine, its, rtol=2e-5, atol=2e-5)


METHODS = [
    "abs", "all", "any", "argmax", "argmin", "conj", "cos", "cummax", "cummin", "cumprod",
    "cumsum", "diag", "diagonal", "exp", "flatten", "log", "log10", "log1p", "log2",
    "logcumsumexp", "logsumexp", "max", "mean", "min", "prod", "reciprocal", "round", "rsqrt",
    "sin", "sqrt", "square", "squeeze", "std", "sum", "transpose", "var", "tolist",
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    (value,) = drawn("q")
    want, found = (np.array(getattr(mx.array(value), name)()) for mx in (theirs, ours))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    assert found.dtype == want.dtype


def test_every_method_of_mlx_is_there():
    names = {name for name in dir(theirs.array) if not name.startswith("__")}
    assert names - set(dir(ours.array)) == set()


CREATED = {
    "zeros": lambda mx: mx.zeros((2, 3)),
    "zeros int": lambda mx: mx.zeros(4, mx.int32),
    "ones": lambda mx: mx.ones([2, 3], dtype=mx.bfloat16),
    "full": lambda mx: mx.full((2,), 3),
    "full float": lambda mx: mx.full((2,), 3.5),
    "full dtype": lambda mx: mx.full((2,), 3, dtype=mx.float16),
    "zeros_like": lambda mx: mx.zeros_like(mx.array([1, 2])),
    "ones_like": lambda mx: mx.ones_like(mx.array([1.0, 2])),
    "full_like": lambda mx: mx.full_like(mx.array([1.0, 2]), 3),
    "eye": lambda mx: mx.eye(3, 4, k=1),
    "identity": lambda mx: mx.identity(3),
    "tri": lambda mx: mx.tri(3, 4, k=-1),
    "arange": lambda mx: mx.arange(5),
    "arange float": lambda mx: mx.arange(1.0, 3, 0.5),
    "arange dtype": lambda mx: mx.arange(1, 8, 2, dtype=mx.float16),
    "linspace": lambda mx: mx.linspace(0, 1, 5),
    "meshgrid": lambda mx: mx.meshgrid(mx.arange(3), mx.arange(2))[0],
    "bartlett": lambda mx: mx.bartlett(6),
    "hanning": lambda mx: mx.hanning(6),
    "hamming": lambda mx: mx.hamming(6),
    "blackman": lambda mx: mx.blackman(6),
    "array": lambda mx: mx.array([1, 2]),
    "array of floats": lambda mx: mx.array([[1, 2.5], [3, 4]]),
    "array of bool": lambda mx: mx.array([True, False]),
    "array of doubles": lambda mx: mx.array(np.array([1.5])),
    "array of longs": lambda mx: mx.array(np.array([1, 2])),
    "array of large": lambda mx: mx.array([2**40]),
    "array of arrays": lambda mx: mx.array([mx.array(1), mx.array(2.5)]),
    "array dtype": lambda mx: mx.array([1, 2], dtype=mx.bfloat16),
    "empty list": lambda mx: mx.array([]),
    "asarray": lambda mx: mx.asarray([1, 2]),
    "astype": lambda mx: mx.array([1.7, -2.3]).astype(mx.int32),
    "bf16 math": lambda mx: mx.array([1.5, 2.5], dtype=mx.bfloat16) * 3 + 1,
    **{
        f"bf16 {name}": lambda mx, function=function: function(
            mx, mx.array([1.5, -2.5, 3.1], dtype=mx.bfloat16)
        )
        for name, function in {
            "times 0.1": lambda mx, b: b * 0.1,
            "over": lambda mx, b: 1.1 / b,
            "where": lambda mx, b: mx.where(b > 0, b, 0.1),
            "maximum": lambda mx, b: mx.maximum(b, 0.1),
            "clip": lambda mx, b: mx.clip(b, 0.1, 2.7),
            "mean": lambda mx, b: b.mean(),
            "dot": lambda mx, b: b @ b,
            "tensordot": lambda mx, b: mx.tensordot(b, b, 1),
            "einsum": lambda mx, b: mx.einsum("i,j->ij", b, b),
        }.items()
    },
    "f16 and bf16": lambda mx: mx.array([1.5], mx.bfloat16) + mx.array([1.0], mx.float16),
    "f16 and int": lambda mx: mx.array([1.5], mx.float16) * mx.array([3]),
}


@pytest.mark.parametrize("name", CREATED)
def test_creation(name):
    want, found = (CREATED[name](mx) for mx in (theirs, ours))
    assert str(want.dtype).removeprefix("mlx.core.") == str(found.dtype).removesuffix("_")
    np.testing.assert_allclose(plain(ours, found), plain(theirs, want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims, offset, scale", [(8, 0, 1.0), (4, 3, 0.5), (8, [1, 5], 1.0)])
def test_rope(traditional, dims, offset, scale):
    rng = np.random.default_rng(3)
    value, weights = rng.normal(size=(2, 2, 3, 5, 8)).astype(np.float32)
    found = []
    for mx in (theirs, ours):
        settings = {"traditional": traditional, "scale": scale, "offset": mx.array(offset)}

        def loss(x, mx=mx, settings=settings):
            y = mx.fast.rope(x, dims, base=100.0, **settings)
            freqs = mx.arange(1, dims // 2 + 1).astype(mx.float32)
            y = y + mx.fast.rope(x, dims, base=None, freqs=freqs, **settings)
            return (y * mx.array(weights)).sum(), y

        (_, y), grad = mx.value_and_grad(loss)(mx.array(value))
        found.append([np.array(x) for x in (y, grad)])
    np.testing.assert_allclose(found[1][0], found[0][0], atol=2e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=2e-5)


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
def test_attention(mask):
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in [(2, 4, 3, 8), *[(2, 2, 5, 8)] * 2])
    given = {"bool": rng.random((3, 5)) < 0.7, "float": rng.normal(size=(3, 5)).astype("f4")}
    found = []
    for mx in (theirs, ours):
        m = mx.array(given[mask]) if mask in given else mask

        def loss(q, k, v, mx=mx, m=m):
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=m)
            return y.square().sum(), y

        (_, y), grads = mx.value_and_grad(loss, (0, 1, 2))(*map(mx.array, (q, k, v)))
        found.append([np.array(x) for x in (y, *grads)])
    for mine, its in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantization(bits, dtype):
    value = np.random.default_rng(3).normal(size=(6, 128)).astype(np.float32)
    x = np.random.default_rng(4).normal(size=(3, 128)).astype(np.float32)
    found = []
    for mx in (theirs, ours):
        parts = mx.quantize(mx.array(value).astype(getattr(mx, dtype)), 64, bits)
        back = mx.dequantize(*parts, 64, bits)
        product = mx.quantized_matmul(mx.array(x), *parts, group_size=64, bits=bits)
        found.append([plain(mx, p) for p in (*parts, back, product)])
    for mine, its in zip(found[1][:3], found[0][:3], strict=True):
        np.testing.assert_array_equal(mine, its)
    # MLX computes the values of short floats in their type, pyloss in float32.
    atol = 0.05 if dtype == "bfloat16" else 1e-4
    np.testing.assert_allclose(found[1][3], found[0][3], atol=atol)
    np.testing.assert_allclose(found[1][4], found[0][4], rtol=1e-2, atol=100 * atol)


@pytest.mark.parametrize("ending", ["safetensors", "npz", "npy"])
def test_files_go_both_ways(tmp_path, ending):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.arange(3, dtype="i4")}
    for writer, reader in ((theirs, ours), (ours, theirs)):
        path = str(tmp_path / f"x.{ending}")
        arrays = {name: writer.array(v) for name, v in values.items()}
        if ending == "npy":
            writer.save(path, arrays["a"])
            found = {"a": reader.load(path)}
        elif ending == "npz":
            writer.savez(path, **arrays)
            found = reader.load(path)
        else:
            arrays["h"] = writer.array([1.5, 2.5], dtype=writer.bfloat16)
            writer.save_safetensors(path, arrays, metadata={"k": "v"})
            found, metadata = reader.load(path, return_metadata=True)
            assert metadata["k"] == "v" and found["h"].dtype == reader.bfloat16
            assert found.pop("h").astype(reader.float32).tolist() == [1.5, 2.5]
        for name, value in found.items():
            np.testing.assert_array_equal(np.array(value), values[name])
            assert str(value.dtype).endswith(str(values[name].dtype))


def test_grad_by_names_and_trees():
    found = []
    for mx in (theirs, ours):

        def loss(params, x, *, scale, mx=mx):
            return (params["w"][0] * x * scale + params["b"]).sum()

        tree = {"w": [mx.array([1.0, 2.0])], "b": mx.array(3.0)}
        x, scale = mx.array([4.0, 5.0]), mx.array(2.0)
        value, (grads, named) = mx.value_and_grad(loss, argnums=0, argnames="scale")(
            tree, x, scale=scale
        )
        only = mx.grad(loss, argnames=["scale"])(tree, x, scale=scale)
        several = mx.grad(loss, argnums=(1, 0))(tree, x, scale=scale)
        assert only[0] is None and isinstance(several, tuple)
        found.append(
            [value.item(), grads["w"][0].tolist(), grads["b"].item(), named["scale"].item(),
             only[1]["scale"].item(), several[1].tolist()]
        )  # fmt: skip
    assert found[0] == found[1]


def test_custom_functions_and_vjp():
    found = []
    for mx in (theirs, ours):

        @mx.custom_function
        def scaled(x, y, mx=mx):
            return mx.exp(x) * y

        @scaled.vjp
        def scaled_vjp(primals, cotangent, output):
            x, _ = primals
            return cotangent * output * 2, cotangent * x

        def loss(x, y, scaled=scaled):
            return scaled(x, y).square().sum()

        x, y = mx.array([0.5, 1.0]), mx.array([2.0, 3.0])
        grads = mx.grad(loss, (0, 1))(x, y)
        outs, back = mx.vjp(lambda x, y: [x * y, x + y], [x, y], [y, x])
        found.append([np.array(a) for a in (*grads, *outs, *back)])
    for mine, its in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5)


def test_checkpoint_and_compile():
    found = []
    for mx in (theirs, ours):
        inner = mx.checkpoint(lambda tree, x, mx=mx: mx.tanh(tree["w"] @ x) * 2)

        @mx.compile
        def loss(tree, x, inner=inner):
            return inner(tree, inner(tree, x)).sum()

        tree = {"w": mx.array([[1.0, 0.5], [0.2, 0.3]])}
        value, grads = mx.value_and_grad(loss)(tree, mx.array([1.0, 2.0]))
        found.append([np.array(value), np.array(grads["w"])])
    for mine, its in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5)
