"""The parts of the benchmarks that compute: batches of conversations, work of an operation."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

import pyloss
from pyloss import _core
from pyloss.models import building, synthetic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bases
import distributed
import families
import layer_errors
import limit_tables
import loss_rows
import matmul
import mlx_scripts
import opencl
import quantize
import recursive
import recursive_pyloss
import recursive_work
import scaling
import shapes
import step_limits
import step_work
import train


@pytest.fixture
def chat(tmp_path):
    lengths = np.array([(2, 4), (1, 9), (3, 5)], np.int32)
    path = tmp_path / "chat.npz"
    np.savez(path, tokens=np.arange(18, dtype=np.int32), lengths=lengths)
    return path


def options(chat, grouped=False):
    return SimpleNamespace(chat=chat, batch=2, tokens=0, grouped=grouped)


def test_conversations_are_padded_to_the_longest_of_their_batch(chat):
    first, second = step_work.batches(options(chat), 49152)
    np.testing.assert_array_equal(first.ids, [[0, 1, 2, 3, 0, 0, 0, 0, 0], list(range(4, 13))])
    np.testing.assert_array_equal(first.lengths, [(2, 4), (1, 9)])
    assert (first.tokens, first.padded) == (11, True)
    np.testing.assert_array_equal(second.ids, [list(range(13, 18))])
    assert (second.tokens, second.padded) == (4, False)


def test_grouped_conversations_are_of_like_lengths(chat):
    assert [
        batch.lengths[:, 1].tolist()
        for batch in step_work.batches(options(chat, grouped=True), 49152)
    ] == [[4, 5], [9]]


def test_full_batches_have_a_target_after_every_token():
    (batch,) = step_work.batches(SimpleNamespace(chat=None, batch=3, tokens=7), 50)
    assert batch.ids.shape == (3, 8) and batch.ids.max() < 50
    assert (batch.tokens, batch.padded) == (21, False)


def test_the_work_of_products_and_attention():
    specs = dict(_core.ops())

    def work(name, *arguments):
        return step_limits.work_of(name, specs[name], arguments)

    def f(*shape):
        return np.zeros(shape, np.float32)

    x, w, y, h, a, b = f(2, 3, 5), f(7, 5), f(2, 3, 7), f(6, 4), f(5, 4), f(4, 7)
    assert work("linear_forward", x, w, None, None, None, 0.0, None, y) == 2 * 6 * 5 * 7
    assert work("lora_forward", x, w, None, a, b, 1.0, None, h, y) == 2 * 6 * (5 * 7 + 4 * (5 + 7))
    assert work("linear_input_grad", y, w, h, a, 0, None, x) == 2 * 6 * (5 * 7 + 4 * 5)
    assert work("linear_weight_grad", f(6, 3), f(6, 2), 0, f(3, 2)) == 2 * 6 * 3 * 2
    assert work("matmul_tn", f(6, 3), f(6, 2), 1.0, 0, f(3, 2)) == 2 * 6 * 3 * 2
    offsets = np.array([0, 3, 5], np.int32)
    q, k = f(5, 4, 8), f(5, 2, 8)
    seen = 6 + 3
    assert (
        work("attention_forward", q, k, k, offsets, offsets, 1.0, 0.0, 0, 0, q, f(5, 4))
        == 2 * 2 * seen * 4 * 8
    )
    assert (
        work("attention_grad", q, q, k, k, q, f(5, 4), offsets, offsets, 1.0, 0.0, 2, 0, q, k, k)
        == 2 * 5 * (5 + 3) * 4 * 8
    )
    assert work("add", x, x, x) == 0


def test_work_by_shape_without_adapters(monkeypatch):
    specs, work = dict(_core.ops()), step_limits.Work()

    def f(*shape):
        return np.zeros(shape, np.float32)

    x, w, h, a, b = f(6, 5), f(7, 5), f(6, 4), f(5, 4), f(4, 7)
    given = (x, w, None, a, b, 1.0, None, h, f(6, 7))
    for seconds in (0.5, 0.25):
        work.add("lora_forward", specs["lora_forward"], given, seconds)
    work.add("matmul_tn", specs["matmul_tn"], (f(6, 3), f(6, 2), 1.0, 0, f(3, 2)), 1.0)
    work.add("add", specs["add"], (x, x, x), 1.0)
    assert work.base == 2 * 2 * 6 * 5 * 7
    assert work.shapes == {
        "lora_forward 6 x 5 to 7": (2, 0.25, 2 * 2 * 6 * (5 * 7 + 4 * (5 + 7))),
        "matmul_tn 3 x 6 x 2": (1, 1.0, 2 * 6 * 3 * 2),
        "add 6 x 5": (1, 1.0, 0),
    }
    assert work.flop["lora_forward"] == 2 * 2 * 6 * (5 * 7 + 4 * (5 + 7)) and not work.flop["add"]


def test_the_limits_of_a_step_by_kind_of_operation():
    found = {
        "step_ms": 100.0,
        "matrix_gflops": 100.0,
        "memory_gb_s": 10.0,
        "base_gflop": 4.5,
        "operations": {
            "lora_forward": [10, 60.0, 5.0, 0.1],
            "attention_grad": [2, 20.0, 1.0, 0.1],
            "add": [3, 10.0, 0.0, 0.05],
        },
        "shapes": {
            "lora_forward 6 x 5 to 7": [4, 20.0, 1.5],
            "attention_grad 4 heads of 8": [1, 4.0, 0.2],
            "add 6 x 5": [2, 1.0, 0.0],
        },
    }
    rows = {
        cells[0]: cells[2:]
        for line in limit_tables.limit_table(found, "LoRA").splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    assert rows["lora_forward"] == ["60.0", "50.0", "0.83", "83 GFLOP/s"]
    assert rows["matrix products"] == ["60.0", "50.0", "0.83", "60% of all"]
    assert rows["attention"] == ["20.0", "10.0", "0.50", "20% of all"]
    assert rows["everything else"] == ["20.0", "5.0", "0.25", "20% of all"]
    assert rows["between operations (Python)"][0] == "10.0"
    assert rows["all"] == ["100.0", "65.0", "0.65", ""]
    assert rows["all, against the base's products alone"] == ["100.0", "45.0", "0.45", ""]
    lines = limit_tables.shape_table(found, "LoRA", rows=1).splitlines()
    assert lines[2:] == [
        "| lora_forward 6 x 5 to 7 | 4 | 20.0 | 15.0 | 0.75 | 5.0 | 80.0% |",
        "| matrix products |  | 20.0 | 15.0 | 0.75 | 5.0 | 80.0% |",
        "| attention |  | 4.0 | 2.0 | 0.50 | 2.0 | 16.0% |",
        "| others |  | 1.0 | 0.0 |  | 1.0 | 4.0% |",
        "| all |  | 25.0 | 17.0 | 0.68 | 8.0 | 100.0% |",
        "| all, against the base's products alone |  | 25.0 | 45.0 | 1.80 | -20.0 | 100.0% |",
    ]


# numbers of the models' cards, embeddings included
PARAMETERS = {
    "SmolLM2-135M": 0.1345e9,
    "LFM2-350M": 0.354e9,
    "Qwen2.5-0.5B": 0.494e9,
    "Qwen3-0.6B": 0.596e9,
    "Qwen3.5-0.8B": 0.752e9,
    "Gemma-3-1B": 1.0e9,
    "LFM2-1.2B": 1.17e9,
    "Llama-3.2-1B": 1.236e9,
    "OLMo-2-1B": 1.485e9,
    "OLMoE-1B-7B": 6.92e9,
    "SmolLM2-1.7B": 1.711e9,
    "Qwen3-1.7B": 1.72e9,
    "Granite-3.3-2B": 2.53e9,
    "Gemma-2-2B": 2.614e9,
    "Gemma-4-E2B": 4.65e9,
    "SmolLM3-3B": 3.075e9,
    "Phi-4-mini": 3.836e9,
    "Qwen3-4B": 4.022e9,
}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_of_real_models_have_their_sizes(name, monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "WORK", tmp_path)
    config, format = synthetic.shape_of(Path(shapes.shape_file(name)))
    source = synthetic.RandomSource("bf16")
    building.build_model(config, source)  # nothing is written, so no memory is taken
    assert format == "bf16"
    assert source.nbytes / 2 == pytest.approx(PARAMETERS[name], rel=0.01)


def test_random_weights_of_a_shape_in_a_format(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "WORK", tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 50, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.SHAPES["Qwen3-0.6B"] | sizes | heads)
    file = shapes.narrow("tiny", 1, 40)
    for stored, format in ((None, "bf16"), ("q4", "affine4")):
        model = bases.load(file, stored)
        assert (len(model.layers), model.vocab_size) == (1, 40)
        assert model.layers[0].mlp.up_proj.weight.format == format


def test_the_time_of_products_and_the_rows_of_mixers():
    shown = {
        "linear_forward 8 x 4 to 4": [2, 3.0, 4.0],
        "attention_forward 2 heads of 4": [1, 1.0, 8.0],
        "short_conv_forward 8 x 4": [1, 5.0, 0.0],
    }
    found = {
        "matrix_gflops": 100.0,
        "memory_gb_s": 10.0,
        "shapes": shown,
        "operations": {"short_conv_forward": [1, 5.0, 0.0, 0.02], "add": [1, 1.0, 0.0, 0.1]},
    }
    assert families.product_limit(found) == 40.0
    rows = families.mixer_rows("LFM2", found)
    assert rows == [("LFM2: short_conv_forward", "1", "5.0", "", "4.0", "0.40")]


def test_the_table_of_real_sizes(monkeypatch, tmp_path):
    """As the README carries it; models that memory is too small for are said to be left out."""
    monkeypatch.setattr(shapes, "WORK", tmp_path)
    found = {"base_gb": 0.083, "tokens_per_s": 154.2, "peak_gb": 0.617}
    half = found | {"tokens_per_s": 308.4, "peak_gb": 0.42}
    monkeypatch.setattr(families, "run_json", lambda *flags: half if "mixed" in flags else found)
    free = iter([9.0, 3.0])
    monkeypatch.setattr(families, "free_gb", lambda: next(free))
    (text,) = families.whole_models(False, families.SIZES)
    about, _, head, _, *rows, last = text.split("\n")
    assert about.startswith("LoRA of rank 8 over 4-bit weights (Q4_1), 1 x 512 tokens")
    assert head.startswith(
        "| model | weights, GB | training, float32, tokens/s | training, mixed, "
    )
    assert rows == [
        f"| {name} | 0.08 | 154 | 308 | 11 to 5 | 0.62 to 0.42 | 154.2 |"
        for name in ("SmolLM2-135M", "LFM2-350M")
    ]
    assert last == "Larger ones were left out: less than 4 GB of memory are free."


def test_peers_run_where_memory_allows(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "WORK", tmp_path)
    # measured: 7.8 and 5.3 GB for 1 x 512 tokens
    assert train.peer_gb("Qwen3-0.6B", "float32", 512) == pytest.approx(7.8, rel=0.1)
    assert train.peer_gb("Qwen3-0.6B", "bfloat16", 512) == pytest.approx(5.3, rel=0.1)
    names = []
    for free in (40, 15, 3):
        monkeypatch.setattr(train, "free_gb", lambda free=free: free)
        found = train.fitting_peer("Qwen3-0.6B", "float32", 4, 512)
        names.append(found and (found.name, found.flags))
    flags = ("--kind", "lora", "--dtype", "float32")
    assert names == [
        ("torch + PEFT, LoRA", flags),
        ("torch + PEFT, LoRA, checkpointing", (*flags, "--checkpoint")),
        None,
    ]
    monkeypatch.setattr(train, "free_gb", lambda: 40)
    for has, name in ((True, "torch + PEFT, LoRA, bfloat16"), (False, None)):
        monkeypatch.setattr(train, "has_instructions", lambda has=has: has)
        found = train.fitting_peer("Qwen3-0.6B", "bfloat16", 4, 512)
        assert (found and found.name) == name


def test_a_slow_program_does_fewer_passes(monkeypatch, capsys):
    steps = []
    options = step_work.parser("").parse_args(["model", "--passes", "3", "--most-seconds", "0"])
    step_work.measure(options, 50, 1000, lambda batch: steps.append(batch) or 1.5)
    assert len(steps) == 1 and '"loss": 1.5' in capsys.readouterr().out


def test_a_device_is_compared_with_the_c_kernels_of_the_same_base():
    found = {
        name: {"tokens_per_s": speed, "first_s": 3.25, "loss": 1.5}
        for name, speed in (("a", 200.0), (opencl.on("a"), 150.0))
    }
    assert opencl.step_rows(found, host=True) == [
        ("a", "200", "", "3.2", "1.5000"),
        ("a, on the device", "150", "0.75", "3.2", "1.5000"),
    ]
    assert opencl.step_rows({"b": found["a"]}, host=False) == [("b", "200", "3.2", "1.5000")]
    key = "576x1536 q4_1 float32 forward"
    assert opencl.product_rows({key: 50.0}, {key: 100.0}) == [
        ("1024 x 576 to 1536, q4_1, forward", "50", "100", "0.50")
    ]
    assert opencl.product_rows({"4096x4096 f32 float32 input gradient": 50.0}, None) == [
        ("4096 x 4096 to 4096, f32, input gradient", "50")
    ]


def test_losses_are_compared_with_the_bytes_they_need():
    assert (
        opencl.gigabytes("read 2, write 1", 10**9) == 3
        and opencl.gigabytes("read 1", 5 * 10**8) == 0.5
    )
    ms = {
        f"{loss} {direction}": 100.0
        for loss in loss_rows.LOSSES
        for direction in ("forward", "both")
    }
    rows = {name: cells for name, *cells in opencl.loss_rows(ms, 10**9, 40.0)}
    assert rows["cross entropy, loss"] == ["100.00", "10", "0.25"]
    assert rows["KL, loss + gradient"] == ["100.00", "30", "0.75"]
    some = opencl.loss_rows({"JS forward": 100.0}, 10**9, 40.0)
    assert some == [("JS, loss", "100.00", "20", "0.50")], "a library without the other losses"


def test_rows_beyond_those_drawn_repeat_them():
    q, p, labels = loss_rows.logits(loss_rows.DRAWN + 2, 3, "bf16")
    assert q.shape == p.shape == (loss_rows.DRAWN + 2, 3) and len(labels) == len(q)
    assert (q[:2] == q[loss_rows.DRAWN :]).all() and (q != p).any()


def test_logits_fit_into_a_device(monkeypatch):
    device = SimpleNamespace(id="opencl:1")
    limits = [{}, {"max_allocation": 4000, "memory": 10**6}]
    monkeypatch.setattr(_core, "opencl_devices", lambda: (limits, None))
    assert opencl.fitting(device, 64, 100, "f32") == (8, 100)
    assert opencl.fitting(device, 64, 100, "bf16") == (16, 100)
    limits[1]["memory"] = 5 * 1600
    assert opencl.fitting(device, 64, 100, "f32") == (4, 100)


def test_products_on_a_device_are_those_of_the_c_kernels():
    if len(pyloss.devices()) == 1:
        pytest.skip("no OpenCL device")
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((3, 64), (5, 64), (3, 5))
    )
    stored = {"f32": w, "q4_1": pyloss.Weight.quantize(w, "q4_1").dequantize()}
    seen = set()
    for name, _, direction, function in matmul.products("opencl:0", x, w, dy):
        want = x @ stored[name].T if direction == "forward" else dy @ stored[name]
        np.testing.assert_allclose(function().numpy(), want, atol=1e-4)
        seen.add((name, direction))
    assert len(seen) == 4


def test_the_predicted_time_of_a_call():
    """The slowest thread has its pieces, and threads meet log2(threads) steps deep."""
    call = scaling.Call("add", 8.0, 2, 10)
    assert scaling.predicted(call, 1, 0.1) == 8.0
    assert scaling.predicted(call, 2, 0.1) == pytest.approx(4.0 + 0.2)
    assert scaling.predicted(call, 4, 0.0) == pytest.approx(2.4)  # 3 of 10 pieces
    assert scaling.predicted(call, 64, 0.1) == pytest.approx(0.8 + 2 * 0.1 * 6)
    inline = scaling.Call("add", 1.0, 0, 1)
    assert scaling.predicted(inline, 64, 0.1) == 1.0
    assert scaling.step_seconds([call, inline], 0.5, 4, 0.0) == pytest.approx(3.9)


def test_the_exchange_of_gradients_is_fitted_and_predicted():
    """2 (n - 1) messages and 2 (n - 1) / n of the bytes; ranks beyond the cores share time."""
    true = distributed.Exchange(1e-4, 2e-5, 1e-9)
    assert true.seconds(1, 1e6) == 0
    assert true.seconds(4, 1e6) == pytest.approx(1e-4 + 6 * 2e-5 + 1.5e6 * 1e-9)
    slow = true.seconds(2, 1e6, rate=1e8, delay=1e-3)
    assert slow == pytest.approx(1e-4 + 2 * (2e-5 + 1e-3) + 1e6 * (1e-9 + 1e-8))
    measured = {
        ranks: [(size, true.seconds(ranks, size) * max(ranks / 2, 1)) for size in (8, 10**6, 10**8)]
        for ranks in (2, 4, 8)
    }
    assert distributed.fitted(measured, 2) == pytest.approx(true)


def test_the_calls_of_a_step_are_counted_one_by_one(monkeypatch):
    monkeypatch.setattr(scaling.Recorded, "__call__", scaling.Recorded.__call__)
    x, y = [np.ones(9000, np.float32) for _ in range(2)], [np.ones(9000, np.float32)] * 2
    calls = scaling.calls_of_step(lambda: _core.axpy(1.0, x, y), ())
    assert [(call.name, call.meetings, call.pieces > 1) for call in calls] == [
        ("axpy", 1, True)
    ] * 2


def test_qualities_are_means_over_the_tokens(tmp_path):
    """Of windows of different lengths; the original's own divergence is 0."""
    original = tiny.load_tiny(tmp_path / "a", vocab_size=29)
    other = tiny.load_tiny(tmp_path / "b", vocab_size=29, seed=1)
    windows = [[3, 5, 7, 2], [1, 2], [9] * 7]
    found = quantize.qualities(original, {"original": original, "other": other}, windows)
    divergence = loss = 0.0
    for window in windows:
        p, q = (
            z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
            for z in (
                model(np.array([window]))[0, :-1].astype(np.float64) for model in (original, other)
            )
        )
        divergence += (np.exp(p) * (p - q)).sum()
        loss -= q[range(len(window) - 1), window[1:]].sum()
    np.testing.assert_allclose(found["other"], (divergence / 10, np.exp(loss / 10)), rtol=1e-5)
    assert abs(found["original"][0]) < 1e-7 and found["original"][1] != found["other"][1]


