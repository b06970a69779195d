"""The row losses on a device against the processor's, edge cases included.

The processor's own tests compare its losses with float64 formulas.
"""

import ml_dtypes
import numpy as np
import pytest

import pyloss

pytestmark = pytest.mark.usefixtures("device")

BF16 = np.dtype(ml_dtypes.bfloat16)

CLASS_LOSSES = {
    "ce": pyloss.softmax_cross_entropy,
    "ce_options": lambda x, y, **k: pyloss.softmax_cross_entropy(
        x, y, label_smoothing=0.1, z_loss=1e-3, softcap=20.0, **k
    ),
    "ce_weighted": lambda x, y, **k: pyloss.softmax_cross_entropy(
        x, y, label_smoothing=0.2, class_weight=np.linspace(2, 0.5, x.shape[-1]), **k
    ),
    "ce_details": lambda x, y, **k: details(
        pyloss.softmax_cross_entropy(
            x, y, z_loss=0.1, return_lse=True, return_z_loss=True, return_token_accuracy=True, **k
        )
    ),
    "focal": pyloss.focal_loss,
    "stablemax_ce": pyloss.stablemax_cross_entropy,
}
PAIR_LOSSES = {
    "kl": lambda q, p, **k: pyloss.kl_div_loss(q, p, temperature=2.0, **k),
    "js": lambda q, p, **k: pyloss.js_div_loss(q, p, beta=0.3, temperature=2.0, **k),
    "js_forward": lambda q, p, **k: pyloss.js_div_loss(q, p, beta=0, **k),
    "js_reverse": lambda q, p, **k: pyloss.js_div_loss(q, p, beta=1, temperature=2.0, **k),
    "kl_capped": lambda q, p, **k: pyloss.kl_div_loss(
        q, p, softcap=(5.0, None), logit_scale=(1.5, 0.5), temperature=2.0, **k
    ),
    "js_capped": lambda q, p, **k: pyloss.js_div_loss(q, p, softcap=(None, 6.0), **k),
    "skew": lambda q, p, **k: pyloss.skew_kl_div_loss(q, p, temperature=2.0, **k),
    "skew_reverse": lambda q, p, **k: pyloss.skew_kl_div_loss(
        q, p, skew=0.7, direction="reverse", **k
    ),
    "cosine": lambda q, p, **k: pyloss.cosine_loss(q, p, softcap=(None, 5.0), **k),
    "bce": pyloss.binary_cross_entropy_with_logits,
}


def details(found):
    """One number per row of all that a cross entropy returns."""
    return found.loss + found.lse * found.lse + found.z_loss + found.token_accuracy


def both(function, *arrays):
    """Value and gradients on the host and on the device, all as NumPy arrays."""
    count = tuple(range(len(arrays)))
    host = pyloss.value_and_grad(function, count)(*arrays)
    device = pyloss.value_and_grad(function, count)(*(pyloss.to_device(a) for a in arrays))
    assert all(
        isinstance(g, pyloss.DeviceArray) and g.dtype == a.dtype for g, a in zip(device[1], arrays)
    )
    return host, (device[0], [g.numpy() for g in device[1]])


