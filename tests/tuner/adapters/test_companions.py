"""Whole modules, biases and rows of tokens beside adapters: training, files, fusing, errors."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import pyloss
from pyloss.errors import FormatError
from pyloss.io.files import write_safetensors
from pyloss.models import untie_head
from pyloss.tuner import linear_to_lora_layers, load_adapters, save_adapter
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.gguf import write_lora_gguf
from pyloss.tuner.adapters.switching import AdapterSwitch
from pyloss.tuner.utils import fuse_adapters, remove_lora_layers

CONFIG = {"rank": 2, "scale": 2.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
#: The settings, whether the head is tied, and the names that are trained beside the adapters.
CASES = {
    "whole": (
        {"modules_to_save": ["embed_tokens", "norm", "2.mlp.down_proj"]},
        True,
        {
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.2.mlp.down_proj.weight",
            "model.layers.2.mlp.down_proj.bias",
        },
    ),
    "head": ({"modules_to_save": ["lm_head"]}, False, {"lm_head.weight"}),
    "lora_only": (
        {"bias": "lora_only"},
        True,
        {
            f"model.layers.{i}.{name}.linear.bias"
            for i in range(3)
            for name in ("self_attn.q_proj", "mlp.up_proj")
        },
    ),
    "tokens": ({"trainable_token_indices": [3, 28]}, True, {"model.embed_tokens.tokens"}),
    "tokens of both": (
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 9]}},
        False,
        {"model.embed_tokens.tokens", "lm_head.tokens"},
    ),
    "one use": (
        {"ensure_weight_tying": False, "keys": ["lm_head", "mlp.up_proj"]},
        True,
        set(),
    ),
}


def made(place, tied=True, **settings):
    model = tiny.load_tiny(place, bias=True, tied=tied)
    linear_to_lora_layers(model, -1, {**CONFIG, **settings})
    return model


def randomized(model):
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array += 0.2 * rng.standard_normal(array.shape).astype(np.float32)
    return model


def logits(model):
    return np.array(pyloss.autograd.data(model(IDS)))


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    settings, tied, names = CASES[request.param]
    return made(tmp_path / "model", tied, **settings), tied, names


def test_they_begin_as_the_base_and_are_trained(case, tmp_path):
    model, tied, names = case
    plain = tiny.load_tiny(tmp_path / "model", bias=True, tied=tied)
    np.testing.assert_allclose(logits(model), logits(plain), rtol=0, atol=1e-6)
    trained = model.trainable_parameters()
    assert {name for name in trained if not name.endswith(("lora_a", "lora_b"))} == names
    step = pyloss.nn.value_and_grad(model, pyloss.tuner.default_loss)
    batch, weights = IDS.astype(np.int32), np.ones(IDS.shape, np.float32)
    (_, _), gradients = step(model, batch, weights)
    randomized(model)
    (_, _), gradients = step(model, batch, weights)
    for name in names or trained:
        array, gradient = trained[name], gradients[name]
        assert gradient.shape == array.shape
        at = np.unravel_index(np.abs(gradient).argmax(), array.shape)
        kept, step_size = array[at], np.float32(1e-2)
        found = []
        for sign in (1, -1):
            array[at] = kept + sign * step_size
            found.append(float(pyloss.tuner.default_loss(model, batch, weights)[0]))
        array[at] = kept
        slope = (found[0] - found[1]) / (2 * step_size)
        assert gradient[at] == pytest.approx(slope, rel=0.03, abs=1e-4)


@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_files(case, tmp_path, format):
    model, tied, _ = case
    want = logits(randomized(model))
    save_adapter(model, tmp_path / "a", format)
    again = tiny.load_tiny(tmp_path / "model", bias=True, tied=tied)
    plain = logits(again)
    load_adapters(again, tmp_path / "a")
    np.testing.assert_array_equal(logits(again), want)
    assert {n: a.tobytes() for n, a in again.trainable_parameters().items()} == {
        n: a.tobytes() for n, a in model.trainable_parameters().items()
    }
    save_adapter(again, tmp_path / "b", format)
    one, two = (load_file(next((tmp_path / n).glob("*.safetensors"))) for n in "ab")
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}
    switch = AdapterSwitch(again)
    for _ in range(2):
        switch.turn()
        np.testing.assert_array_equal(logits(again), plain)
        switch.turn()
        np.testing.assert_array_equal(logits(again), want)
    remove_lora_layers(again)
    np.testing.assert_array_equal(logits(again), plain)


def test_fused_and_saved(case, tmp_path):
    model, _, _ = case
    want = logits(randomized(model))
    fuse_adapters(model)
    assert not adapter_modules(model)
    np.testing.assert_allclose(logits(model), want, rtol=0, atol=2e-5)
    model.save(tmp_path / "fused")
    again = pyloss.models.load_model(tmp_path / "fused")
    np.testing.assert_allclose(logits(again), want, rtol=0, atol=2e-5)


def test_exports(tmp_path):
    """GGUF files have what is beside the adapters, too; adapters for others cannot have it."""
    pytest.importorskip("gguf")
    tiny.write_folder(tmp_path / "model", vocab_size=tiny.TOKENS, tied=False)
    model = pyloss.models.load_model(tmp_path / "model")
    settings = {"trainable_token_indices": [3, 9], "modules_to_save": ["lm_head", "norm"]}
    linear_to_lora_layers(model, -1, {**CONFIG, **settings})
    want = logits(randomized(model))
    pyloss.export(model, tmp_path / "a.gguf", "gguf", tiny.byte_tokenizer(), type="f32")
    again = pyloss.models.load_model(tmp_path / "a.gguf")
    np.testing.assert_allclose(logits(again), want, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="llama.cpp has no (whole|tokens) adapters"):
        write_lora_gguf(model, tmp_path / "lora.gguf")
    with pytest.raises(ValueError, match="lm_head: mlx-lm loads adapters alone; fuse"):
        save_adapter(model, tmp_path / "mlx", one_rank=True)
    assert not (tmp_path / "mlx").exists()


def test_the_folder_of_peft(tmp_path):
    model = made(
        tmp_path / "model",
        tied=False,
        modules_to_save=["lm_head"],
        trainable_token_indices=[7, 3],
        bias="lora_only",
    )
    save_adapter(randomized(model), tmp_path / "a", "peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"] and config["bias"] == "lora_only"
    assert config["trainable_token_indices"] == {"model.embed_tokens": [7, 3]}
    arrays = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix = "base_model.model."
    np.testing.assert_array_equal(arrays[f"{prefix}lm_head.weight"], model.lm_head.weight)
    rows = arrays[f"{prefix}model.embed_tokens.token_adapter.trainable_tokens_delta"]
    np.testing.assert_array_equal(rows, model.model.embed_tokens.tokens)
    q = model.model.layers[0].self_attn.q_proj
    bias = arrays[f"{prefix}model.layers.0.self_attn.q_proj.base_layer.bias"]
    np.testing.assert_array_equal(bias, q.linear.bias)


@pytest.mark.parametrize(
    ("tied", "settings", "changes", "lacks"),
    [
        (False, {"modules_to_save": ["lm_head"]}, {}, "lm_head.weight"),
        (True, {"modules_to_save": ["norm"]}, {}, "model.norm.weight"),
        (True, {}, {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        (
            True,
            {"trainable_token_indices": [3, 5]},
            {},
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
        (
            False,
            {},
            {"trainable_token_indices": {"lm_head": [4]}},
            "lm_head.token_adapter.trainable_tokens_delta",
        ),
    ],
)
def test_a_file_of_peft_without_what_its_configuration_names(
    tmp_path, tied, settings, changes, lacks
):
    save_adapter(made(tmp_path / "model", tied, **settings), tmp_path / "a", "peft")
    file, source = (tmp_path / "a" / f"adapter_{n}" for n in ("model.safetensors", "config.json"))
    arrays = load_file(file)
    write_safetensors(file, {n: a for n, a in arrays.items() if not n.endswith(lacks)}, None)
    source.write_text(json.dumps(json.loads(source.read_text()) | changes))
    plain = tiny.load_tiny(tmp_path / "model", bias=True, tied=tied)
    (setting,) = settings or changes
    with pytest.raises(FormatError, match=f"{setting}: the file of tensors lacks[^=]*{lacks}"):
        load_adapters(plain, tmp_path / "a")
    assert not adapter_modules(plain)


def test_a_module_to_save_that_no_model_has(tmp_path):
    """PEFT adds the names of classifiers' heads, which a model need not have."""
    model = randomized(made(tmp_path / "model", modules_to_save=["norm"]))
    save_adapter(model, tmp_path / "a", "peft")
    source = tmp_path / "a" / "adapter_config.json"
    config = json.loads(source.read_text())
    source.write_text(json.dumps(config | {"modules_to_save": ["norm", "classifier", "score"]}))
    plain = tiny.load_tiny(tmp_path / "model", bias=True)
    with pytest.warns(UserWarning, match="modules_to_save names classifier, score, and neither"):
        load_adapters(plain, tmp_path / "a")
    np.testing.assert_array_equal(logits(plain), logits(model))