def test_errors_of_gradients_are_those_of_each_layer_over_all_batches():
    names = ("model.layers.1.a", "base.model.layers.0.b", "layers.0.a", "embed_tokens")
    rng = np.random.default_rng(0)
    exact, found = ([{n: rng.standard_normal((2, 3)) for n in names} for _ in "ab"] for _ in "ab")
    errors = layer_errors.relative(
        *([layer_errors.layers_of(g) for g in s] for s in (exact, found))
    )
    for layer, error in enumerate(errors):
        own = [n for n in names if f"layers.{layer}." in n]
        away, size = (
            sum(np.sum(f(a[n], b[n]) ** 2) for a, b in zip(exact, found, strict=True) for n in own)
            for f in (np.subtract, lambda a, b: a)
        )
        assert error == pytest.approx(np.sqrt(away / size))
    assert len(errors) == 2


def test_a_script_under_mlx_and_pyloss_is_a_row():
    """Losses near 0 are compared by themselves, others by the share of their difference."""
    theirs = {"tokens_per_s": 2.5, "losses": [4.0, 0.0]}
    ours = {"tokens_per_s": 100.0, "losses": [4.0004, 0.00002]}
    assert mlx_scripts.row("a_script", theirs, ours) == ("a script", "2.5", "100", "40", "1e-04")
    assert mlx_scripts.mean_ratio([(theirs, ours), (ours, theirs)]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="1 losses were found, and 2 expected"):
        mlx_scripts.difference([4.0], theirs["losses"])