def assert_same(host, device, dtype, slack=1.0, least=1e-30):
    """Compare within a few units of the last place of each value and of the largest.

    The size of a gradient counts as at least `least`.
    """
    eps = {"float64": 2.2e-16, "float32": 1.2e-7, "float16": 9.8e-4, "bfloat16": 7.8e-3}[
        np.dtype(dtype).name
    ]
    # The values are sums that may cancel.
    for a, b, size in zip(
        [host[0], *host[1]], [device[0], *device[1]], [1.0] + [least] * len(host[1])
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        limit = slack * 40 * eps * (np.abs(a) + np.abs(a).max(initial=size))
        assert (np.abs(a - b) <= limit).all(), np.abs(a - b).max()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "f4") for name in CLASS_LOSSES),
        ("ce_options", "f8"),
        ("ce_weighted", "f8"),
        ("focal", "f2"),
        ("stablemax_ce", BF16),
    ],
    ids=str,
)
def test_class_losses(rng, name, dtype):
    for n, v in [(1, 1), (4, 2), (3, 31), (4, 33), (2, 4101)]:
        x, labels = (4 * rng.standard_normal((n, v))).astype(dtype), rng.integers(0, v, n)
        labels[0] = -100 if n > 1 else 0
        factors = rng.standard_normal(n).astype(np.float32)
        loss = CLASS_LOSSES[name]
        assert_same(
            *both(lambda x: (loss(x, labels) * factors).sum(), x),
            dtype,
            least=1 if v == 1 else 1e-30,
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "f4") for name in PAIR_LOSSES), ("js", "f8"), ("js", BF16)],
    ids=str,
)
def test_pair_and_element_losses(rng, name, dtype):
    for n, v in [(1, 1), (4, 2), (3, 33), (2, 4101)]:
        q, p = (4 * rng.standard_normal((2, n, v))).astype(dtype)
        if name == "bce":
            p = 1 / (1 + np.exp(-p))
        loss = PAIR_LOSSES[name]
        factors = rng.standard_normal((n, v) if name == "bce" else n).astype(np.float32)
        # Gradients that are small differences of terms up to 1.
        least = 0.1 if name in ("js_capped", "skew", "skew_reverse", "cosine") else 1e-30
        assert_same(*both(lambda q, p: (loss(q, p) * factors).sum(), q, p), dtype, least=least)


SPARSE_LOSSES = {
    "forward-kl": {},
    "reverse-kl": {"softcap": 6.0},
    "js": {"beta": 0.3, "temperature": 2.0, "rest": "renormalize"},
    "tvd": {"logit_scale": 0.5},
    "cross-entropy": {"shares": True},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "f4") for kind in SPARSE_LOSSES), ("js", "f8"), ("forward-kl", BF16)],
    ids=str,
)
def test_sparse_losses(rng, kind, dtype):
    """Entries in any order, some absent; rows with much and with little of the rest."""
    for n, v, k in [(4, 33, 5), (3, 4101, 64)]:
        x = (3 * rng.standard_normal((n, v))).astype(dtype)
        ids = np.argsort(rng.uniform(size=(n, v)), axis=-1)[:, :k]
        ids[1, 2:4] = -1
        x[0, ids[0]] += np.dtype(dtype).type(12)
        logprobs = np.log(rng.dirichlet(np.ones(k + 1), n)[:, :k])
        options = dict(SPARSE_LOSSES[kind])
        if options.pop("shares", False):
            options["shares"] = rng.uniform(0, 2 / k, (n, k))
        labels = np.where(np.arange(n) == 2, -100, 0)

        def loss(x, ids=ids, logprobs=logprobs, labels=labels, options=options):
            rows = pyloss.sparse_distillation_loss(
                x, ids, logprobs, kind=kind, labels=labels, **options
            )
            return rows.sum()

        assert_same(*both(loss, x), dtype, 4, least=1e-3)


@pytest.mark.parametrize("function", [pyloss.stablemax, pyloss.log_stablemax])
def test_row_maps(rng, function):
    for n, v in [(4, 2), (3, 33), (2, 4101)]:
        x, dy = (3 * rng.standard_normal((2, n, v))).astype(np.float32)
        assert np.allclose(function(pyloss.to_device(x)).numpy(), function(x), rtol=1e-5, atol=1e-6)
        assert_same(*both(lambda x: (function(x) * dy).sum(), x), "f4", 4)


