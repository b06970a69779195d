"""Layers by their recorded calls: the bits of the layers themselves, for batches of any size."""

import numpy as np
import pytest
from tape_cases import buffers

import pyloss
from pyloss import _core, nn, ops
from pyloss.autograd.recorded import Recorded
from pyloss.autograd.tape import Tape, data
from pyloss.models import layers as of_models
from pyloss.models.config import ModelConfig
from pyloss.models.config.mixture import Mixture
from pyloss.models.lfm2 import ShortConv
from pyloss.models.qwen3_5 import GatedDeltaNet
from pyloss.models.synthetic import random_model
from pyloss.runtime.precision import matmul_precision
from pyloss.tuner import default_loss, linear_to_lora_layers
from pyloss.tuner.adapters.full import unfreeze_layers

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GEMMA = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_local_base_freq": 100.0,
}
MINISTRAL3 = {
    "llama_4_scaling_beta": 0.4,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    },
}
CONVOLUTIONS = ["conv", "full_attention", "conv"]
EXPERTS, SHARED = Mixture(4, 2, 32, True), Mixture(4, 2, 32, False, shared_size=48)
BIASED = Mixture(4, 2, 32, True, dense_layers=(0,), bias=True, scaling=1.5)
DELTA = ["linear_attention", "full_attention", "linear_attention"]
OLMO3 = {key: value for key, value in GEMMA.items() if key != "rope_local_base_freq"}


def model(family="llama", format="f32", **changes):
    return random_model(ModelConfig(family, **SIZES | changes), format)


def adapted(family="llama", format="f32", keys=None, dropout=0.0, use_dora=False, **changes):
    made = model(family, format, **changes)
    pyloss.random.seed(3)
    config = {"rank": 4, "scale": 2.0, "dropout": dropout, **({"keys": keys} if keys else {})}
    linear_to_lora_layers(made, -1, config, use_dora)
    for name, array in made.trainable_parameters().items():
        if name.endswith("lora_b"):
            array[...] = np.random.default_rng(5).standard_normal(array.shape) / 8
    return made.train()


def batches(lengths):
    rng = np.random.default_rng(1)
    for some in lengths:
        ids = rng.integers(0, SIZES["vocab_size"], (len(some), max(some))).astype(np.int32)
        yield ids, np.array([(0, n) for n in some], np.int32)


def losses_and_gradients(net, lengths=((7, 5), (3,), (9, 2, 6), (7, 5))):
    """The bits of some steps: losses, gradients, and parameters that the steps have changed."""
    both, found = nn.value_and_grad(net, default_loss), []
    pyloss.random.seed(9)
    for ids, bounds in batches(lengths):
        (loss, _), grads = both(net, ids, bounds)
        for name, array in net.trainable_parameters().items():
            array -= np.float32(0.01) * grads[name]
        found.append((float(loss), {name: grad.tobytes() for name, grad in grads.items()}))
    return found


@pytest.fixture
def counted(monkeypatch):
    """The number of times that the Python of attention or of a convolution ran."""
    calls = []

    def count(cls):
        call = cls.__call__

        def run(self, *arguments):
            calls.append(self)
            return call(self, *arguments)

        monkeypatch.setattr(cls, "__call__", run)

    count(of_models.Attention)
    count(ShortConv)
    count(GatedDeltaNet)
    return calls


def unfrozen(net):
    unfreeze_layers(net)
    return net.train()


@pytest.mark.parametrize(
    "make, recorded",
    [
        (adapted, True),
        (lambda: adapted(format="q4_0"), True),
        (lambda: adapted("qwen3", "q8_0"), True),
        (lambda: adapted("gemma3_text", **GEMMA), True),
        (lambda: adapted("gemma2", attn_logit_softcapping=2.0), True),
        (lambda: adapted("granitemoehybrid", residual_multiplier=0.22), True),
        (lambda: adapted("ministral3", **MINISTRAL3), True),
        (lambda: adapted("smollm3", no_rope_layers=[1, 0, 1]), True),
        (lambda: adapted("olmo2", "q8_0"), True),
        (lambda: adapted("olmo3", **OLMO3), True),
        (lambda: adapted("qwen2", attention_bias=True), True),
        (lambda: adapted("phi3", partial_rotary_factor=0.5), True),
        (lambda: adapted("lfm2", layer_types=CONVOLUTIONS), True),
        (lambda: adapted("qwen3_5_text", layer_types=DELTA), True),
        # gradients of weights under an offset are arrays that others read
        (lambda: unfrozen(model("qwen3_5_text", layer_types=DELTA)), False),
        (lambda: unfrozen(model("lfm2", layer_types=CONVOLUTIONS)), True),
        (lambda: adapted("granite", residual_multiplier=0.22, logits_scaling=8.0), True),
        (lambda: adapted(keys=["self_attn.q_proj", "self_attn.v_proj"]), True),
        (lambda: adapted(keys=["mlp.down_proj"]), True),
        (lambda: unfrozen(model()), True),
        (lambda: adapted(dropout=0.2), True),
        (lambda: adapted("qwen3", use_dora=True, dropout=0.2), True),
        (lambda: adapted("qwen2", attention_bias=True, use_dora=True), True),
        (lambda: adapted(use_dora=True), True),
        (lambda: adapted("qwen3_moe", mixture=EXPERTS), True),
        (lambda: adapted("mixtral", "q8_0", dropout=0.2, mixture=EXPERTS), True),
        (lambda: adapted("qwen2_moe", mixture=SHARED), True),
        (lambda: adapted("granitemoe", mixture=EXPERTS), True),
        (lambda: adapted("lfm2_moe", layer_types=CONVOLUTIONS, mixture=BIASED), True),
        (lambda: unfrozen(model("qwen3_moe", mixture=EXPERTS)), True),
        # which experts' norms are computed depends on the tokens
        (lambda: adapted("qwen3_moe", use_dora=True, mixture=EXPERTS), False),
    ],
)
def test_recorded_layers_have_the_bits_of_the_layers(make, recorded, counted, monkeypatch):
    found = losses_and_gradients(make())
    by_record = len(counted)
    monkeypatch.setattr("pyloss.nn.module.recorded_module", lambda layer: None)
    assert found == losses_and_gradients(make())
    layers = SIZES["num_hidden_layers"]
    assert len(counted) - by_record == 4 * layers
    # One run of a layer is recorded, and then none; layers that cannot be recorded run each time.
    assert by_record == (layers if recorded else 4 * layers)


