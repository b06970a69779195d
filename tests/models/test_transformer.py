"""The transformer against a float64 forward pass: packed, cached, checkpointed, saved, loaded."""

import numpy as np
import pytest
import tiny

import pyloss
from pyloss import _core, nn
from pyloss.models import load_model, quantize_model, transformer
from pyloss.tuner import linear_to_lora_layers

SEQUENCES = [[5, 3, 28, 0, 7, 7, 11], [1], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24], [9, 9]]
OPTIONS = {
    "tied": {},
    "untied": {"tied": False},
    "biases": {"bias": True},
    "one key head": {"num_key_value_heads": 1},
    "all key heads, wide": {"num_key_value_heads": 4, "head_dim": 12, "tied": False},
}


def packed(model, sequences):
    offsets = np.cumsum([0, *map(len, sequences)])
    return model.hidden(np.concatenate([np.array(s, np.int64) for s in sequences]), offsets)


@pytest.fixture
def model(tmp_path):
    return tiny.load_tiny(tmp_path / "model")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_logits_against_float64(tmp_path, options, dtype):
    c, arrays = tiny.write_folder(tmp_path, dtype=dtype, **options)
    model = load_model(tmp_path)
    for tokens in SEQUENCES:
        got, want = model(np.array([tokens])), tiny.logits(c, arrays, tokens)
        assert got.shape == (1, len(tokens), c["vocab_size"]) and got.dtype == np.float32
        assert np.abs(got[0] - want).max() < 1e-4


