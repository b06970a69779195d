"""Public losses and operations: odd types, shapes and numbers; valid ones match a formula."""

import inspect

import loss_formulas
import ml_dtypes
import numpy as np

import pyloss
from pyloss import losses, ops

LOSSES = [
    name
    for name, f in sorted(vars(losses).items())
    if inspect.isfunction(f) and f.__module__.startswith("pyloss.losses.") and name[0] != "_"
]
OPERATIONS = [
    name
    for name, f in sorted(vars(ops).items())
    if inspect.isfunction(f)
    and f.__module__ in ("pyloss.ops.embedding", "pyloss.ops.layers")
    and name[0] != "_"
]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
LABELS = [np.int64, np.int32, np.uint8, np.int8, np.uint16, np.uint64, np.int16]
REAL = {"label_smoothing": (0.0, 0.1, 0.5), "z_loss": (0.0, 1e-2), "softcap": (None, 5.0), "gamma": (0.0, 0.5, 2.0), "beta": (0.0, 0.2, 0.5, 1.0), "skew": (0.0, 0.1, 0.9), "logit_scale": (0.5, 2.0), "direction": ("forward", "reverse"),
        "temperature": (0.5, 1.0, 2.0), "gradient_filter": (0.0, 1e-3), "eps": (1e-5,), "factor": (0.5, 2.0), "p": (0.0, 0.3), "scale": (0.5,)}  # fmt: skip


def prepare():
    pass


def _options(m, parameters, rng, shape, v):
    """Valid values for some of a loss's keyword arguments."""
    options = {}
    for name in parameters:
        if name in REAL and m.chance(0.3):
            options[name] = m.pick(REAL[name])
        elif name == "weights" and m.chance(0.3):
            options[name] = rng.uniform(0, 2, shape[:-1] if v else shape).astype(
                m.pick((np.float32, np.float64))
            )
        elif name == "labels" and m.chance(0.3):
            options[name] = np.where(
                rng.uniform(size=shape[:-1]) < 0.3, -100, rng.integers(0, v, shape[:-1])
            )
        elif name == "kind" and m.chance(0.7):
            options[name] = m.pick(
                ("forward-kl", "reverse-kl", "js", "skew-kl", "tvd", "cross-entropy")
            )
        elif name == "reduction" and m.chance(0.4):
            options[name] = m.pick(("none", "sum", "mean"))
        elif name == "ignore_index" and m.chance(0.3):
            options[name] = m.pick((-100, 0, -1))
        elif name == "alpha" and m.chance(0.3):
            options[name] = m.pick((0.25, rng.uniform(0.5, 1, v).astype(np.float32)))
        elif name == "logits_bytes" and m.chance(0.3):
            options[name] = m.pick((1, 1000, 10**6))
    return options


def _loss(m):
    name = m.pick(LOSSES)
    parameters = inspect.signature(getattr(losses, name)).parameters
    rng = np.random.default_rng(m.below(2**32))
    shape = (*m.pick(((), (1,), (3,), (2, 3), (0,), (2, 1, 2))), m.pick((1, 2, 3, 7, 16, 33)))
    if name == "compute_accuracy" and len(shape) < 2:
        shape = (2, *shape)
    v, hidden, dtype = shape[-1], m.pick((1, 4, 16)), m.pick(DTYPES)
    positional = []
    for parameter in parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY:
            break
        if parameter.name == "labels":
            kind = m.pick(LABELS)
            array = rng.integers(0, v, shape[:-1]).astype(kind)
        elif parameter.name.startswith("weight"):
            array = rng.standard_normal((v, hidden)).astype(np.float32)
        elif parameter.name.startswith("hidden"):
            array = rng.standard_normal((*shape[:-1], hidden)).astype(np.float32)
        elif parameter.name == "ids":
            array = np.argsort(rng.uniform(size=shape), -1)[..., : min(v, 3)].astype(
                m.pick((np.int32, np.int64))
            )
        elif parameter.name == "logprobs":
            array = np.log(rng.uniform(0.01, 0.3, (*shape[:-1], min(v, 3)))).astype(dtype)
        elif parameter.name == "targets":
            array = rng.uniform(0, 1, shape).astype(np.float32)
        else:
            array = (rng.standard_normal(shape) * m.pick((1, 3, 30))).astype(dtype)
        positional.append(array)
    names = [p.name for p in parameters.values() if p.kind == p.KEYWORD_ONLY]
    options = _options(m, names, rng, shape, 0 if name == "binary_cross_entropy_with_logits" else v)
    return "losses", name, positional, options


