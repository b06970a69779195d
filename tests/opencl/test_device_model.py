"""Models on a device compared with the processor: results and training."""

import numpy as np
import pytest
from fake import FakeTokenizer
from packed_folders import write_packed
from tiny import FAMILIES, load_tiny, logits, write_folder, write_gguf

import pyloss
from pyloss import _core, nn, optim
from pyloss.io.safetensors import read_safetensors
from pyloss.models import dequantize_model, load_model
from pyloss.models.config import ModelConfig
from pyloss.models.config.delta_net import DeltaNet
from pyloss.models.config.gemma4 import Gemma4
from pyloss.models.config.mamba import Mamba2
from pyloss.models.config.mixture import Mixture
from pyloss.models.synthetic import random_model
from pyloss.tuner.losses import default_loss
from pyloss.tuner.utils import unfreeze_layers

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def batch(rng):
    """Token ids of rows of several lengths, and the spans of their targets."""
    return rng.integers(0, 29, (3, 21)).astype(np.int32), np.array(
        [[1, 21], [7, 13], [1, 2]], np.int32
    )


def adapted(model, dora=False, dropout=0.25, keys=KEYS):
    pyloss.random.seed(3)
    pyloss.linear_to_lora_layers(
        model, -1, {"rank": 4, "scale": 2.0, "dropout": dropout, "keys": keys}, use_dora=dora
    )
    for module in model.modules():
        if hasattr(module, "lora_b"):
            module.lora_b[...] = np.random.default_rng(5).standard_normal(module.lora_b.shape) / 8
    return model.train()


def steps(model, rng, count=4):
    """The losses and gradient norms of some updates."""
    optimizer, step = optim.AdamW(1e-2), nn.value_and_grad(model, default_loss)
    tokens, lengths = batch(rng)
    found = []
    for _ in range(count):
        (value, _), grads = step(model, tokens, lengths)
        found.append((float(value), optim.grad_norm(grads)))
        optimizer.update(model, grads)
    return np.array(found)


def same_steps(here, there, device, count=4, rtol=2e-5):
    """Train equal models on the processor and on the device; return the processor's results."""
    pyloss.to_device(there, device)
    pyloss.random.seed(11)
    want = steps(here, np.random.default_rng(1), count)
    pyloss.random.seed(11)
    np.testing.assert_allclose(steps(there, np.random.default_rng(1), count), want, rtol=rtol)
    assert all(
        isinstance(array, pyloss.DeviceArray) for array in there.trainable_parameters().values()
    )
    return want


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["f32", "Q4_1", "Q8_0"])
def test_steps_are_those_of_the_processor(device, tmp_path, format, dora):
    def fresh(folder):
        folder.mkdir()
        if format == "f32":
            return load_tiny(folder, bias=True)
        write_gguf(folder / "tiny.gguf", format=format)
        return load_model(folder / "tiny.gguf")

    here, there = (adapted(fresh(tmp_path / name), dora) for name in ("here", "there"))
    same_steps(here, there, device)


@pytest.mark.parametrize("dora", [False, True])
def test_steps_over_columns_in_another_order(device, tmp_path, dora):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    write_packed(tmp_path, order=True, **sizes)
    here, there = (adapted(load_model(tmp_path), dora, 0.0) for _ in range(2))
    same_steps(here, there, device)