@pytest.mark.parametrize("format", ["F32", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_gguf_logits_against_float64(tmp_path, format, options):
    pytest.importorskip("gguf")
    # The file permutes the rows of q and k, and its quantized rows are whole blocks of 32.
    if options.get("head_dim") == 12 and format.startswith("Q"):
        options = {**options, "head_dim": 24}
    c, arrays = tiny.write_gguf(tmp_path / "model.gguf", format=format, **options)
    model = load_model(tmp_path / "model.gguf")
    for tokens in SEQUENCES:
        assert np.abs(model(np.array([tokens]))[0] - tiny.logits(c, arrays, tokens)).max() < 1e-4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_against_float64(tmp_path, family):
    c, arrays = tiny.write_folder(tmp_path, **tiny.FAMILIES[family])
    model = load_model(tmp_path)
    for tokens in SEQUENCES:
        want = tiny.logits(c, arrays, tokens)
        np.testing.assert_allclose(model(np.array([tokens]))[0], want, rtol=0, atol=1e-4)
    offsets = np.cumsum([0, *map(len, SEQUENCES)]).astype(np.int32)
    packed = model.head(model.hidden(np.concatenate(SEQUENCES), offsets))
    for i, tokens in enumerate(SEQUENCES):
        alone = model(np.array([tokens]))[0]
        np.testing.assert_allclose(packed[offsets[i] : offsets[i + 1]], alone, rtol=0, atol=1e-6)
    model.save(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == model.config
    np.testing.assert_array_equal(again([SEQUENCES[0]]), model([SEQUENCES[0]]))


@pytest.mark.parametrize("quantization", ["q4", "nf4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_quantized_folders_of_families(tmp_path, family, quantization):
    model = tiny.load_tiny(tmp_path / "plain", **tiny.FAMILIES[family])
    before = model([SEQUENCES[2]])
    quantize_model(model, quantization, group_size=32)
    assert 0.01 < np.abs(model([SEQUENCES[2]]) - before).max() < 10
    model.save(tmp_path / "quantized")
    again = load_model(tmp_path / "quantized")
    assert {weight.format for weight in again.stored().values()} & {"affine4", "nf4"}
    np.testing.assert_array_equal(again([SEQUENCES[2]]), model([SEQUENCES[2]]))


GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "rms_norm_eps": 0.01,  # large enough for an eps that is not scaled to show
}


def test_multipliers_against_float64(tmp_path):
    c, arrays = tiny.write_folder(tmp_path, **GRANITE)
    model, tokens, expected = load_model(tmp_path), SEQUENCES[2], []
    want = tiny.logits(c, arrays, tokens, expected)
    np.testing.assert_allclose(model(np.array([tokens]))[0], want, rtol=0, atol=1e-5)
    last, states = model.hidden_states(np.array(tokens), [0, len(tokens)], [0, 2])
    np.testing.assert_allclose(model.head(last), want, rtol=0, atol=1e-5)
    for state, i in zip(states, (0, 2), strict=True):
        np.testing.assert_allclose(state, expected[i], rtol=0, atol=1e-4)
    # One sequence and all layers, if nothing else is said.
    again, every = model.hidden_states(tokens)
    assert len(every) == len(model.layers)
    for a, b in zip([again, every[0], every[2]], [last, *states], strict=True):
        np.testing.assert_array_equal(a, b)


LONGROPE = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [1.0, 3.0, 5.0],
        "attention_factor": 1.2,
    },
    "model_type": "phi3",
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 7,
}


def test_longrope_against_float64(tmp_path):
    c, arrays = tiny.write_folder(tmp_path, **LONGROPE)
    model = load_model(tmp_path)
    rows, begin = model.head(packed(model, SEQUENCES)), 0
    for tokens in SEQUENCES:
        want = tiny.logits(c, arrays, tokens)
        for got in (model(np.array([tokens]))[0], rows[begin : begin + len(tokens)]):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        begin += len(tokens)


def test_longrope_computes_the_keys_again_when_a_step_has_failed(tmp_path, monkeypatch):
    model = tiny.load_tiny(tmp_path, **LONGROPE)
    tokens, cache = np.array(SEQUENCES[2]), model.make_cache()
    model.step(tokens[:6], cache)
    model.step(tokens[6:7], cache)

    def failing(self, *unused, **more):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(transformer.Model, "_logits", failing)
        with pytest.raises(MemoryError):
            model.step(tokens[7:9], cache)
    assert cache.length == 0 and cache.history == tokens[:7].tolist()
    want = model(tokens[None, :9])[0, -1]
    np.testing.assert_allclose(model.step(tokens[7:9], cache), want, rtol=0, atol=1e-5)
    assert cache.length == 9


def test_losses_of_hidden_states_have_the_scaling_of_logits(tmp_path):
    model = tiny.load_tiny(tmp_path, **GRANITE)
    logits = np.concatenate([model(np.array([tokens]))[0] for tokens in SEQUENCES])
    labels = np.concatenate([[*s[1:], -1] for s in SEQUENCES]).astype(np.int32)
    want = pyloss.softmax_cross_entropy(logits, labels, ignore_index=-1).sum()
    assert loss(model, SEQUENCES) == pytest.approx(want, rel=1e-5)


def test_packed_sequences_do_not_see_each_other(model):
    together = packed(model, SEQUENCES)
    begin = 0
    for tokens in SEQUENCES:
        alone = model.hidden(tokens, [0, len(tokens)])
        np.testing.assert_allclose(together[begin : begin + len(tokens)], alone, atol=2e-5)
        begin += len(tokens)
    # With enough rows for one path of the kernels, a row's bits do not depend on the others.
    other = packed(model, [SEQUENCES[2], SEQUENCES[0]])
    np.testing.assert_array_equal(other[12:], together[:7])


def test_empty_sequences_and_batches(model):
    want = packed(model, SEQUENCES[:1])
    np.testing.assert_array_equal(model.hidden(SEQUENCES[0], [0, 0, 7, 7]), want)
    assert model.hidden([], [0]).shape == (0, 32) == model.hidden([], [0, 0]).shape
    assert model(np.zeros((0, 5), np.int32)).shape == (0, 5, 29)
    assert model(np.zeros((2, 0), np.int32)).shape == (2, 0, 29)


def test_a_batch_is_rows_of_their_own(model):
    batch = np.array([SEQUENCES[0], SEQUENCES[0][::-1]])
    logits = model(batch)
    for row, tokens in zip(logits, batch, strict=True):
        np.testing.assert_array_equal(row, model.head(packed(model, [tokens])))


@pytest.mark.parametrize("parts", [[1] * 12, [12], [5, 1, 6], [3, 9]])
def test_the_cache_gives_what_a_full_forward_gives(model, parts):
    tokens = np.array(SEQUENCES[2])
    whole, cache, begin = model(tokens[None])[0], model.make_cache(), 0
    for n in parts:
        logits = model.step(tokens[begin : begin + n], cache)
        begin += n
        assert logits.shape == (29,) and cache.length == begin
        np.testing.assert_allclose(logits, whole[begin - 1], atol=3e-5)


def test_the_cache_grows_over_many_tokens(model):
    rng = np.random.default_rng(0)
    tokens, cache = rng.integers(0, 29, 300), model.make_cache()
    whole = model(tokens[None])[0]
    model.step(tokens[:60], cache)
    for i in range(60, 300):
        logits = model.step(tokens[i : i + 1], cache)
    np.testing.assert_allclose(logits, whole[-1], atol=5e-5)


def test_the_cache_of_a_window_holds_what_can_be_seen(tmp_path):
    model = tiny.load_tiny(tmp_path / "model", model_type="mistral", sliding_window=50)
    rng = np.random.default_rng(0)
    tokens, cache = rng.integers(0, 29, 400), model.make_cache()
    whole = model(tokens[None])[0]
    begin = 0
    for n in (150, 1, 1, 20, 1, *[1] * 227):
        logits = model.step(tokens[begin : begin + n], cache)
        begin += n
        np.testing.assert_allclose(logits, whole[begin - 1], atol=5e-5)
    cache.reserve(1)
    keys, values, bounds = cache.append(
        0, np.zeros((1, 16), np.float32), np.zeros((1, 16), np.float32)
    )
    assert begin == cache.length == 400 and 50 <= bounds[1] <= len(keys) == len(values) <= 150


def loss(model, sequences):
    labels = np.concatenate([[*s[1:], -1] for s in sequences]).astype(np.int32)
    return pyloss.linear_cross_entropy(
        packed(model, sequences), model.head_weight, labels, ignore_index=-1
    ).sum()


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    ("dropout", "dora"), [(0.0, False), (0.2, False), (0.0, True), (0.2, True)]
)
def test_checkpoints_change_no_bit(model, monkeypatch, layers, dropout, dora, halves):
    if not halves:
        monkeypatch.setattr(transformer, "HALF_CHECKPOINT_TOKENS", 0)
    linear_to_lora_layers(
        model, layers, {"rank": 2, "scale": 3.0, "dropout": dropout}, use_dora=dora
    )
    rng = np.random.default_rng(1)
    for name, array in model.trainable_parameters().items():
        if name.endswith("lora_b"):
            array[...] = rng.standard_normal(array.shape)
    model.train()
    results = []
    for on in (False, True):
        pyloss.random.seed(4)
        model.set_grad_checkpoint(on)
        results.append(nn.value_and_grad(model, lambda: loss(model, SEQUENCES))())
    assert results[0][0] == results[1][0]
    for name, want in results[0][1].items():
        assert want.any() and want.tobytes() == results[1][1][name].tobytes(), name


@pytest.mark.parametrize(("halves", "products", "mixings"), [(True, 7 + 5, 1), (False, 7 + 6, 2)])
def test_a_checkpoint_computes_again_what_backward_reads_and_no_more(
    model, monkeypatch, halves, products, mixings
):
    """A layer's last product is not recomputed; in halves, nor is attention's, except its h."""
    if not halves:
        monkeypatch.setattr(transformer, "HALF_CHECKPOINT_TOKENS", 0)
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 3.0})
    model.set_grad_checkpoint()
    _core.profile(True)
    try:
        nn.value_and_grad(model, lambda: loss(model, SEQUENCES))()
    finally:
        found = _core.profile(False)
    layers = len(model.layers)
    assert (
        found["lora_forward"][0] == (products + 1 + halves) * layers
        and found["attention_forward"][0] == mixings * layers
    )
    assert (
        found["swiglu_forward"][0] == 2 * layers and found["lora_input_grad"][0] == 7 * layers - 3
    )


