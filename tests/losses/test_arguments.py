"""Errors of the losses name the argument, its value and what is allowed; and `out=`."""

import ml_dtypes
import numpy as np
import pytest
from loss_cases import BCE, EVERY, MAPS, PLAIN

import pyloss

CLASS = ["softmax_cross_entropy", "focal_loss", "stablemax_cross_entropy"]
PAIR = ["kl_div_loss", "js_div_loss", "skew_kl_div_loss", "tvd_loss", "cosine_loss"]
LINEAR_PAIR = [
    "linear_kl_div",
    "linear_js_div",
    "linear_skew_kl_div",
    "linear_tvd",
    "linear_cosine",
]
X, LABELS = np.zeros((2, 3)), np.array([0, 1])


@pytest.fixture
def rng():
    return np.random.default_rng(41)


def call(name, *arguments, **options):
    return getattr(pyloss, name)(*arguments, **options)


def valid(loss, **options):
    """Call the loss with valid arguments and these `options`."""
    return loss(*loss.arguments(np.random.default_rng(0), (2, 3)), **options)


# Logits


@pytest.mark.parametrize("loss", [*PLAIN, BCE, *MAPS], ids=str)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros((2, 3), complex), TypeError, "must hold real numbers, not complex128"),
        (np.zeros((2, 3), object), TypeError, "must hold real numbers, not object"),
        (np.zeros((2, 3), "M8[s]"), TypeError, "must hold real numbers, not datetime64"),
        (np.zeros((2, 3), bool), TypeError, "must hold real numbers, not bool"),
        (np.zeros((2, 3), [("a", "f4")]), TypeError, "must hold real numbers"),
        ([["a", "b", "c"]] * 2, TypeError, "must hold real numbers, not <U1"),
        (np.float32(1), ValueError, r"must be \[..., V\] with V at least 1, got shape \(\)"),
        (np.zeros((2, 0)), ValueError, r"must be \[..., V\] with V at least 1, got shape \(2, 0\)"),
    ],
    ids=["complex", "object", "dates", "bool", "records", "text", "0-d", "no classes"],
)
def test_bad_logits(loss, bad, error, message):
    """Bad logits in each position are refused under the name of that argument."""
    if loss is BCE and np.shape(bad) == (2, 0):
        return  # no classes are fine here: see the next test
    arguments = loss.arguments(np.random.default_rng(0), (2, 3))
    names = ["logits_q", "logits_p"] if loss.logits == 2 else ["x"] if loss in MAPS else ["logits"]
    for i, name in enumerate(names):
        given = [bad if j == i else a for j, a in enumerate(arguments)]
        with pytest.raises(error, match=f"^{name} {message}"):
            loss(*given)


def test_an_elementwise_loss_of_no_elements():
    assert pyloss.binary_cross_entropy_with_logits(np.zeros((2, 0)), np.zeros((2, 0))).shape == (
        2,
        0,
    )


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (1, 3), (3,), (1, 2, 3)], ids=str)
def test_pairs_of_different_shapes(name, shape):
    """Nothing is broadcast."""
    with pytest.raises(
        ValueError, match="logits_q and logits_p must have the same shape, got"
    ) as error:
        call(name, X, np.zeros(shape))
    assert str(X.shape) in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 4), (3,), ()], ids=str)
def test_targets_of_another_shape(shape):
    with pytest.raises(ValueError, match="targets must"):
        pyloss.binary_cross_entropy_with_logits(X, np.zeros(shape))


# Labels


@pytest.mark.parametrize("name", [*CLASS, "linear_cross_entropy"])
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            [[0, 1], [7, 2]],
            ValueError,
            r"label 7 at position \(1, 0\) is outside \[0, 7\) and not ignore_index -100",
        ),
        ([[0, -1], [9, 2]], ValueError, r"label -1 at position \(0, 1\) is outside \[0, 7\)"),
        ([[0, 2**40], [9, 2]], ValueError, r"label 1099511627776 at position \(0, 1\)"),
        ([[0, 2**32], [9, 2]], ValueError, r"label 4294967296 at position \(0, 1\)"),
        (
            np.array([[0, 2**64 - 1], [9, 2]], np.uint64),
            ValueError,
            r"label 18446744073709551615 at position \(0, 1\)",
        ),
        ([0, 1], ValueError, r"labels have shape \(2,\), expected one per row of logits: \(2, 2\)"),
        ([[[0, 1], [2, 3]]], ValueError, r"labels have shape \(1, 2, 2\)"),
        ([[0.0, 1.0], [2.0, 3.0]], TypeError, "labels must be integers, not float64"),
        ([[True, False], [True, False]], TypeError, "labels must be integers, not bool"),
        ([["a", "b"], ["c", "d"]], TypeError, "labels must be integers, not <U1"),
        (np.zeros((2, 2), object), TypeError, "labels must be integers, not object"),
    ],
    ids=[
        "too large",
        "negative",
        "2^40",
        "2^32",
        "2^64",
        "shape",
        "rank",
        "float",
        "bool",
        "text",
        "object",
    ],
)
def test_bad_labels(name, labels, error, message):
    arguments = (
        (np.zeros((2, 2, 3), np.float32), np.zeros((7, 3), np.float32))
        if name.startswith("linear")
        else (np.zeros((2, 2, 7)),)
    )
    with pytest.raises(error, match=message):
        call(name, *arguments, labels)