def steps_are_those_of_the_whole(*models):
    tokens = np.random.default_rng(0).integers(0, 29, 9)
    for cache, model in ((model.make_cache(), model.eval()) for model in models):
        model.step(tokens[:5], cache)
        for i in range(5, 9):
            found = np.asarray(model.step(tokens[i : i + 1], cache))
        np.testing.assert_allclose(found, np.asarray(model([tokens]))[0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(device, tmp_path, family):
    here, there = (
        adapted(load_tiny(tmp_path / name, **FAMILIES[family]), dropout=0.0, keys=None)
        for name in ("here", "there")
    )
    same_steps(here, there, device)
    steps_are_those_of_the_whole(here, there)


def small(family, **options):
    """A model of three layers with random weights."""
    sizes = {
        "vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    }  # fmt: skip
    return random_model(ModelConfig(family, **sizes, **options))


def same_on_the_device(fresh, device, trained=None, rtol=2e-5):
    """Two models of `fresh` train and generate alike; `trained` is one of their parameters."""
    here, there = fresh(), fresh()
    assert trained is None or trained in here.trainable_parameters()
    same_steps(here, there, device, rtol=rtol)
    steps_are_those_of_the_whole(here, there)


def test_short_convolutions(device):
    """Training, also of the convolutions themselves, and generation."""

    def fresh():
        model = small("lfm2", layer_types=["conv", "full_attention", "conv"], conv_bias=True)
        adapted(model, dropout=0.0, keys=None)
        for layer in (model.layers[0], model.layers[2]):
            layer.conv.conv.unfreeze()
        return model

    same_on_the_device(fresh, device, "model.layers.2.conv.conv.bias")


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next"])
def test_the_delta_rule(device, family):
    """Training, also of the rule's own parameters, and generation."""
    # one expert: which ones are chosen may differ with rounding
    mixture = Mixture(1, 1, 16, True, shared_size=16) if family == "qwen3_next" else None

    def fresh():
        model = small(
            family,
            mixture=mixture,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            delta=DeltaNet(2, 4, 8, 5),
        )
        adapted(model, dropout=0.0, keys=None)
        for layer in (model.layers[0], model.layers[2]):
            layer.linear_attn.conv1d.unfreeze()
            layer.linear_attn.unfreeze(recurse=False)
        return model

    same_on_the_device(
        fresh, device, "model.layers.2.linear_attn.A_log", rtol=1e-4 if mixture else 2e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        Gemma4(8, 1, True, 16, 29),
        Gemma4(
            8, 0, False, 0, 0, True, 1, num_experts=4, top_k_experts=2, moe_intermediate_size=16
        ),
    ],
    ids=["shared keys", "experts"],
)
def test_gemma4(device, options):
    """Also norms without a weight, and the factors of a router."""

    def fresh():
        model = small(
            "gemma4_text",
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            gemma4=options,
        )
        rng = np.random.default_rng(0)
        for layer in model.layers if options.num_experts else ():
            layer.router.scale[...] = rng.uniform(0.5, 2, 24)
            layer.router.per_expert_scale[...] = rng.uniform(0.5, 2, 4)
        adapted(model, dropout=0.0, keys=None)
        return model

    same_on_the_device(fresh, device, rtol=2e-4 if options.num_experts else 2e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_scan(device, groups):
    """Training, also of the scan's own parameters, and generation."""

    def fresh():
        model = small(
            "granitemoehybrid",
            layer_types=["mamba", "full_attention", "mamba"],
            no_rope_layers=[0, 0, 0],
            mamba=Mamba2(4, 12, groups, 7),
        )
        adapted(model, dropout=0.0, keys=None)
        for layer in (model.layers[0], model.layers[2]):
            layer.mamba.conv1d.unfreeze()
            layer.mamba.norm.unfreeze()
            layer.mamba.D[...] = 1  # with 0, results before the norm are small, and steps unlike
            layer.mamba.unfreeze(recurse=False)
        return model

    same_on_the_device(fresh, device, "model.layers.2.mamba.D")


@pytest.mark.slow
@pytest.mark.parametrize(("base", "dora"), [("q4_1", True), ("f32", False)])
def test_ten_steps_of_the_small_model(device, base, dora):
    try:
        here, there = (pyloss.load("smollm2-135m")[0] for _ in range(2))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)
    tokens, lengths = (
        rng.integers(0, here.vocab_size, (2, 48)).astype(np.int32),
        np.array([[1, 48], [9, 30]], np.int32),
    )
    losses = []
    for model, where in ((here, "cpu"), (there, device)):
        if base == "f32":
            dequantize_model(model)
        pyloss.random.seed(1)
        pyloss.linear_to_lora_layers(
            model, -1, {"rank": 8, "scale": 2.0, "dropout": 0.05}, use_dora=dora
        )
        pyloss.to_device(model, where).train()
        optimizer, step = optim.AdamW(1e-3), nn.value_and_grad(model, default_loss)
        for _ in range(10):
            (value, _), grads = step(model, tokens, lengths)
            optimizer.update(model, grads)
            losses.append(float(value))
    np.testing.assert_allclose(losses[10:], losses[:10], rtol=1e-4)
    assert losses[9] < losses[0]


def test_an_optimiser_updates_float32_alone(device):
    parameter = pyloss.to_device(np.ones(3), device)
    with pytest.raises(
        ValueError, match="'w' is float64, .* only writable C-contiguous float32 arrays"
    ):
        optim.SGD(0.1).update({"w": parameter}, {"w": np.ones(3)})


def test_checkpointing_changes_nothing(device, tmp_path):
    results = []
    for checkpoint in (False, True):
        model = pyloss.to_device(adapted(load_tiny(tmp_path / str(checkpoint))), device)
        model.set_grad_checkpoint(checkpoint)
        pyloss.random.seed(1)
        results.append(steps(model, np.random.default_rng(2), 2))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)


def test_full_training_of_a_tied_model(device, tmp_path):
    here, there = (load_tiny(tmp_path / name) for name in ("here", "there"))
    for model in (here, there):
        unfreeze_layers(model, -1, None)
        model.train()
    pyloss.to_device(there, device)
    np.testing.assert_allclose(
        steps(there, np.random.default_rng(4)), steps(here, np.random.default_rng(4)), rtol=2e-5
    )


def test_logits_and_generation(device, tmp_path):
    """Logits of over 32 rows are summed in the device's order; fewer are compared with float64."""
    c, arrays = write_folder(tmp_path / "exact")
    here, there = (load_tiny(tmp_path / name) for name in ("here", "there"))
    pyloss.to_device(there, device)
    tokens = np.random.default_rng(0).integers(0, 29, (4, 9))
    np.testing.assert_allclose(np.asarray(there(tokens)), here(tokens), atol=1e-5)
    exact, caches = logits(c, arrays, tokens[0]), (here.make_cache(), there.make_cache())
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        part, want = tokens[0, begin:end], exact[end - 1]
        np.testing.assert_allclose(here.step(part, caches[0]), want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(there.step(part, caches[1]), want, rtol=0, atol=2e-5)


def test_a_run_saves_and_resumes_anywhere(device, tmp_path):
    """A run moves from device to processor and back; the adapter's file has the same format."""
    data = [{"text": text} for text in ("a b c d e f", "b c d", "hello world 12", "c d e f a b")]

    class Tokens:
        def __init__(self):
            self.rng = np.random.default_rng(0)
            self.rows = [self.rng.integers(0, 29, 5 + i).tolist() for i in range(len(data))]

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            return self.rows[i]

    def run(model, folder, iters, **options):
        arguments = pyloss.TrainingArgs(
            iters=iters,
            batch_size=2,
            adapter_file=folder / "adapters.safetensors",
            progress=False,
            steps_per_save=2,
            **options,
        )
        pyloss.train(model, optim.AdamW(1e-2), Tokens(), None, arguments)
        return {name: np.array(array) for name, array in model.trainable_parameters().items()}

    def model(name, where):
        return pyloss.to_device(adapted(load_tiny(tmp_path / name)), where)

    want = run(model("a", "cpu"), tmp_path / "whole", 6, seed=5, grad_accumulation_steps=2)
    run(model("b", device), tmp_path / "parts", 3, seed=5, grad_accumulation_steps=2)
    run(model("c", "cpu"), tmp_path / "parts", 5, resume=True, grad_accumulation_steps=2)
    got = run(model("d", device), tmp_path / "parts", 6, resume=True, grad_accumulation_steps=2)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, atol=2e-5)
    loaded = adapted(load_tiny(tmp_path / "e"))
    saved = read_safetensors(tmp_path / "parts" / "adapters.safetensors").tensors
    loaded.load_weights({name: tensor.array() for name, tensor in saved.items()}, strict=False)
    for name, array in loaded.trainable_parameters().items():
        np.testing.assert_array_equal(array, got[name])


def test_what_moves_back_is_as_it_was(device, tmp_path):
    model = load_tiny(tmp_path / "m")
    before = {name: array.copy() for name, array in model.parameters().items()}
    stored = {name: weight.dequantize() for name, weight in model.stored().items()}
    assert pyloss.to_device(model, device) is model
    assert pyloss.to_device(model, "cpu") is model
    for name, array in model.parameters().items():
        np.testing.assert_array_equal(array, before[name])
    for name, weight in model.stored().items():
        assert isinstance(weight.handle[0], np.ndarray)
        np.testing.assert_array_equal(weight.dequantize(), stored[name])


@pytest.mark.parametrize(
    "options", [{}, {"gradient_filter": 0.01}, {"softcap": 5.0, "weights": np.arange(13.0)}]
)
def test_losses_with_a_head(device, options):
    rng = np.random.default_rng(3)
    hidden, weight = (
        rng.standard_normal((13, 24)).astype(np.float32),
        rng.standard_normal((50, 24)).astype(np.float32),
    )
    labels = rng.integers(0, 50, 13)
    labels[4] = -100

    def loss(h, w):
        return pyloss.linear_cross_entropy(h, w, labels, reduction="mean", **options)

    want, slopes = pyloss.value_and_grad(loss, (0, 1))(hidden, weight)
    got, found = pyloss.value_and_grad(loss, (0, 1))(
        pyloss.to_device(hidden, device), pyloss.to_device(weight, device)
    )
    assert np.isclose(got, want, rtol=1e-6)
    for a, b in zip(found, slopes, strict=True):
        assert isinstance(a, pyloss.DeviceArray)
        np.testing.assert_allclose(a.numpy(), b, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("tied", [False, True])
def test_dora_over_the_embedding(device, tmp_path, tied, dropout):
    """The adapter of the embedding, which a tied model also applies at the head."""
    here, there = (
        load_tiny(tmp_path / name, tie_word_embeddings=tied) for name in ("here", "there")
    )
    for model in (here, there):
        adapted(model, dora=True, dropout=dropout, keys=["model.embed_tokens", "mlp.up_proj"])
    assert "model.embed_tokens.m" in here.trainable_parameters()
    same_steps(here, there, device)


def test_magnitudes_of_few_digits(device, tmp_path):
    """Rows scaled to nearly nothing: the magnitude's gradient is then computed another way."""
    results = []
    for where in ("cpu", device):
        model = adapted(load_tiny(tmp_path / where.replace(":", "")), dora=True, dropout=0.0)
        for name, array in model.trainable_parameters().items():
            if name.endswith(".m"):
                array[::3] *= 1e-5
        results.append(steps(pyloss.to_device(model, where), np.random.default_rng(2), 2))
    np.testing.assert_allclose(results[1], results[0], rtol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_step_moves_little(device, tmp_path, dora):
    """Ids, labels and weights go to the device, losses and norms return, for any model size."""
    model = pyloss.to_device(adapted(load_tiny(tmp_path / "m"), dora, 0.0), device)
    steps(model, np.random.default_rng(1), 1)  # creates the optimizer's state
    optimizer, step = optim.SGD(1e-2), nn.value_and_grad(model, default_loss)
    tokens, lengths = batch(np.random.default_rng(1))

    def moved():
        _core.profile(True)
        (_, _), grads = step(model, tokens, lengths)
        optim.grad_norm(grads)
        optimizer.update(model, grads)
        found = _core.profile(False)
        return found.get("copied to devices", (0, 0, 0))[2], found.get(
            "copied from devices", (0, 0, 0)
        )[2]

    moved()
    to, back = moved()
    adapters = sum(array.nbytes for array in model.trainable_parameters().values())
    rows, layers = tokens.size, len(model.layers)
    assert 0 < to < 64 * rows + 8 * len(model.trainable_parameters()) and to < adapters / 2
    # A loss per row, a number per gradient, and with DoRA a byte per layer with a magnitude.
    assert 0 < back <= 8 * rows + 8 * len(model.trainable_parameters()) + len(KEYS) * layers


@pytest.mark.parametrize("options", [{}, {"model_type": "mistral", "sliding_window": 20}])
def test_answers_in_batches_are_those_of_one_at_a_time(device, tmp_path, options):
    model = load_tiny(tmp_path / "model", vocab_size=258, **options)
    pyloss.to_device(model, device)
    prompts = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (3, 1, 40, 17, 5)]
    found = pyloss.generate(model, FakeTokenizer(), prompts=prompts, max_tokens=30, batch_size=3)
    assert found == [
        pyloss.generate(model, FakeTokenizer(), prompt, max_tokens=30) for prompt in prompts
    ]