def test_parts_of_a_batch_and_several_runs_on_one_tape(counted, monkeypatch):
    """Each run has its own arrays, though all run one program."""

    def steps():
        net = adapted()
        (ids, bounds), (other, ends) = batches([(6, 8), (4,)])

        def both(net):
            return default_loss(net, ids, bounds)[0] + 3.0 * default_loss(net, other, ends)[0]

        return [
            (float(value), {name: grad.tobytes() for name, grad in grads.items()})
            for value, grads in (nn.value_and_grad(net, both)(net) for _ in range(3))
        ]

    found = steps()
    assert len(counted) < 3 * 2 * SIZES["num_hidden_layers"]
    monkeypatch.setattr("pyloss.nn.module.recorded_module", lambda layer: None)
    assert found == steps()


def test_every_change_of_a_layer_is_seen(monkeypatch):
    def steps():
        net, found = adapted(), []
        found += losses_and_gradients(net)
        first, last = net.layers[0], net.layers[2]
        first.self_attn.q_proj.freeze(keys=["lora_a"], recurse=False)
        found += losses_and_gradients(net)
        last.mlp.up_proj.lora_b = last.mlp.up_proj.lora_b.copy()
        last.mlp.up_proj.scale = 3.0
        found += losses_and_gradients(net)
        first.self_attn.q_proj.dropout = 0.5
        found += losses_and_gradients(net)
        net.eval()
        found += losses_and_gradients(net)
        net.train()
        found += losses_and_gradients(net)
        net.layers[1].mlp.gate_proj.linear.weight = last.mlp.gate_proj.linear.weight
        found += losses_and_gradients(net)
        net.layers.pop()
        found += losses_and_gradients(net)
        return found

    found = steps()
    monkeypatch.setattr("pyloss.nn.module.recorded_module", lambda layer: None)
    assert found == steps()


def test_subclasses_and_foreign_modules_run_as_they_are(counted):
    net = adapted()

    class Own(nn.Linear):
        def __call__(self, x):
            return ops.scale(super().__call__(x), float(np.asarray(data(x)).shape[0]))

    net.layers[1].mlp.down_proj = Own(SIZES["intermediate_size"], SIZES["hidden_size"])
    losses_and_gradients(net)
    assert sum(module is net.layers[1].self_attn for module in counted) == 4
    assert sum(module is net.layers[0].self_attn for module in counted) == 1


def test_no_array_lives_longer_and_no_more_memory_is_used(monkeypatch):
    def peak():
        net = adapted()
        both = nn.value_and_grad(net, default_loss)
        (ids, bounds), *_ = batches([(40, 40, 40)])
        for _ in range(3):  # the first is recorded
            both(net, ids, bounds)
        before = buffers()
        _core.trim()
        both(net, ids, bounds)
        assert buffers() == before
        return _core.buffer_stats()["peak"] - before

    found = peak()
    monkeypatch.setattr("pyloss.nn.module.recorded_module", lambda layer: None)
    assert found <= peak()


