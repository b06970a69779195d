"""The parts of the benchmarks that compute: batches of conversations, and the work of an operation."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pyloss import _core

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import step_limits
import step_work


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
    assert [batch.lengths[:, 1].tolist() for batch in step_work.batches(options(chat, grouped=True), 49152)] == [[4, 5], [9]]


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
    assert work("matmul_tn", f(6, 3), f(6, 2), 1.0, 0, f(3, 2)) == 2 * 6 * 3 * 2
    offsets = np.array([0, 3, 5], np.int32)
    q, k = f(5, 4, 8), f(5, 2, 8)
    seen = 6 + 3
    assert work("attention_forward", q, k, k, offsets, offsets, 1.0, 0, q, f(5, 4)) == 2 * 2 * seen * 4 * 8
    assert work("attention_grad", q, q, k, k, q, f(5, 4), offsets, 1.0, 2, q, k, k) == 2 * 5 * (5 + 3) * 4 * 8
    assert work("add", x, x, x) == 0