def test_scripts_for_mlx_are_measured_in_turn(monkeypatch, capsys):
    """Each under both; a name that is no script is refused before anything runs."""
    asked = []

    def run_json(program, side, *given):
        asked.append((program, side, *given[:1], *given[2:]))
        return {"tokens_per_s": {"mlx": 2.0, "pyloss": 80.0}[side], "losses": [1.0]}

    for name, value in {"run_json": run_json, "room": lambda: "room", "machine": str}.items():
        monkeypatch.setattr(mlx_scripts, name, value)
    monkeypatch.setattr(
        sys, "argv", ["mlx_scripts.py", "--quick", "--clock=cpu", "--only=resume,on_policy"]
    )
    mlx_scripts.main()
    options = ("--updates", "1", "--clock", "cpu", "--rounds")
    assert asked == [
        ("mlx_script.py", side, script, *options, rounds)
        for script in ("resume", "on_policy")
        for side, rounds in (("pyloss", "5"), ("mlx", "1"))
    ]
    printed = capsys.readouterr().out
    assert "| on policy | 2.0 | 80 | 40 | 0e+00 |" in printed and "ratios is 40" in printed
    monkeypatch.setattr(sys, "argv", ["mlx_scripts.py", "--only", "resum"])
    with pytest.raises(SystemExit):
        mlx_scripts.main()
    assert "no script is called 'resum'" in capsys.readouterr().err and len(asked) == 4


