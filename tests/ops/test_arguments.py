"""Arguments that operations cannot take are refused in a sentence that names them."""

import numpy as np
import pytest

from pyloss import ops

X, ROW, TABLE = np.ones((3, 4), np.float32), np.ones(4, np.float32), np.ones((5, 4), np.float32)
AT = np.array([0, 1, 2], np.int32)
COS = np.ones((8, 2), np.float32)
BOUNDS = np.array([0, 3], np.int32)
A, B = np.ones((5, 2), np.float32), np.ones((2, 4), np.float32)
# (call, error, its text)
REFUSED = [
    (lambda: ops.embedding(AT, ROW), ValueError, r"weight must be a matrix, got shape \(4,\)"),
    (lambda: ops.embedding(AT, [1.0, 2.0]), ValueError, "weight must be a matrix"),
    (lambda: ops.embedding(AT, "x"), TypeError, "weight"),
    (
        lambda: ops.adapted_embedding(AT, TABLE, A[:4], B, 1.0),
        ValueError,
        r"lora_a \(4, 2\) and lora_b \(2, 4\) do not fit",
    ),
    (lambda: ops.adapted_embedding(AT, TABLE, A, B[0], 1.0), ValueError, "lora_b must be a matrix"),
    (lambda: ops.adapted_embedding(AT, TABLE, A, B, "2"), TypeError, "scale"),
    (lambda: ops.adapted_embedding(AT, TABLE, A, B, 1.0, 1.5), ValueError, "dropout is 1.5"),
    (lambda: ops.rms_norm(X, ROW[:3]), ValueError, "does not fit rows of x"),
    (lambda: ops.rms_norm(np.float32(1), ROW), ValueError, "does not fit rows of x"),
    (lambda: ops.rms_norm(X, ROW, None), TypeError, "eps"),
    (lambda: ops.rms_norm(X, ROW, float("nan")), ValueError, "eps"),
    (lambda: ops.rope(X, AT, 2j, COS), TypeError, "cos must hold real numbers"),
    (lambda: ops.rope(ROW, AT, COS, COS), ValueError, "x must be a matrix"),
    (lambda: ops.rope(X, AT, COS[:, :0], COS), ValueError, "no whole number of heads of 0"),
    (
        lambda: ops.rope(np.ones((3, 6), np.float32), AT, COS, COS),
        ValueError,
        "no whole number of heads of 4",
    ),
    (lambda: ops.rope(X, AT, COS, COS, head_dim=2), ValueError, "head_dim is 2"),
    (
        lambda: ops.rope(X, AT, COS, COS, head_dim=5),
        ValueError,
        "no whole number of heads of 5",
    ),
    (lambda: ops.split_columns(ROW, AT, AT), ValueError, "x must be a matrix"),
    (lambda: ops.split_columns(X, AT), ValueError, "has no 1 parts"),
    (lambda: ops.split_columns(X, AT, AT, AT), ValueError, r"has no 3 parts of \[3, 3, 3\] col"),
    (lambda: ops.short_conv(ROW, TABLE, None, BOUNDS), ValueError, "x must be a matrix"),
    (
        lambda: ops.short_conv(X, TABLE, None, BOUNDS),
        ValueError,
        r"a weight of shape \(5, 4\) does not fit x of shape \(3, 4\)",
    ),
    (
        lambda: ops.conv_silu(X, TABLE[:, None, :3], None, BOUNDS),
        ValueError,
        "goes with as many columns",
    ),
    (lambda: ops.delta_rule(X, X, X, X, X, BOUNDS, 0, 1.0), ValueError, "key_dim is 0"),
    (lambda: ops.delta_rule(X, X, X, X, X, BOUNDS, 3, 1.0), ValueError, "q has 4 columns"),
    (lambda: ops.scale_heads(X, np.ones(3, np.float32)), ValueError, "x has 4 columns"),
    (lambda: ops.state_scan(X, X, X, X, X, BOUNDS, 0), ValueError, "state_dim is 0"),
    (lambda: ops.state_scan(X, X, X, X, X, BOUNDS, 3), ValueError, "c has 4 columns"),
    (lambda: ops.delta_rule(X, X, X, X, ROW, BOUNDS, 4, 1.0), ValueError, "beta must be a matrix"),
    (
        lambda: ops.delta_rule(X, X, X, X[:, :3], X, BOUNDS, 4, 1.0),
        ValueError,
        "v has 4 columns, which are not those of the 3 heads of g",
    ),
    (lambda: ops.attention(X, X, X, BOUNDS, 0, 1.0), ValueError, "head_dim is 0"),
    (lambda: ops.attention(X, X, X, BOUNDS, 3, 1.0), ValueError, "q has 4 columns"),
    (lambda: ops.attention(X, ROW, X, BOUNDS, 4, 1.0), ValueError, "k must be a matrix"),
    (lambda: ops.attention(X, X, X, BOUNDS, 2.5, 1.0), TypeError, "head_dim"),
    (lambda: ops.attention(X, X, X, BOUNDS, 4, 1.0, window=2**63), ValueError, "window"),
    (
        lambda: ops.swiglu(X, ROW),
        ValueError,
        r"gate and up must have one shape, got \(3, 4\) and \(4,\)",
    ),
    (lambda: ops.geglu(X, X[:2]), ValueError, "gate and up must have one shape"),
    (lambda: ops.add(X, ROW), ValueError, r"a and b must have one shape, got \(3, 4\) and \(4,\)"),
    (lambda: ops.scale(X, "x"), TypeError, "factor"),
    (lambda: ops.scale(X, 10**400), ValueError, "factor"),
    (lambda: ops.gather_rows(ROW, AT), ValueError, "x must be a matrix"),
    (lambda: ops.gather_rows(X, 1.5), TypeError, "rows"),
    (lambda: ops.transposed(ROW), ValueError, "x must be a matrix"),
    (lambda: ops.append(X, X, "0"), TypeError, "axis"),
    (lambda: ops.append(X, X, 2), ValueError, "axis is 2"),
    (lambda: ops.dropout(X, [0.5], 1), TypeError, "dropout is"),
    (lambda: ops.dropout(X, 0.5, 2**64), ValueError, "seed"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_sentence_names_the_argument(number):
    call, error, text = REFUSED[number]
    with pytest.raises(error, match=text):
        call()


def test_rows_without_columns_have_norms_all_the_same():
    assert ops.rms_norm(np.ones((3, 0), np.float32), np.ones(0, np.float32)).shape == (3, 0)


def test_a_list_of_rows_and_a_tail_of_another_type_are_taken():
    np.testing.assert_array_equal(
        ops.gather_rows(TABLE * np.arange(5, dtype=np.float32)[:, None], [3, 1])[:, 0], [3, 1]
    )
    longer = ops.append(X, np.zeros((2, 4)), 0)
    assert longer.dtype == np.float32 and longer.shape == (5, 4)
