"""Every adapter over one matrix and every base: values, gradients, and fusing."""

import warnings

import numpy as np
import pytest
from dense_adapters import (
    CLASSES,
    adapted,
    dense,
    make_base,
    masked,
    norms,
    parameters,
    seeded_mask,
    trained,
)
from stored_weights import QUANTISED

import pyloss
from pyloss import _core, nn
from pyloss.tuner import DoRAEmbedding, DoRALinear, LoRAEmbedding, LoRALinear
from pyloss.weights.weight import FORMATS

BASES = ["plain", *FORMATS]
IDS = np.array([[3, 11, 0], [3, 7, 3]])
EMBEDDINGS = [LoRAEmbedding, DoRAEmbedding]

pytestmark = pytest.mark.filterwarnings("ignore:storing the fused weight")


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def calls(layer, rng):
    """The ways to call a layer: by rows; a table also by ids and as a head."""
    x = rng.standard_normal((7, layer.shape[1])).astype(np.float32)
    return [(layer, IDS), (layer.as_linear, x)] if layer.base_name == "embedding" else [(layer, x)]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("cls", CLASSES)
def test_it_begins_as_its_base(rng, cls, kind):
    base = make_base(rng, cls, kind)
    layer = cls.from_base(base, r=3, scale=5.0)
    assert layer.base is base and set(layer.trainable_parameters()) == set(layer.parameter_names())
    assert all(getattr(layer, name).dtype == np.float32 for name in layer.parameter_names())
    if layer.kind == "dora":
        np.testing.assert_allclose(layer.m, np.linalg.norm(dense(base), axis=1), rtol=1e-6)
    x = rng.standard_normal((6, base.shape[1])).astype(np.float32)
    if cls in EMBEDDINGS:
        np.testing.assert_array_equal(layer.as_linear(x), base.as_linear(x))
        np.testing.assert_allclose(layer(IDS), base(IDS), rtol=0 if layer.kind == "lora" else 2e-7)
    else:
        for rows in (1, 6):
            np.testing.assert_array_equal(layer(x[:rows]), base(x[:rows]))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("cls", CLASSES)
def test_forward_and_gradients(rng, cls, kind):
    layer = trained(rng, cls, make_base(rng, cls, kind), dropout=0.0)
    for call, x in calls(layer, rng):
        check(rng, layer, call, x, np.ones(()))


@pytest.mark.parametrize("kind", ["plain", "q4_1"])
@pytest.mark.parametrize("cls", CLASSES)
def test_dropout_forward_and_gradients(rng, cls, kind):
    """Dropout acts on the adapter's branch only: inside DoRA's scaled sum, not in the norm."""
    layer = trained(rng, cls, make_base(rng, cls, kind), dropout=0.4)
    for call, x in calls(layer, rng):
        shape = (*np.shape(x), layer.shape[1]) if x is IDS else x.shape
        check(rng, layer, call, x, seeded_mask(layer, shape))
        layer.eval()
        np.testing.assert_allclose(
            call(x), masked(layer, x, parameters(layer), 1.0, norms(layer)), rtol=1e-4, atol=1e-4
        )
        layer.train()