def _operation(m):
    name = m.pick(OPERATIONS)
    rng = np.random.default_rng(m.below(2**32))
    n, heads, d = m.pick((1, 2, 5)), m.pick((1, 2)), m.pick((2, 4, 8))
    positional = []
    for parameter in inspect.signature(getattr(ops, name)).parameters.values():
        if parameter.default is not parameter.empty and m.chance(0.5):
            break
        annotation = str(parameter.annotation)
        if parameter.name in REAL:
            value = m.pick(REAL[parameter.name])
        elif annotation in ("int", "float", "bool"):
            value = {"int": m.below(3), "float": 0.5, "bool": m.chance(0.5)}[annotation]
        elif parameter.name in ("ids", "rows", "positions"):
            value = rng.integers(0, 4, n).astype(np.int32)
        elif "offsets" in parameter.name:
            value = np.array([0, n], np.int32)
        elif parameter.name in ("cos", "sin"):
            value = rng.standard_normal((8, d // 2)).astype(np.float32)
        elif name in ("rope", "attention"):
            value = rng.standard_normal((n, heads, d)).astype(np.float32)
        elif parameter.name == "weight" and name == "rms_norm":
            value = rng.standard_normal(d).astype(np.float32)
        else:
            value = rng.standard_normal((max(n, 4), d)).astype(np.float32)
        positional.append(value)
    return "ops", name, positional, {}


def _other(m, value):
    kind = m.below(12)
    if kind < 3 or not isinstance(value, np.ndarray):
        return m.pick(
            (
                None,
                1,
                "x",
                "mean",
                [],
                [[1.0, 2.0]],
                m.whole(),
                m.real(),
                True,
                np.array(m.real()),
                2j,
                (),
                {},
                np.array("x"),
                np.array([None]),
                b"a",
            )
        )
    if kind == 3:
        return (
            value.astype(
                m.pick((np.float64, np.float16, np.int64, np.uint8, np.bool_, np.int32)), copy=True
            )
            if value.dtype.kind == "f"
            and np.isfinite(value.astype(np.float64)).all()
            and (abs(value.astype(np.float64)) < 100).all()
            else value
        )
    if kind == 4:
        return m.pick(
            (value[None], value.reshape(-1), value[..., None], value.T, value[:0], value[..., :1])
            if value.ndim
            else (value[None],)
        )
    if kind == 5 and value.size:
        changed = value.copy()
        number = (
            m.pick((np.nan, np.inf, -np.inf, 3e38, -1e4))
            if value.dtype.kind != "i" and value.dtype.kind != "u"
            else m.pick((127, 100, 40, 0))
        )
        with np.errstate(all="ignore"):
            changed.reshape(-1)[m.below(value.size)] = number
        return changed
    if kind == 6 and value.dtype.kind in "iu":
        return value.astype(m.pick((np.float32, np.bool_, object, np.int8)))
    if kind == 7:
        return (
            m.pick((value[::-1], np.asfortranarray(value), np.repeat(value, 2, -1)[..., ::2]))
            if value.ndim
            else value
        )
    if kind == 8:
        return value.tolist()
    if kind == 9:
        frozen = value.copy()
        frozen.flags.writeable = False
        return frozen
    if kind == 10 and value.dtype.kind in "fiu" and value.dtype.itemsize > 1:
        return value.astype(value.dtype.newbyteorder(">"))
    return np.concatenate([value, value]) if value.ndim else value


def make(m):
    module, name, positional, options = _loss(m) if m.pristine or m.chance(0.7) else _operation(m)
    changes = m.count() if m.chance(0.75) else 0
    for _ in range(changes):
        if options and m.chance(0.4):
            key = m.pick(list(options))
            options[key] = _other(m, options[key])
        elif m.chance(0.1):
            names = [
                p
                for p in inspect.signature(
                    getattr({"losses": losses, "ops": ops}[module], name)
                ).parameters
                if p not in options
            ]
            if names := names[len(positional) :]:
                options[m.pick(names)] = _other(m, None)
        else:
            at = m.below(len(positional))
            positional[at] = _other(m, positional[at])
    return module, name, positional, options, changes


def use(made, folder):
    module, name, positional, options, changes = made
    function = getattr({"losses": losses, "ops": ops}[module], name)
    with np.errstate(all="ignore"):
        given = function(*positional, **options)
        if changes or module == "ops" or not hasattr(loss_formulas, name):
            return
        reduction = options.pop("reduction", "none")
        want, gradients = loss_formulas.reduced(name, positional, options, reduction)
        logits = [
            i
            for i, p in enumerate(inspect.signature(function).parameters)
            if p.startswith("logits")
        ]
    _same(name, np.asarray(given), np.asarray(want), given.dtype)
    if logits and positional[0].size:
        got = pyloss.grad(
            lambda *x: function(
                *x, *positional[len(logits) :], **options, reduction=reduction
            ).sum(),
            tuple(range(len(logits))),
        )(*positional[: len(logits)])
        for one, wanted in zip(got, gradients):
            assert one.dtype == positional[0].dtype
            _same(f"{name}'s gradient", np.asarray(one), wanted, one.dtype)


def _same(what, got, want, dtype):
    assert got.shape == want.shape, f"{what} has shape {got.shape}, not {want.shape}"
    got, want = got.astype(np.float64), want.astype(np.float64)
    limit = 1e-4 if dtype.itemsize > 2 else 2e-2
    both = np.isfinite(want)
    assert (np.isfinite(got) == both).all(), f"{what} is {got} where the formula gives {want}"
    off = np.abs(got[both] - want[both]) - limit * (
        np.abs(want[both]) + np.abs(want[both]).max(initial=0) + 0.1
    )
    assert (off <= 0).all(), f"{what} is {got} where the formula gives {want}"
