"""PiSSA and LoftQ: initial products, saved files and resumed runs."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_full import TOKENS, load_quantised, train

import pyloss
from pyloss import nn
from pyloss.models import conversion, load_model
from pyloss.tuner import linear_to_lora_layers, load_adapters, save_adapter
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.initial import _difference, _products, loftq_quantize, pissa, principal
from pyloss.tuner.adapters.merging import dense
from pyloss.tuner.adapters.registry import adapter_class
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

PISSA = {"rank": 4, "scale": 3.0, "init": "pissa"}


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix.astype(np.float64))
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def spectrum(rng, rows, columns, decay):
    """A random matrix with singular values decay ** i."""
    u, v = (np.linalg.qr(rng.standard_normal((n, min(rows, columns))))[0] for n in (rows, columns))
    return ((u * decay ** np.arange(min(rows, columns))) @ v.T).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (120, 72), (56, 160)])
@pytest.mark.parametrize(("rank", "decay"), [(1, 0.98), (8, 0.9), (24, 0.98)])
def test_principal_parts(rows, columns, rank, decay):
    matrix = spectrum(np.random.default_rng(rank), rows, columns, decay)
    want = best(matrix, rank)
    for weight in (matrix, Weight.quantize(matrix, "f32")):
        left, right = principal(*_products(weight), columns, rank)
        assert (
            left.shape == (rows, rank)
            and right.shape == (rank, columns)
            and left.dtype == right.dtype == np.float32
        )
        captured = 1 - np.linalg.norm(matrix - left @ right) ** 2 / np.linalg.norm(matrix) ** 2
        assert captured >= 0.999 * np.linalg.norm(want) ** 2 / np.linalg.norm(matrix) ** 2
        np.testing.assert_allclose(
            np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-3
        )


def test_principal_parts_of_small_and_of_thin_matrices_are_exact():
    rng = np.random.default_rng(0)
    for matrix in (
        rng.standard_normal((12, 9)),
        np.outer(rng.standard_normal(30), rng.standard_normal(20)),
        np.zeros((5, 6)),
    ):
        left, right = principal(*_products(matrix.astype(np.float32)), matrix.shape[1], 3)
        np.testing.assert_allclose(left @ right, best(matrix, 3), atol=1e-3)


def test_the_same_bits_for_any_number_of_threads():
    weight = Weight.quantize(spectrum(np.random.default_rng(1), 96, 320, 0.95), "q8_0")
    threads, found = pyloss.get_num_threads(), []
    for count in (1, 3):
        pyloss.set_num_threads(count)
        found.append([half.tobytes() for half in principal(*_products(weight), 320, 8)])
    pyloss.set_num_threads(threads)
    assert found[0] == found[1]
    assert principal(*_products(weight), 320, 8, seed=1)[0].tobytes() != found[0][0]


def test_products_of_a_difference():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((6, 32)).astype(np.float32) for _ in range(2))
    stored = Weight.quantize(b, "q4_0")
    forward, backward = _difference(_products(a), _products(stored))
    for count in (1, 5):
        x, y = (rng.standard_normal((count, n)).astype(np.float32) for n in (32, 6))
        np.testing.assert_allclose(forward(x), x @ (a - stored.dequantize()).T, atol=1e-4)
        np.testing.assert_allclose(backward(y), y @ (a - stored.dequantize()), atol=1e-4)


@pytest.mark.parametrize("quantised", [False, True])
def test_dora_begins_as_its_kind_of_beginning_says(tmp_path, quantised):
    """With PiSSA, norms of the base; with LoftQ of base and product, which m must not undo."""
    original = tiny.load_tiny(tmp_path / "original", seed=0)

    def fresh():
        return (
            load_quantised(tmp_path, "Q4_0", seed=0)
            if quantised
            else tiny.load_tiny(tmp_path / "original", seed=0)
        )

    model = fresh()
    before = model(TOKENS)
    linear_to_lora_layers(
        model,
        2,
        {**PISSA, "keys": ["mlp.up_proj", "self_attn.q_proj", "model.embed_tokens"]},
        use_dora=True,
    )
    np.testing.assert_allclose(model(TOKENS), before, atol=5e-4)
    train(model, tmp_path / "run", iters=3)
    assert np.abs(model(TOKENS) - before).max() > 0.01
    np.testing.assert_allclose(
        load_adapters(fresh(), tmp_path / "run")(TOKENS), model(TOKENS), atol=5e-4
    )
    if quantised:
        config = {
            "rank": 8,
            "scale": 2.0,
            "init": "loftq",
            "loftq_model": str(tmp_path / "original"),
        }
        logits = []
        for dora in (False, True):
            model = fresh()
            linear_to_lora_layers(model, -1, config, use_dora=dora)
            logits.append(model(TOKENS))
        np.testing.assert_allclose(*logits, atol=5e-4)
        assert (
            np.abs(logits[1] - original(TOKENS)).mean()
            < 0.8 * np.abs(before - original(TOKENS)).mean()
        )


@pytest.mark.parametrize("quantised", [False, True])
def test_pissa_begins_with_the_principal_part_and_as_the_base(tmp_path, quantised):
    model = load_quantised(tmp_path) if quantised else tiny.load_tiny(tmp_path, bias=True)
    before, stored = model(TOKENS), dict(model.stored())
    linear_to_lora_layers(model, 2, PISSA)
    np.testing.assert_allclose(model(TOKENS), before, atol=2e-4)
    assert len(adapter_modules(model)) == 14
    for name, layer in adapter_modules(model).items():
        assert layer.base.weight is stored[f"{name}.weight"]
        product = 3.0 * (layer.lora_a @ layer.lora_b).T
        np.testing.assert_allclose(product, best(dense(layer.base.weight), 4), atol=0.02)
    assert {
        a.shape[1] if name.endswith("a") else len(a)
        for name, a in model.trainable_parameters().items()
    } == {4}


def test_a_trained_pissa_adapter_is_saved_as_a_plain_one_over_the_original_base(tmp_path):
    model = tiny.load_tiny(tmp_path / "model")
    linear_to_lora_layers(model, -1, {**PISSA, "rank_pattern": {"mlp.up_proj": 2}})
    train(model, tmp_path / "run", iters=4)
    logits = model(TOKENS)
    for format in ("mlx", "peft"):
        if format == "peft":  # PEFT's file has one rank for all
            linear_to_lora_layers(model := tiny.load_tiny(tmp_path / "model"), -1, PISSA)
            train(model, tmp_path / "peft_run", iters=4)
            logits = model(TOKENS)
        save_adapter(model, tmp_path / format, format)
        again = load_adapters(tiny.load_tiny(tmp_path / "model"), tmp_path / format)
        np.testing.assert_allclose(again(TOKENS), logits, atol=1e-4)
        layer = again.layers[0].self_attn.q_proj
        assert layer.rank == 8 and layer.origin_a is None and layer.scale == 3.0
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 8,
        "scale": 3.0,
        "dropout": 0.0,
        "rank_pattern": {"mlp.up_proj": 4},
        "init": "pissa",
    }
    for file in ("adapters", "best_adapters", "0000002_adapters"):
        arrays = load_file(tmp_path / "run" / f"{file}.safetensors")
        assert {
            array.shape for name, array in arrays.items() if name.endswith("q_proj.lora_a")
        } == {(32, 8)}
        assert {
            array.shape for name, array in arrays.items() if name.endswith("up_proj.lora_b")
        } == {(4, 64)}
    np.testing.assert_allclose(model.fuse()(TOKENS), logits, atol=2e-4)


@pytest.mark.parametrize(
    ("init", "use_dora"), [("pissa", False), ("pissa", True), ("default", True)]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, init, use_dora):
    files = []
    for folder, parts in ((tmp_path / "whole", [8]), (tmp_path / "parts", [3, 8])):
        pyloss.random.seed(5)
        for i, iters in enumerate(parts):
            model = tiny.load_tiny(tmp_path / "model")
            linear_to_lora_layers(model, 1, {**PISSA, "init": init}, use_dora)
            for layer in adapter_modules(model).values() if i and init == "pissa" else ():
                # A resumed run must take these from the state, not recompute them.
                layer.origin_a[...] = layer.origin_b[...] = 0
            train(model, folder, iters, resume=i > 0)
        files.append(load_file(folder / "adapters.safetensors"))
    assert len(files[0]) == (21 if use_dora else 14)
    for name, array in files[0].items():
        np.testing.assert_array_equal(array, files[1][name])


def test_loftq_begins_with_what_quantising_lost(tmp_path):
    original = tiny.load_tiny(tmp_path / "original", seed=0)
    model = load_quantised(tmp_path, "Q4_0", seed=0)
    stored = model(TOKENS)
    config = {
        "rank": 8,
        "scale": 2.0,
        "dropout": 0.1,
        "init": "loftq",
        "loftq_model": str(tmp_path / "original"),
    }
    linear_to_lora_layers(model, -1, config)
    originals = dict(original.named_modules())
    for name, layer in adapter_modules(model).items():
        lost = dense(originals[name].weight) - layer.base.weight.dequantize()
        np.testing.assert_allclose(layer.delta(), best(lost, 8), atol=2e-3)
        assert layer.origin_a is None and layer.rank == 8
    want = original(TOKENS)
    assert np.abs(model(TOKENS) - want).mean() < 0.8 * np.abs(stored - want).mean()
    save_adapter(model, tmp_path / "saved")
    again = load_adapters(load_quantised(tmp_path, "Q4_0", seed=0), tmp_path / "saved")
    assert again(TOKENS).tobytes() == model(TOKENS).tobytes()


@pytest.mark.parametrize("kind", ["q2", "nf4"])
def test_quantised_beside_a_product_base_and_adapter_are_nearer(tmp_path, kind):
    """Each round of LoftQ's alternation reduces the error; files keep the formats."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1}
    original = tiny.load_tiny(tmp_path / "original", **sizes)
    config = {
        "rank": 8,
        "scale": 2.0,
        "init": "loftq",
        "loftq_model": str(tmp_path / "original"),
        "keys": ["mlp.up_proj"],
    }
    wanted, errors = original.layers[0].mlp.up_proj.weight.dequantize(), []
    for rounds in (0, 1, 3):
        model = tiny.load_tiny(tmp_path / "original", **sizes)
        conversion.quantize_model(model, kind, group_size=32)
        before = model.layers[0].mlp.up_proj.weight
        loftq_quantize(model, dict(original.named_modules()), 8, rounds)
        model.save(tmp_path / str(rounds))
        again = load_model(tmp_path / str(rounds))
        stored = again.layers[0].mlp.up_proj.weight
        assert (stored.format, stored.nbytes) == (before.format, before.nbytes)
        linear_to_lora_layers(again, -1, config)
        layer = again.layers[0].mlp.up_proj
        errors.append(np.linalg.norm(stored.dequantize() + layer.delta() - wanted))
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(
        ValueError,
        match=r"layers\.0\..*_proj: the rank must be at most 32, the smaller dimension, not 40",
    ):
        loftq_quantize(model, dict(original.named_modules()), 40, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**PISSA, "rank": 20},
            r"layers\.0\.self_attn\.k_proj: init needs a rank of at most 16, the smaller dimension, not 20",
        ),
        ({**PISSA, "scale": -1.0}, r"needs a scale above 0, not -1\.0"),
        (
            {**PISSA, "init": "loftq", "loftq_model": "other"},
            r"not the float model of this one: .* \(32, 32\) here",
        ),
        (
            {**PISSA, "init": "loftq", "loftq_model": "model"},
            "nothing to begin with: the base's weight is zero, or equal",
        ),
        ({**PISSA, "init": "loftq", "loftq_model": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_begun(tmp_path, monkeypatch, config, message):
    monkeypatch.chdir(tmp_path)
    model = tiny.load_tiny(tmp_path / "model")
    tiny.write_folder(tmp_path / "other", head_dim=4)
    before = list(model.modules())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        linear_to_lora_layers(model, -1, config)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_experts_begin_one_by_one(stored, kind):
    """Their A and B are transposed, one pair per matrix."""
    values = np.random.default_rng(4).standard_normal((3, 12, 32)).astype(np.float32)
    weight = (
        WeightStack([Weight.quantize(matrix, "q8_0") for matrix in values]) if stored else values
    )
    layer = nn.SwitchLinear.from_weight(weight)
    adapter = adapter_class(layer, kind).from_base(layer, r=2, scale=4.0)
    pissa({"experts": adapter})
    for i, matrix in enumerate(dense(weight)):
        np.testing.assert_allclose(
            4.0 * adapter.lora_b[i] @ adapter.lora_a[i], best(matrix, 2), atol=1e-3
        )
    np.testing.assert_allclose(adapter.delta(), 0, atol=1e-5)
    adapter.lora_b *= 1.5
    assert adapter.storable().rank == 4
    np.testing.assert_allclose(adapter.storable().delta(), adapter.delta(), atol=1e-5)
    assert np.abs(adapter.delta()).max() > 0.1