def check(rng, layer, call, x, mask):
    """Compare values with float64 and gradients with differences; DoRA's norm is constant."""
    p, norm = parameters(layer), norms(layer)
    want = masked(layer, x, p, mask, norm)
    y = call(x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    dy = rng.standard_normal(want.shape)
    pyloss.random.seed(5)
    _, grads = nn.value_and_grad(layer, lambda: (call(x) * dy.astype(np.float32)).sum())()
    assert grads.keys() == p.keys()
    for name, gradient in grads.items():
        numeric = np.zeros(p[name].size)
        # The outputs are linear in each parameter, so a long step is exact.
        for i in range(numeric.size):
            moved = p[name].copy()
            moved.flat[i] += 1
            numeric[i] = ((masked(layer, x, {**p, name: moved}, mask, norm) - want) * dy).sum()
        np.testing.assert_allclose(
            gradient.reshape(-1),
            numeric,
            rtol=1e-4,
            atol=1e-5 * np.abs(numeric).max(),
            err_msg=name,
        )
    if x is not IDS:
        pyloss.random.seed(5)
        dx = pyloss.grad(lambda v: (call(v) * dy.astype(np.float32)).sum())(x)
        columns = [
            ((masked(layer, x + np.eye(x.shape[1])[j], p, shifted(mask, x), norm) - want) * dy).sum(
                axis=1
            )
            for j in range(8)
        ]
        np.testing.assert_allclose(
            dx[:, :8], np.stack(columns, axis=1), rtol=1e-4, atol=1e-4 * np.abs(dx).max()
        )


def shifted(mask, x):
    return np.broadcast_to(mask, x.shape)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_base_that_is_unfrozen_is_trained_too(rng, cls):
    layer = trained(rng, cls, make_base(rng, cls, "plain"))
    layer.unfreeze()
    for call, x in calls(layer, rng):
        p, norm = parameters(layer), norms(layer)
        want = masked(layer, x, p, 1.0, norm)
        dy = rng.standard_normal(want.shape).astype(np.float32)
        _, grads = nn.value_and_grad(layer, lambda call=call, x=x, dy=dy: (call(x) * dy).sum())()
        gradient, weight = grads[f"{cls.base_name}.weight"], layer.base.weight
        for row, column in [(3, 0), (11, 63), (0, 7), (5, 5)]:
            before = weight[row, column]
            weight[row, column] = before + 1
            numeric = ((masked(layer, x, p, 1.0, norm) - want) * dy).sum()
            weight[row, column] = before
            assert gradient[row, column] == pytest.approx(numeric, rel=1e-4, abs=1e-4)
        if f"{cls.base_name}.bias" in grads:
            np.testing.assert_allclose(grads[f"{cls.base_name}.bias"], dy.sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("cls", EMBEDDINGS)
def test_only_rows_that_were_read_get_a_gradient(rng, cls):
    layer = trained(rng, cls, make_base(rng, cls, "q8_0"))
    _, grads = nn.value_and_grad(layer, lambda: (layer(IDS) * layer(IDS)).sum())()
    touched = np.isin(np.arange(12), IDS)
    for name in set(layer.parameter_names()) - {"lora_b"}:
        assert grads[name][touched].all() and not grads[name][~touched].any()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("cls", CLASSES)
def test_fusing(rng, cls, kind):
    base = make_base(rng, cls, kind)
    layer = trained(rng, cls, base)
    want, before = adapted(layer, parameters(layer)), dense(base)
    encodes = kind == "plain" or FORMATS[kind].encodes
    for dequantize in (False, True) if encodes else (True,):
        fused = layer.fuse(dequantize)
        assert isinstance(fused, cls.base_type) and not fused.trainable_parameters()
        assert dense(base).tobytes() == before.tobytes()
        if kind == "plain":
            assert isinstance(fused.weight, np.ndarray)
        else:
            assert fused.weight.format == ("f32" if dequantize and kind in QUANTISED else kind)
        exact = kind in ("plain", "f32") or (dequantize and kind in QUANTISED)
        error = np.linalg.norm(dense(fused) - want) / np.linalg.norm(want)
        assert error < (3e-7 if exact else {"bf16": 2e-3, "f16": 3e-4}.get(kind, 0.5))
        if exact:
            for (call, x), again in zip(calls(layer, rng), fused_calls(fused), strict=True):
                np.testing.assert_allclose(again(x), call(x), rtol=1e-4, atol=1e-4)
        if cls.base_name == "linear":
            assert fused.bias is base.bias
    np.testing.assert_allclose(layer.delta(), want - before, rtol=1e-3, atol=1e-5)


def fused_calls(layer):
    return [layer, layer.as_linear] if isinstance(layer, nn.Embedding) else [layer]


@pytest.mark.parametrize("cls", CLASSES)
def test_how_much_storing_keeps_is_known_and_little_is_warned_of(rng, cls):
    layer = trained(rng, cls, make_base(rng, cls, "q4_0"), size=1e-4)
    if layer.kind == "dora":
        layer.m[...] = np.linalg.norm(dense(layer.base), axis=1)
    with pytest.warns(
        UserWarning, match=r"q4_0 keeps \d+% of the adapter; fuse\(dequantize=True\)"
    ):
        layer.fuse()
    assert layer.fused().kept < 0.5 and layer.fused(dequantize=True).kept == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        large = trained(rng, cls, make_base(rng, cls, "q8_0"))
        large.fuse()
    assert 0.99 < large.fused().kept < 1


@pytest.mark.parametrize("cls", CLASSES)
def test_threads_and_seeds(rng, cls):
    """Dropout depends only on the seed, not on the number of threads."""
    layer = trained(rng, cls, make_base(rng, cls, "q4_1"), dropout=0.5)
    threads = _core.num_threads()
    try:
        for call, x in calls(layer, rng):
            found = []
            for count in (1, 2, 5):
                pyloss.set_num_threads(count)
                pyloss.random.seed(3)
                _, grads = nn.value_and_grad(
                    layer, lambda call=call, x=x: (call(x) * call(x)).sum()
                )()
                found.append([g.tobytes() for g in grads.values()])
            assert found[0] == found[1] == found[2]
            assert (call(x) != call(x)).any()
    finally:
        pyloss.set_num_threads(threads)


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (LoRALinear, nn.Embedding(3, 4)),
        (DoRALinear, nn.RMSNorm(3)),
        (LoRAEmbedding, nn.Linear(3, 4)),
        (DoRAEmbedding, None),
    ],
)
def test_bases_that_cannot_be(cls, bad):
    with pytest.raises(
        TypeError,
        match=f"{cls.__name__} goes over an? {cls.base_type.__name__}, not {type(bad).__name__}",
    ):
        cls.from_base(bad)