@pytest.mark.parametrize("name", [*CLASS, "linear_cross_entropy"])
@pytest.mark.parametrize("bad", [None, 1.5, "none", True])
def test_ignore_index_is_an_integer(name, bad):
    arguments = (
        (np.zeros((2, 3), np.float32), np.zeros((7, 3), np.float32))
        if name.startswith("linear")
        else (np.zeros((2, 7)),)
    )
    with pytest.raises(
        TypeError,
        match=f"ignore_index is {bad!r}; it must be a whole number from -9223372036854775808 to 18446744",
    ):
        call(name, *arguments, [0, 1], ignore_index=bad)


# Options


UNIT = "of at least 0 and of at most 1"


@pytest.mark.parametrize(
    ("name", "option", "bad", "allowed"),
    [
        *(("softmax_cross_entropy", "label_smoothing", bad, UNIT) for bad in (-0.1, 1.1, np.nan, np.inf)),
        *(("softmax_cross_entropy", "z_loss", bad, "of at least 0") for bad in (-1e-9, np.nan, np.inf, 10**400)),
        *(("softmax_cross_entropy", "softcap", bad, "above 0") for bad in (0, -30.0, np.nan, np.inf)),
        *(("focal_loss", "gamma", bad, "of at least 0") for bad in (-1, np.nan, np.inf)),
        *((name, "temperature", bad, "above 0") for name in (*PAIR, *LINEAR_PAIR) if "cosine" not in name for bad in (0, -1.0, np.nan, np.inf, 10**400)),
        *((name, "beta", bad, UNIT) for name in ("js_div_loss", "linear_js_div") for bad in (-0.5, 2, np.nan)),
    ],
)  # fmt: skip
def test_options_out_of_range(name, option, bad, allowed):
    arguments = (X, LABELS) if name in CLASS else (X, X) if name in PAIR else (X, X, X, X)
    given = "an integer of 1329 bits" if bad == 10**400 else bad
    with pytest.raises(
        ValueError, match=f"^{option} is {given}; it must be a finite number {allowed}$"
    ):
        call(name, *arguments, **{option: bad})
    with pytest.raises(
        TypeError, match=f"^{option} is '0.5'; it must be a finite number {allowed}$"
    ):
        call(name, *arguments, **{option: "0.5"})


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (
            [0.5, 0.5],
            ValueError,
            r"alpha must be a number or one per class, \(3,\), got shape \(2,\)",
        ),
        (-0.5, ValueError, "alpha must be finite and not negative"),
        (np.nan, ValueError, "alpha must be finite and not negative"),
        ("a", TypeError, "alpha must be a number or one per class, not <U1"),
    ],
)
def test_bad_alpha(alpha, error, message):
    with pytest.raises(error, match=message):
        pyloss.focal_loss(X, LABELS, alpha=alpha)


@pytest.mark.parametrize("loss", [*PLAIN, BCE], ids=str)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, r"weights have shape \(1,\), expected one per"),
        ({"weights": 2.0}, ValueError, r"weights have shape \(\), expected one per"),
        (
            {"weights": np.zeros((2, 3, 1))},
            ValueError,
            r"weights have shape \(2, 3, 1\), expected one per",
        ),
        (
            {"weights": np.zeros((2, 3), complex)},
            TypeError,
            "weights must hold real numbers, not complex128",
        ),
        ({"weights": np.zeros(2, object)}, TypeError, "weights must hold real numbers, not object"),
        (
            {"reduction": "avg"},
            ValueError,
            "reduction must be one of 'none', 'sum', 'mean'.* not 'avg'",
        ),
        (
            {"reduction": None},
            ValueError,
            "reduction must be one of 'none', 'sum', 'mean'.* not None",
        ),
    ],
    ids=[
        "weights shape",
        "weights 0-d",
        "weights rank",
        "weights complex",
        "weights object",
        "reduction",
        "no reduction",
    ],
)
def test_bad_weights_and_reductions(loss, options, error, message):
    with pytest.raises(error, match=message):
        valid(loss, **options)


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_an_option_that_a_loss_does_not_have_is_refused(loss):
    """Options are never silently ignored."""
    for option in {"gamma", "alpha", "beta", "temperature", "label_smoothing", "class_weights"}:
        if option not in getattr(pyloss, loss.name).__kwdefaults__:
            with pytest.raises(TypeError, match=option):
                valid(loss, **{option: 0.5})


# out=