def test_gradients_of_every_parameter_against_differences(tmp_path):
    """Plain arrays, as in full fine-tuning; float64 differences along random directions."""
    c, arrays = tiny.write_folder(tmp_path, tied=False, bias=True)
    model = load_model(tmp_path)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = module.weight.dequantize()
    model.unfreeze()
    assert set(model.trainable_parameters()) == set(arrays)
    tokens = SEQUENCES[2]
    value, grads = nn.value_and_grad(model, lambda: loss(model, [tokens]))()

    def reference(arrays):
        z = tiny.logits(c, arrays, tokens[:-1])
        top = z.max(-1)
        return (
            np.log(np.exp(z - top[:, None]).sum(-1)) + top - z[np.arange(len(z)), tokens[1:]]
        ).sum()

    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    assert value == pytest.approx(reference(arrays), rel=1e-5)
    rng = np.random.default_rng(2)
    for name, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        slope = (
            reference({**arrays, name: array + 1e-6 * direction})
            - reference({**arrays, name: array - 1e-6 * direction})
        ) / 2e-6
        size = np.linalg.norm(grads[name]) * np.linalg.norm(direction)
        assert abs((grads[name] * direction).sum() - slope) < 1e-4 * size + 1e-6, name


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[3, 29]], r"token id 29 at position \(0, 1\).*\[0, 29\)"),
        ([[-1]], r"token id -1 at position \(0, 0\)"),
        ([[0, 1], [2, 2**31 - 1]], r"\(1, 1\)"),
    ],
)
def test_tokens_outside_the_vocabulary(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model(np.array(tokens))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.hidden(np.ravel(tokens), [0, np.size(tokens)])
    cache = model.make_cache()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.step(np.ravel(tokens), cache)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m([1, 2]), ValueError, "2 dimensions"),
        (lambda m: m(np.array([[0.5]])), TypeError, "integers"),
        (lambda m: m.hidden([[1, 2]], [0, 2]), ValueError, "1 dimension"),
        (lambda m: m.hidden([1, 2], [0, 1]), ValueError, "offsets"),
        (lambda m: m.hidden([1, 2], [1, 2]), ValueError, "offsets"),
        (lambda m: m.hidden([1, 2], [0, 2, 1, 2]), ValueError, "offsets"),
        (lambda m: m.hidden([1, 2], []), ValueError, "offsets"),
        (lambda m: m.step([], m.make_cache()), ValueError, "at least one token"),
    ],
)
def test_wrong_arguments(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_saved_and_loaded_it_is_the_same(tmp_path, options):
    model = tiny.load_tiny(tmp_path / "first", **options)
    model.save(tmp_path / "second")
    again = load_model(tmp_path / "second")
    tokens = np.array([SEQUENCES[2]])
    assert again(tokens).tobytes() == model(tokens).tobytes()
    assert again.config == model.config
    assert (again.lm_head is None) == (model.lm_head is None)


@pytest.mark.parametrize("format", ["Q4_1", "Q8_0", "F32"])
def test_a_gguf_model_saved_as_a_folder_is_the_same(tmp_path, format):
    pytest.importorskip("gguf")
    tiny.write_gguf(tmp_path / "model.gguf", format=format, bias=True)
    model = load_model(tmp_path / "model.gguf")
    model.save(tmp_path / "folder")
    tokens = np.array([SEQUENCES[2]])
    np.testing.assert_allclose(load_model(tmp_path / "folder")(tokens), model(tokens), atol=2e-5)


def test_adapters_are_fused_before_saving(tmp_path, model):
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 3.0})
    with pytest.raises(ValueError, match=r"21 unfused adapters.*fuse"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rng = np.random.default_rng(1)
    for array in model.trainable_parameters().values():
        array[...] = rng.standard_normal(array.shape) / 10
    tokens = np.array([SEQUENCES[2]])
    want = model(tokens)
    assert model.fuse() is model
    model.save(tmp_path / "out")
    np.testing.assert_allclose(load_model(tmp_path / "out")(tokens), want, atol=1e-4)


def test_a_loaded_model_is_frozen_and_tied_as_its_file_says(tmp_path, model):
    assert model.trainable_parameters() == {} and not model.training
    assert model.head_weight is model.model.embed_tokens.weight
    untied = tiny.load_tiny(tmp_path / "untied", tied=False)
    assert untied.head_weight is untied.lm_head.weight
    assert len(model.layers) == 3 and model.vocab_size == 29