@pytest.mark.parametrize("function", ["numpy", "drawn", "read"])
def test_functions_that_calls_do_not_describe(function):
    """They are called each time: their Python computes or draws something."""
    w = np.ones((4, 3), np.float32)
    seeds = iter(range(9))

    def numpy(x):
        return ops.linear(ops.add(x, np.abs(data(x))), w)

    def drawn(x):
        return ops.linear(ops.dropout(x, 0.5, next(seeds)), w)

    def read(x):
        found = np.zeros(1, np.uint8)
        _core.same_bits(data(x).reshape(-1), -np.arange(6, dtype=np.float32), found)
        return ops.linear(ops.scale(x, 2.0 if found[0] else 3.0), w)

    f, recorded = {"numpy": numpy, "drawn": drawn, "read": read}[function], Recorded([w], [])
    for sign in (1, -1, 1):
        x = sign * np.arange(6, dtype=np.float32).reshape(2, 3)
        with Tape() as tape:
            leaf = tape.watch(w)
            y = recorded(f, x, [])
            tape.backward(y, np.ones((2, 4), np.float32))
        expected = {"numpy": x + np.abs(x), "read": x * (2 if sign < 0 else 3)}.get(function)
        if expected is not None:
            np.testing.assert_array_equal(leaf.grad, np.ones((4, 1)) * expected.sum(0))
    assert next(seeds) == (3 if function == "drawn" else 0)


def test_a_run_while_calls_are_recorded_is_the_function():
    """A recording has calls that can be repeated."""
    w, recorded = np.ones((4, 3), np.float32), Recorded([w0 := np.ones((4, 3), np.float32)], [])
    x = np.ones((2, 3), np.float32)
    for _ in range(2):
        with Tape() as tape:
            tape.watch(w0)
            _core.record(True)
            recorded(lambda value: ops.linear(value, w0), x, [])
            calls = _core.record(False)
        assert len(calls) == 1 and all(argument is not ... for argument in calls[0])
    assert w.all()


def test_an_error_in_a_recorded_run_ends_the_recording():
    w = np.ones((4, 3), np.float32)
    recorded, x = Recorded([w], []), np.ones((2, 3), np.float32)

    def broken(value):
        raise RuntimeError("within")

    with Tape() as tape:
        tape.watch(w)
        with pytest.raises(RuntimeError, match="within"):
            recorded(broken, x, [])
    assert not _core.recording()


def one_step(net, lengths=(7, 40)):
    """The loss and the gradients of one batch."""
    ((ids, bounds),) = batches([lengths])
    (loss, _), grads = nn.value_and_grad(net, default_loss)(net, ids, bounds)
    return float(loss), {name: grad.copy() for name, grad in grads.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted("qwen3", "q8_0"),
        lambda: adapted("gemma3_text", **GEMMA),
        lambda: adapted("gemma2", attn_logit_softcapping=2.0),
        lambda: adapted("granite", residual_multiplier=0.22, logits_scaling=8.0),
        lambda: adapted("qwen2", attention_bias=True),
        lambda: adapted("phi3", partial_rotary_factor=0.5),
        lambda: adapted("lfm2", layer_types=CONVOLUTIONS),
        lambda: adapted("qwen3_5_text", layer_types=DELTA),
        lambda: unfrozen(model()),
        lambda: adapted("qwen3_moe", "q8_0", mixture=Mixture(4, 4, 32, True)),
    ],
)
def test_activations_in_bfloat16_are_near_those_in_float32(make, isa):
    loss, grads = one_step(make())
    errors = {}
    for precision in ("bfloat16", "mixed"):
        with matmul_precision(precision):
            rounded_loss, rounded = one_step(make())
        assert rounded_loss != loss and abs(rounded_loss / loss - 1) < 0.01
        errors[precision] = {
            name: np.linalg.norm(rounded[name] - grad) / np.linalg.norm(grad)
            for name, grad in grads.items()
        }
    for name in grads:
        # A rounding is 2^-9 of a number at most; a gradient passes some twenty more than those of
        # the products.
        assert 0 < errors["mixed"][name] < errors["bfloat16"][name] + 20 * 2**-9, name


def test_activations_in_bfloat16_do_not_depend_on_the_first_run():
    with matmul_precision("mixed"):
        first, later = adapted("qwen3"), adapted("qwen3")
        want = one_step(first)
        one_step(later, (3, 9, 21))
        got = one_step(later)
        again = one_step(first)
    for loss, grads in (got, again):
        assert loss == want[0]
        assert all(np.array_equal(grads[name], grad) for name, grad in want[1].items())
    exact = one_step(adapted("qwen3"))
    back = one_step(first)  # float32 again
    assert exact[0] == back[0] != want[0]
    assert all(np.array_equal(back[1][name], grad) for name, grad in exact[1].items())


def test_layers_that_are_not_recorded_keep_float32():
    def make():
        return adapted("qwen3_moe", use_dora=True, mixture=EXPERTS)

    with matmul_precision("bfloat16"):
        want = losses_and_gradients(make())
    with matmul_precision("mixed"):
        assert losses_and_gradients(make()) == want


def test_activations_in_bfloat16_take_less_memory():
    def peak(precision):
        with matmul_precision(precision):
            net = adapted("qwen3", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
            for lengths in ((200, 200),) * 2:  # the first is recorded
                _core.trim()
                before = buffers()
                one_step(net, lengths)
        return _core.buffer_stats()["peak"] - before

    assert peak("mixed") < 0.7 * peak("bfloat16")