def test_work_groups_that_share_a_row(rng, groups):
    """The shape of GPUs on any device; few shapes, since processors build these programs slowly."""
    for n, v in [(1, 1), (3, 33), (2, 4101)]:
        x, labels, factors = (
            (4 * rng.standard_normal((n, v))).astype(np.float32),
            rng.integers(0, v, n),
            rng.standard_normal(n),
        )
        loss = CLASS_LOSSES["ce_options"]
        assert_same(
            *both(lambda x: (loss(x, labels) * factors).sum(), x), "f4", 1e3 if v == 1 else 1
        )
        p = rng.standard_normal((n, v)).astype(np.float32)
        on = pyloss.to_device(p)
        # A row's log-sum-exp is float32, so every log probability is off by the last place of the
        # largest logit.
        places = max(1, np.abs(x).max())
        assert_same(
            *both(
                lambda q: (
                    pyloss.js_div_loss(q, p if isinstance(q.data, np.ndarray) else on) * factors
                ).sum(),
                x,
            ),
            "f4",
            places,
        )
        weighted = CLASS_LOSSES["ce_weighted"]
        assert_same(
            *both(lambda x: (weighted(x, labels) * factors).sum(), x),
            "f4",
            least=1 if v == 1 else 1e-30,
        )
        x[n - 1, v // 2] = np.nan
        assert (
            pyloss.compute_accuracy(pyloss.to_device(x), labels)[0]
            == pyloss.compute_accuracy(x, labels)[0]
        ).all()


def test_work_groups_that_share_a_row_of_a_student(rng, groups):
    for n, v, k in [(3, 33, 5), (2, 4101, 40)]:
        x, y = (2 * rng.standard_normal((2, n, v))).astype(np.float32)
        ids = np.argsort(rng.uniform(size=(n, v)), axis=-1)[:, :k]
        x[0, ids[0]] += 12  # little of the rest
        logprobs = np.log(rng.dirichlet(np.ones(k + 1), n)[:, :k])

        def sparse(x, ids=ids, logprobs=logprobs):
            return pyloss.sparse_distillation_loss(x, ids, logprobs, kind="js", softcap=15.0).sum()

        assert_same(*both(sparse, x), "f4", 4, least=1e-3)
        assert_same(*both(lambda x, y: pyloss.cosine_loss(x, y).sum(), x, y), "f4", least=0.1)


def test_arguments_of_two_types(rng):
    q, p = (4 * rng.standard_normal((2, 3, 50))).astype(np.float32)
    p = p.astype(np.float16)
    assert_same(*both(lambda q, p: pyloss.kl_div_loss(q, p, reduction="sum"), q, p), "f2")


def test_accuracy(rng):
    x = rng.integers(0, 50, (4, 6, 300)).astype(np.float32)  # many equal logits
    x[0, 0, 7] = x[0, 1, 200] = np.nan
    x[1, 2] = -np.inf
    labels = x.argmax(-1)
    labels[2, 3:] = -100
    labels[3, 0] += 1
    for got, want in zip(
        pyloss.compute_accuracy(pyloss.to_device(x), labels), pyloss.compute_accuracy(x, labels)
    ):
        assert (got == want).all() and (want[:3] == 1).all() and want[3] < 1


def test_results_stay_or_come_back(rng):
    x, labels = rng.standard_normal((2, 3, 20)).astype(np.float32), rng.integers(0, 20, (2, 3))
    on = pyloss.to_device(x)
    rows = pyloss.softmax_cross_entropy(on, labels)
    assert (
        isinstance(rows, pyloss.DeviceArray) and rows.shape == (2, 3) and rows.dtype == np.float32
    )
    want = pyloss.softmax_cross_entropy(x, labels)
    assert np.allclose(rows.numpy(), want, rtol=1e-6)
    for reduction in ("sum", "mean"):
        got = pyloss.softmax_cross_entropy(on, labels, reduction=reduction)
        assert isinstance(got, np.float32) and np.isclose(
            got, getattr(want, reduction)(), rtol=1e-6
        )
    out = pyloss.to_device(np.zeros((2, 3), np.float32))
    assert pyloss.softmax_cross_entropy(on, pyloss.to_device(labels), out=out) is out
    assert (out.numpy() == rows.numpy()).all()
    weights = np.array([[0, 1, 2], [0.5, 0, 3]])
    got = pyloss.softmax_cross_entropy(on, labels, weights=weights)
    assert isinstance(got, pyloss.DeviceArray) and np.allclose(
        got.numpy(), want * weights, rtol=1e-6
    )


def test_hard_rows(rng):
    v = 3000
    x = (50 * rng.standard_normal((8, v))).astype(np.float32)
    x[0] *= 200
    x[1, ::2], x[2, 1:], x[3] = -np.inf, -np.inf, -np.inf
    x[4, v - 1], x[5, 0] = np.nan, np.inf
    labels = np.array([1, 1, 0, 5, 5, 5, -100, 7])
    x[6] = np.nan
    loss = pyloss.softmax_cross_entropy
    host, device = both(lambda x: (loss(x, labels) * np.ones(8, np.float32)).sum(), x)
    rows, want = loss(pyloss.to_device(x), labels).numpy(), loss(x, labels)
    finite = np.array([0, 1, 2, 6, 7])
    assert np.allclose(rows[finite], want[finite], rtol=1e-6) and np.isnan(rows[[3, 4, 5]]).all()
    assert (
        np.allclose(device[1][0][finite], host[1][0][finite], atol=1e-6)
        and (device[1][0][6] == 0).all()
    )
    assert np.isnan(device[1][0][3:5]).all()


def test_masked_and_equal_pairs(rng):
    q, p = (20 * rng.standard_normal((2, 6, 700))).astype(np.float32)
    p[0, ::3] = -np.inf
    q[1, ::3] = p[1, ::3] = -np.inf
    p[2] = q[2]
    q[3, 5] = np.nan
    p[4, 5] = np.nan
    for loss in (pyloss.kl_div_loss, pyloss.js_div_loss):
        on, other = pyloss.to_device(q), pyloss.to_device(p)
        got, want = loss(on, other).numpy(), loss(q, p)
        assert np.isnan(got[3:5]).all() and got[2] < 1e-6
        assert np.allclose(got[[0, 1, 5]], want[[0, 1, 5]], rtol=1e-5)

        def gradient(q, p, loss=loss):
            return np.asarray(pyloss.value_and_grad(lambda q: loss(q, p).sum())(q)[1])

        got, want = gradient(on, other), gradient(q, p)
        assert np.isnan(got[3:5]).all() and np.allclose(
            got[[0, 1, 2, 5]], want[[0, 1, 2, 5]], atol=1e-6
        )


def test_long_rows_keep_their_digits(rng):
    x = (1e-3 * rng.standard_normal((2, 262_144))).astype(np.float32)
    labels = np.array([5, 262_143])
    got = pyloss.softmax_cross_entropy(pyloss.to_device(x), labels).numpy()
    exact = np.log(np.exp(x.astype(np.float64)).sum(1)) - x[[0, 1], labels]
    assert np.abs(got / exact - 1).max() < 4e-7


def test_the_same_bits_alone_and_again(rng):
    x, labels = rng.standard_normal((5, 5003)).astype(np.float32), rng.integers(0, 5003, 5)
    on = pyloss.to_device(x)
    rows = pyloss.softmax_cross_entropy(on, labels).numpy()
    assert (pyloss.softmax_cross_entropy(on, labels).numpy() == rows).all()
    for i in range(5):
        assert pyloss.softmax_cross_entropy(on[i : i + 1], labels[i : i + 1]).numpy()[0] == rows[i]


def test_no_rows(device):
    x = pyloss.to_device(np.zeros((0, 7), np.float32))
    assert pyloss.softmax_cross_entropy(x, np.zeros(0, np.int64)).numpy().shape == (0,)
    assert pyloss.softmax_cross_entropy(x, np.zeros(0, np.int64), reduction="mean") == 0


def test_gradients_add_up(rng):
    x = rng.standard_normal((3, 40)).astype(np.float32)
    labels = np.array([0, 1, 2])
    total = lambda x: (
        pyloss.softmax_cross_entropy(x, labels, reduction="sum")
        + pyloss.stablemax_cross_entropy(x, labels, reduction="sum")
    )
    assert_same(*both(total, x), "f4")