@pytest.mark.parametrize("rank", [0, -2, 65537, 1.5, "8", True, None])
@pytest.mark.parametrize("cls", CLASSES)
def test_ranks_that_cannot_be(rng, cls, rank):
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 65536"):
        cls.from_base(make_base(rng, cls, "plain"), r=rank)


@pytest.mark.parametrize("dropout", [1.0, -0.1, 2])
@pytest.mark.parametrize("cls", CLASSES)
def test_dropouts_that_cannot_be(rng, cls, dropout):
    with pytest.raises(ValueError, match="dropout"):
        cls.from_base(make_base(rng, cls, "plain"), dropout=dropout)


@pytest.mark.parametrize("rank", [1, 12, 33, 64, 150, np.int64(5)])
@pytest.mark.parametrize("cls", CLASSES)
def test_ranks_that_can(rng, cls, rank):
    layer = trained(rng, cls, make_base(rng, cls, "q8_0"), r=rank)
    for call, x in calls(layer, rng):
        want = masked(layer, x, parameters(layer), 1.0, norms(layer))
        np.testing.assert_allclose(call(x), want, rtol=1e-3, atol=1e-5 * np.abs(want).max())


def test_they_can_be_made_without_a_base():
    for cls in (LoRALinear, DoRALinear):
        layer = cls(6, 4, r=2, bias=True)
        assert (
            layer.linear.shape == (4, 6) and layer.linear.bias is not None and layer.scale == 20.0
        )
        assert f"{cls.__name__}(r=2" in repr(layer) and list(layer.trainable_parameters()) == list(
            layer.parameter_names()
        )
    table = DoRAEmbedding(10, 4, r=2)
    assert (
        table.embedding.shape == (10, 4)
        and table.m.shape == (10,)
        and table.lora_a.shape == (10, 2)
    )
    assert "DoRAEmbedding(r=2" in repr(table) and LoRAEmbedding(5, 4, r=1)(np.array([4])).shape == (
        1,
        4,
    )
    for ids in ([10], [-1]):
        with pytest.raises(ValueError):
            table(np.array(ids))