@pytest.mark.parametrize("case, levels", [("trm-256", 21 + 2 * 7), ("hrm-256", 2 * (12 + 2 * 2))])
def test_the_products_of_an_update_of_a_recursive_model(case, levels, monkeypatch):
    """Each run of two blocks multiplies by their matrices once, and its gradient twice."""
    for name, _ in _core.ops():
        monkeypatch.setattr(_core, name, getattr(_core, name))
    for module, name in ((step_limits, "WORK"), (step_limits.Recorded, "__call__")):
        monkeypatch.setattr(module, name, getattr(module, name))
    sizes = {"hidden_size": 32, "num_heads": 2, "seq_len": 9, "batch_size": 4}
    kind, config = recursive_work.config_of(case, **sizes)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * config.inner_size(32))
    heads = (2 if kind == "hrm" else 1) + 2
    expected = 2 * (36 * (levels * weights + heads * 11 * 32) + 4 * heads * 2 * 32)
    assert recursive_pyloss.products_of(kind, config) == pytest.approx(expected / 1e9, rel=1e-12)


def test_sides_of_a_recursive_update_are_measured_in_turn(monkeypatch, capsys):
    """The best update and the least memory of the rounds, beside the fastest product of either."""
    asked = []

    def run_json(program, case, *flags, **_):
        asked.append((program, *flags))
        if "--products" in flags:
            ours = program == "recursive_pyloss.py"
            speeds = {"float32": 100.0, "bfloat16": 300.0 + 100 * ours}
            return {"gflops": speeds} | ({"gflop": 200.0} if ours else {})
        first = asked.count((program, *flags)) == 1
        seconds = {"recursive_peer.py": 6.0, "recursive_pyloss.py": 4.0}[program]
        seconds -= ("--compile" in flags) + ("bfloat16" in flags)
        peak = 1.5 if first else 1.25
        return {"update_s": seconds + (not first), "peak_gb": peak, "loss": 2.5}

    monkeypatch.setattr(recursive, "run_json", run_json)
    monkeypatch.setattr(recursive, "machine", str)
    monkeypatch.setattr(sys, "argv", ["recursive.py", "--only", "trm-512"])
    recursive.main()
    programs = [program for program, _ in recursive.SIDES.values()]
    timed = [flags for flags in asked if "--products" not in flags]
    assert [flags[:-2] for flags in timed] == 2 * programs
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("| TRM, attention, 32 x 81, hidden 512 | s an update | limit, s |")
    found = {row[0]: row[1:] for line in lines[2:] for row in [line.strip("| ").split(" | ")]}
    assert list(found) == list(recursive.SIDES)
    assert found["torch"] == ["6.000", "2.000", "0.33", "1.00", "0.83", "1.25", "2.5000"]
    assert found["pyloss, bfloat16 products"] == [
        *("3.000", "0.500", "0.17", "2.00", "1.67", "1.25", "2.5000")
    ]