def test_a_saved_module_without_its_bias(tmp_path):
    """The base's bias stays, as in PEFT, and a warning says so."""
    name = "model.layers.2.mlp.down_proj"
    model = made(tmp_path / "model", modules_to_save=["2.mlp.down_proj"])
    plain = tiny.load_tiny(tmp_path / "model", bias=True)
    layer = dict(randomized(model).named_modules())[name]
    save_adapter(model, tmp_path / "a", "peft")
    file = tmp_path / "a" / "adapter_model.safetensors"
    arrays = load_file(file)
    del arrays[f"base_model.model.{name}.bias"]
    write_safetensors(file, arrays, None)
    base = plain.layers[2].mlp.down_proj.bias.copy()
    with pytest.warns(UserWarning, match=rf"lacks {name}\.bias: the base's stays"):
        load_adapters(plain, tmp_path / "a")
    found = plain.layers[2].mlp.down_proj
    np.testing.assert_array_equal(found.weight, layer.weight)
    np.testing.assert_array_equal(found.bias, base)
    assert np.abs(layer.bias - base).max() > 0.01


@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_tensors_that_are_not_finite(tmp_path, format):
    model = made(tmp_path / "model", modules_to_save=["norm"])
    model.model.norm.weight[3] = np.nan
    model.layers[1].mlp.up_proj.lora_a[2, 1] = -np.inf
    save_adapter(model, tmp_path / "a", format)
    plain = tiny.load_tiny(tmp_path / "model", bias=True)
    text = r"safetensors: .* and 1 more of \d+ tensors are not finite: the model's results"
    with pytest.warns(UserWarning, match=text):
        load_adapters(plain, tmp_path / "a")
    assert np.isnan(plain.model.norm.weight[3])


