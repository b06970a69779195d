"""How many pieces of work operations have for threads, at the shapes of Qwen3-0.6B."""

import numpy as np
import pytest

import pyloss
from pyloss import _core

N, D, INNER, HEADS, HEAD = 256, 1024, 3072, 8, 128
# four pieces for each of 64 threads: a thread that is late then costs a quarter of its share
WANTED = 256


def a(*shape):
    return np.ones(shape, np.float32)


POSITIONS = np.arange(N, dtype=np.int32)
LAYERS = {
    "rms_norm_forward": lambda: (a(N, D), a(D), 1e-5, ..., ...),
    "rms_norm_grad": lambda: (a(N, D), a(N, D), a(D), a(N), ..., None),
    "rope": lambda: (a(N, HEADS, HEAD), POSITIONS, a(N, HEAD // 2), a(N, HEAD // 2), 0, ...),
    "concat_columns": lambda: (a(N, D), a(N, D), None, ...),
    "short_conv_forward": lambda: (a(N, 3, D), a(D, 1, 3), None, OFFSETS, ...),
    "short_conv_grad": lambda: (a(N, D), a(N, 3, D), a(D, 1, 3), None, OFFSETS, ..., None, None),
    "conv_silu_forward": lambda: (a(N, D), a(D, 1, 4), None, OFFSETS, ...),
    "swiglu_forward": lambda: (a(N, INNER), a(N, INNER), ...),
    "swiglu_grad": lambda: (a(N, INNER), a(N, INNER), a(N, INNER), ..., ...),
    "geglu_forward": lambda: (a(N, INNER), a(N, INNER), ...),
    "add": lambda: (a(N, D), a(N, D), ...),
    "axpy": lambda: (1.0, a(N, D), a(N, D)),
    "scale": lambda: (2.0, a(N, D), ...),
    "dropout": lambda: (a(N, D), 1, 0.5, ...),
    "scale_columns": lambda: (a(N, D), a(D), ...),
    "embedding_forward": lambda: (POSITIONS, a(N, D), ...),
    "gather_rows": lambda: (a(N, D), POSITIONS, ...),
    "adamw": lambda: (a(N * D), *[0.5] * 8, a(N * D), a(N * D), a(N * D)),
    "adafactor_update": lambda: (a(N, D), a(N), a(D), 0.5, 0.5, ...),
    "adam_atan2": lambda: (a(N * D), *[0.5] * 6, a(N * D), a(N * D), a(N * D)),
}
RANK = 8
# the shapes of a layer's weights: key and value, query, gate and up, attention's output, down
WEIGHTS = [(D, D), (2 * D, D), (INNER, D), (D, 2 * D), (D, INNER)]
PRODUCTS = {
    "linear_forward": lambda o, i: (a(N, i), a(o, i), None, None, None, 0.0, None, ...),
    "lora_forward": lambda o, i: (
        (a(N, i), a(o, i), None, a(i, RANK), a(RANK, o), 1.0, None) + (..., ...)
    ),
    "linear_input_grad": lambda o, i: (a(N, o), a(o, i), None, None, 0, None, ...),
    "lora_input_grad": lambda o, i: (
        (a(N, o), a(o, i), a(i, RANK), a(RANK, o), 1.0, 0, None) + (..., ...)
    ),
}
# Heads whose values are read in place, so that the only pieces are those of the scores: whole
# vectors of every instruction set, and rows that are no multiple of 1 KB.
GROUP, WIDE = 2, 144
OFFSETS = np.array([0, N], np.int32)
SCORES = {
    "attention_forward": lambda: (
        (
            a(N, GROUP * HEADS, WIDE),
            a(N, HEADS, WIDE),
            a(N, HEADS, WIDE),
            OFFSETS,
            OFFSETS,
            1.0,
            0.0,
            0,
            0,
        )
        + (..., ...)
    )
}
CALLS = {
    **LAYERS,
    **SCORES,
    **{
        f"{name} {o} x {i}": lambda call=call, o=o, i=i: call(o, i)
        for name, call in PRODUCTS.items()
        for o, i in WEIGHTS
    },
}


def call(name):
    getattr(_core, name.split()[0])(*CALLS[name]())
    return _core.pieces()


@pytest.mark.parametrize("name", [*LAYERS, *SCORES])
def test_layers_meet_once(isa, name):
    assert call(name)[0] == 1


@pytest.mark.parametrize("name", CALLS)
def test_operations_over_256_tokens_have_four_pieces_for_each_of_64_threads(isa, name):
    assert call(name)[1] >= WANTED


@pytest.mark.parametrize("name", CALLS)
def test_pieces_do_not_depend_on_the_number_of_threads(name):
    found, before = [], _core.num_threads()
    for threads in (1, 2, 7):
        pyloss.set_num_threads(threads)
        found.append(call(name))
    pyloss.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_pieces_of_the_gradient_of_attention_grow_with_the_tokens():
    """Each has 32 rows at least: 16 heads of 512 tokens are 256 pieces."""
    n, q, k = 512, a(512, GROUP * HEADS, HEAD), a(512, HEADS, HEAD)
    _core.attention_grad(
        q, q, k, k, q, a(n, GROUP * HEADS), *(2 * [2 * OFFSETS]), 1.0, 0.0, 0, 0, ..., ..., ...
    )
    assert _core.pieces()[1] >= WANTED


@pytest.mark.parametrize("count", [1, 100, 8192])
def test_small_calls_are_one_piece(count):
    """Waking threads would take longer."""
    _core.add(a(count), a(count), ...)
    assert _core.pieces() == (0, 1)