def test_an_update_of_a_recursive_model_changes_its_puzzles(monkeypatch):
    made = []
    model_of = recursive_work.model_of
    monkeypatch.setattr(
        recursive_work, "model_of", lambda *given: made.append(model_of(*given)) or made[-1]
    )
    sizes = {"hidden_size": 32, "num_heads": 2, "seq_len": 9, "batch_size": 4}
    config = recursive_work.config_of("trm-paper", **sizes, puzzle_emb_ndim=32, L_cycles=1)
    update = recursive_pyloss.update_of(*config)
    losses = [update() for _ in range(3)]
    assert np.isfinite(losses).all() and losses[2] != losses[0]
    assert np.all(made[0].puzzle_emb.weights != 0)


def test_products_of_every_precision_and_format_that_fits(capsys):
    """A format whose blocks are longer than the rows has no product."""
    matmul.main("pyloss", 0, "small")
    found = json.loads(capsys.readouterr().out)
    stored = {tuple(key.split(" ")[:3]) for key in found}
    assert ("256x256", "q4_k", "int8") in stored and ("128x256", "q4_k", "int8") not in stored
    assert {precision for *_, precision in stored} == set(matmul.STORED)
    assert all(speed > 0 for speed in found.values())
    peers = {key: 2 * speed for key, speed in found.items() if " int8 " not in key}
    rows = matmul.products_table(found, peers).splitlines()[2:]
    assert len(rows) == len(found)
    assert [row.endswith("|  |  |") for row in rows] == [" int8 " in key for key in found]
    assert all(row.endswith("| 0.50 |") for row in rows if "| f32 |" in row)