@pytest.mark.parametrize("kind", ["f64", "f32", "bf16"])
@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (loss, reduction)
        for loss in EVERY
        for reduction in ([None] if loss in MAPS else [None, "none", "sum", "mean"])
    ],
    ids=str,
)
def test_out(rng, loss, reduction, kind):
    """The result is written to `out`, also through strides, and `out` is returned."""
    dtype = {"f64": np.float64, "f32": np.float32, "bf16": ml_dtypes.bfloat16}[kind]
    arguments, options = (
        loss.arguments(rng, (2, 4, 5), dtype),
        {} if reduction is None else {"reduction": reduction},
    )
    want = np.asarray(loss(*arguments, **options))
    for spread in (1, 2):
        block = np.full((*want.shape, spread), 7.0).astype(want.dtype)
        out = block[..., 0] if want.ndim else block[:1].reshape(())
        assert loss(*arguments, **options, out=out) is out
        np.testing.assert_array_equal(out, want)
        assert (block[..., 1:].astype(np.float32) == 7).all()


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_out_that_is_wrong(loss):
    shape = loss.out_shape((2, 3))
    locked = np.zeros(shape)
    locked.flags.writeable = False
    for out, error, message in (
        (np.zeros((*shape, 1)), ValueError, r"out has shape \(.*1\), expected \("),
        (np.zeros((5, *shape[1:])), ValueError, r"out has shape \(5,.*, expected \(2,"),
        (np.zeros(shape, np.float32), ValueError, "out has dtype float32, expected float64"),
        (np.zeros(shape, int), ValueError, "out has dtype int64, expected float64"),
        (np.zeros(shape, ">f8"), ValueError, "out has dtype >f8, expected float64"),
        (locked, ValueError, "out is read-only"),
        ([0.0, 0.0], TypeError, "out must be a numpy.ndarray, not list"),
    ):
        with pytest.raises(error, match=message):
            valid(loss, out=out)
    if loss not in MAPS:
        with pytest.raises(ValueError, match=r"out has shape \(.*\), expected \(\)"):
            valid(loss, out=np.zeros(shape), reduction="sum")


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_out_while_a_gradient_is_recorded(rng, loss):
    arguments = loss.arguments(rng, (2, 3))
    with pytest.raises(ValueError, match="out cannot be used while a gradient is recorded"):
        loss.gradients(*arguments, out=np.zeros(loss.out_shape((2, 3))))


@pytest.mark.parametrize("loss", EVERY, ids=str)
def test_out_over_the_logits(rng, loss):
    """`out` over the logits gives the right result or an error."""
    arguments = loss.arguments(rng, (3, 9))
    want = loss(*arguments)
    for view in (
        lambda x: x if not loss.rows else x[:, 2],
        lambda x: x.reshape(-1)[: want.size].reshape(want.shape),
    ):
        given = [a.copy() for a in arguments]
        try:
            got = loss(*given, out=view(given[0]))
        except ValueError as error:
            assert "overlap" in str(error) or "memory" in str(error)
        else:
            np.testing.assert_array_equal(got, want)


def test_nothing_is_written_before_an_error(rng):
    out = np.full(2, 7.0)
    with pytest.raises(ValueError, match="label 9 at position 1"):
        pyloss.softmax_cross_entropy(X, [0, 9], out=out)
    assert (out == 7).all()


# Accuracy, and the losses with a head


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyloss.compute_accuracy(np.zeros(3), 0), ValueError, r"logits must be \[..., T, V\], got shape \(3,\)"),
        (lambda: pyloss.compute_accuracy(X, [0, 3]), ValueError, "label 3 at position 1"),
        (lambda: pyloss.compute_accuracy(X, [0.0, 1.0]), TypeError, "labels must be integers"),
        (lambda: pyloss.linear_cross_entropy(np.zeros((2, 3)), np.zeros((4, 5)), [0, 1]), ValueError, r"hidden has shape \(2, 3\).*5"),
        (lambda: pyloss.linear_cross_entropy(np.zeros((2, 3)), np.zeros(3), [0, 1]), ValueError, r"weight must be \[V, D\]"),
        (lambda: pyloss.linear_cross_entropy(np.zeros((2, 3), complex), np.zeros((4, 3)), [0, 1]), TypeError, "hidden must.*complex128"),
        (lambda: pyloss.linear_kl_div(X, np.zeros((4, 3)), X, np.zeros((5, 3))), ValueError, r"4.*5"),
        (lambda: pyloss.linear_kl_div(X, np.zeros((4, 3)), np.zeros((3, 3)), np.zeros((4, 3))), ValueError, r"\(2, 3\).*\(3, 3\)"),
        (lambda: pyloss.linear_js_div(X, np.zeros((4, 3)), X, np.zeros((4, 2))), ValueError, "hidden_p has shape.*weight_p"),
    ],
)  # fmt: skip
def test_other_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_all_losses_are_listed_here():
    """A new loss of the package must join these tests."""
    public = {
        name
        for name in pyloss.__all__
        if name.endswith(("entropy", "_loss", "_logits", "stablemax", "_div", "_tvd", "_cosine"))
    }
    apart = {"linear_cross_entropy", *LINEAR_PAIR, "sparse_distillation_loss"}
    assert public == {loss.name for loss in EVERY} | apart