def test_a_resumed_run(tmp_path):
    """The bits of an uninterrupted one."""
    rng = np.random.default_rng(1)
    data = [(rng.integers(0, 29, 12).tolist(), 0) for _ in range(6)]

    def run(place, iters, resume=False):
        pyloss.random.seed(3)
        model = made(
            tmp_path / "model",
            modules_to_save=["norm"],
            trainable_token_indices=[3, 5],
            bias="all",
        )
        pyloss.train(
            model,
            pyloss.optim.AdamW(1e-2),
            data,
            args=pyloss.tuner.TrainingArgs(
                batch_size=2, iters=iters, adapter_file=place / "adapters.safetensors", seed=4,
                steps_per_save=2, resume=resume,
            ),
        )  # fmt: skip
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    again = run(tmp_path / "parts", 4, resume=True)
    for name, array in whole.trainable_parameters().items():
        assert again.trainable_parameters()[name].tobytes() == array.tobytes(), name
    read = load_adapters(tiny.load_tiny(tmp_path / "model", bias=True), tmp_path / "parts")
    np.testing.assert_array_equal(logits(read), logits(whole))


def test_generation_with_trained_tokens(tmp_path):
    model = randomized(made(tmp_path / "model", trainable_token_indices=[3, 5, 6, 9]))
    cache, tokens = model.make_cache(), []
    step = model.step(np.array([3, 1, 4]), cache)
    for _ in range(8):
        tokens.append(int(step.argmax()))
        step = model.step(np.array(tokens[-1:]), cache)
    assert cache.next.replay.ready  # without the Python between its calls
    fuse_adapters(model)
    cache, fused = model.make_cache(), []
    step = model.step(np.array([3, 1, 4]), cache)
    for _ in range(8):
        fused.append(int(step.argmax()))
        step = model.step(np.array(fused[-1:]), cache)
    assert fused == tokens


def test_whole_layers_get_no_adapter_without_keys(tmp_path):
    model = made(tmp_path / "model", keys=None, modules_to_save=["q_proj"])
    kinds = {name.split(".")[-1]: a.kind for name, a in adapter_modules(model).items()}
    assert kinds["q_proj"] == "whole" and kinds["k_proj"] == "lora"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"modules_to_save": ["lm_haed"]}, ValueError, "no layer .* is named 'lm_haed'"),
        ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save is 'lm_head'; it must be a l"),
        ({"modules_to_save": ["mlp.up_proj"]}, ValueError, "up_proj would have two adapters"),
        ({"bias": "some"}, ValueError, "bias is 'some'; it must be one of none, lora_only, all"),
        ({"trainable_token_indices": [29]}, ValueError, r"token 29 is outside \[0, 29\)"),
        ({"trainable_token_indices": [-1]}, ValueError, r"token -1 is outside \[0, 29\)"),
        ({"trainable_token_indices": [3, 3]}, ValueError, "must be different tokens"),
        ({"trainable_token_indices": {"norm": [3]}}, ValueError, "'norm', which is no embedding"),
        ({"trainable_token_indices": [1.5]}, TypeError, "must be a list of token ids"),
        (
            {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]},
            ValueError,
            "is in modules_to_save and in trainable_token_indices",
        ),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, error, message):
    model = tiny.load_tiny(tmp_path / "model", bias=True)
    with pytest.raises(error, match=message):
        linear_to_lora_layers(model, -1, {**CONFIG, "ensure_weight_tying": False, **settings})
    assert not adapter_modules(model) and model.lm_head is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": np.zeros(3)}, r"model.norm: weight \(3,\), and the layer's weight"),
        ({"model.nrm.weight": np.zeros(32)}, "model.nrm: the model has no such layer"),
        ({"model.embed_tokens.tokens": np.zeros((2, 32))}, "has no tokens of model.embed_tokens"),
        (
            {"model.layers.0.self_attn.k_proj.linear.bias": np.zeros(16)},
            "k_proj.linear.bias: its layer has no adapter",
        ),
        ({"model.embed_tokens.weight": np.zeros((29, 31))}, "made over a weight of shape"),
        ({"model.layers.0.self_attn.q_proj.linear.bias": np.zeros(5)}, r"linear.bias \(5,\), and"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    model = made(tmp_path / "model")
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapters.safetensors"
    arrays = {name: array.astype(np.float32) for name, array in change.items()}
    write_safetensors(file, {**load_file(file), **arrays})
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    before = again.model.embed_tokens
    with pytest.raises(ValueError, match=message):
        load_adapters(again, tmp_path / "a")
    assert not adapter_modules(again) and again.model.embed_tokens is before


def test_untied_tables_share_their_weight(tmp_path):
    model = tiny.load_tiny(tmp_path / "model")
    before = logits(model)
    untie_head(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(logits(model), before)
