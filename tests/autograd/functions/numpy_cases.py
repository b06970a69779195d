"""Functions of NumPy with arguments, for the tests of their gradients."""

import numpy as np

#: Shapes of one array: of no, of one and of several elements along axes.
SHAPES = [(3, 4), (2, 3, 5), (1, 4), (4,), (0, 4), ()]

POSITIVE = "positive"
UNIT = "unit"
ABOVE_ONE = "above one"


def drawn(rng, shape, domain=None):
    """Values inside of the domain of a function, away from its kinks."""
    if domain == POSITIVE:
        return rng.uniform(0.3, 2, shape)
    if domain == UNIT:
        return rng.uniform(-0.9, 0.9, shape)
    if domain == ABOVE_ONE:
        return rng.uniform(1.2, 3, shape)
    x = rng.standard_normal(shape)
    return x + 0.05 * np.sign(x)


UNARY = {
    np.negative: None, np.positive: None, np.conjugate: None, np.absolute: None, np.fabs: None,
    np.square: None, np.reciprocal: POSITIVE, np.sqrt: POSITIVE, np.cbrt: POSITIVE, np.exp: None,
    np.exp2: None, np.expm1: None, np.log: POSITIVE, np.log2: POSITIVE, np.log10: POSITIVE,
    np.log1p: POSITIVE, np.sin: None, np.cos: None, np.tan: UNIT, np.arcsin: UNIT,
    np.arccos: UNIT, np.arctan: None, np.sinh: None, np.cosh: None, np.tanh: None,
    np.arcsinh: None, np.arccosh: ABOVE_ONE, np.arctanh: UNIT, np.deg2rad: None,
    np.radians: None, np.rad2deg: None, np.degrees: None,
}  # fmt: skip

BINARY = {
    np.add: None, np.subtract: None, np.multiply: None, np.divide: POSITIVE, np.power: POSITIVE,
    np.float_power: POSITIVE, np.remainder: POSITIVE, np.fmod: POSITIVE, np.hypot: None,
    np.arctan2: None, np.logaddexp: None, np.logaddexp2: None, np.maximum: None,
    np.minimum: None, np.fmax: None, np.fmin: None,
}  # fmt: skip

#: Functions of one array [2, 3, 5].
ONE_ARRAY = {
    "sum": lambda x: np.sum(x),
    "sum axis": lambda x: np.sum(x, 1),
    "sum axes, kept": lambda x: np.sum(x, axis=(0, -1), keepdims=True),
    "mean": lambda x: np.mean(x, axis=-1),
    "average": lambda x: np.average(x, 0, np.array([0.25, 0.75])[:, None, None] * np.ones((2, 3, 5))),
    "average of rows": lambda x: np.average(x, 1, np.array([1.0, 2.0, 5.0])),
    "average of axes": lambda x: np.average(
        x, (2, 0), np.arange(1.0, 11).reshape(5, 2), keepdims=True
    ),
    "var": lambda x: np.var(x, axis=1, ddof=1),
    "std": lambda x: np.std(x, axis=(0, 2), keepdims=True),
    "prod": lambda x: np.prod(x, axis=1),
    "max": lambda x: np.max(x, axis=2),
    "min of all": lambda x: np.min(x),
    "amax kept": lambda x: np.amax(x, axis=0, keepdims=True),
    "ptp": lambda x: np.ptp(x, axis=1),
    "cumsum": lambda x: np.cumsum(x, axis=1),
    "cumsum of all": lambda x: np.cumsum(x),
    "diff": lambda x: np.diff(x, 2, axis=-1),
    "norm": lambda x: np.linalg.norm(x),
    "norm of rows": lambda x: np.linalg.norm(x, axis=-1, keepdims=True),
    "norm 1": lambda x: np.linalg.norm(x, 1, axis=0),
    "norm 3": lambda x: np.linalg.norm(x, 3, axis=0),
    "norm inf": lambda x: np.linalg.norm(x, np.inf, axis=0),
    "norm of matrices": lambda x: np.linalg.norm(x, axis=(0, 1)),
    "reshape": lambda x: np.reshape(x, (5, -1)),
    "ravel": lambda x: np.ravel(x),
    "transpose": lambda x: np.transpose(x),
    "transpose axes": lambda x: np.transpose(x, (1, 2, 0)),
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: np.swapaxes(x, 0, -1),
    "moveaxis": lambda x: np.moveaxis(x, 0, 2),
    "matrix_transpose": lambda x: np.matrix_transpose(x),
    "expand_dims": lambda x: np.expand_dims(x, (0, 2)),
    "squeeze": lambda x: np.squeeze(np.expand_dims(x, 1)),
    "atleast_3d": lambda x: np.atleast_3d(x[0]),
    "broadcast_to": lambda x: np.broadcast_to(x[:, :1], (4, 2, 3, 5)),
    "pad": lambda x: np.pad(x, ((0, 1), (2, 0), (1, 1)), constant_values=3),
    "pad edge": lambda x: np.pad(x, 1, mode="edge"),
    "pad reflect": lambda x: np.pad(x, ((0, 0), (1, 2), (2, 1)), mode="reflect"),
    "pad wrap": lambda x: np.pad(x, 2, mode="wrap"),
    "roll": lambda x: np.roll(x, 2, axis=1),
    "roll of all": lambda x: np.roll(x, -3),
    "roll axes": lambda x: np.roll(x, (1, 2), (0, 2)),
    "flip": lambda x: np.flip(x, 1),
    "flipud": lambda x: np.flipud(x),
    "fliplr": lambda x: np.fliplr(x),
    "rot90": lambda x: np.rot90(x, 3, (0, 2)),
    "tile": lambda x: np.tile(x, (2, 1, 3)),
    "repeat": lambda x: np.repeat(x, [1, 0, 3], axis=1),
    "repeat all": lambda x: np.repeat(x, 2),
    "diagonal": lambda x: np.diagonal(x, 1, 1, 2),
    "trace": lambda x: np.trace(x, axis1=1, axis2=2),
    "diag of a matrix": lambda x: np.diag(x[0]),
    "diag of a vector": lambda x: np.diag(x[0, 0], 1),
    "tril": lambda x: np.tril(x, -1),
    "triu": lambda x: np.triu(x),
    "take": lambda x: np.take(x, [2, 0, 2], axis=1),
    "take of all": lambda x: np.take(x, [[0, 7], [7, 29]]),
    "take clipped": lambda x: np.take(x, [0, 9, 1], axis=2, mode="clip"),
    "take_along_axis": lambda x: np.take_along_axis(x, np.array([[[1], [1], [4]]]), axis=2),
    "sort": lambda x: np.sort(x, axis=1),
    "compress": lambda x: np.compress([True, False, True], x, axis=1),
    "delete": lambda x: np.delete(x, 1, axis=2),
    "clip": lambda x: np.clip(x, -0.5, 0.7),
    "clip below": lambda x: x.clip(min=0.1),
    "nan_to_num": lambda x: np.nan_to_num(x),
    "where": lambda x: np.where(np.arange(5) > 2, x, 0),
    "where second": lambda x: np.where(np.arange(5) > 2, 1.5, x[:, :1]),
    "where both": lambda x: np.where(x > 0, x, 2 * x),
    "split": lambda x: sum((i + 1) * np.sum(p * p) for i, p in enumerate(np.split(x, [1, 3], 2))),
    "array_split": lambda x: np.array_split(x, 2, axis=1)[0] * 2,
    "hsplit": lambda x: np.hsplit(x, 3)[1],
    "einsum sum": lambda x: np.einsum("abc->b", x),
    "einsum order": lambda x: np.einsum("...ab->...ba", x),
    "getitem": lambda x: x[1],
    "getitem slices": lambda x: x[:, ::-2, 1:4],
    "getitem ellipsis": lambda x: x[..., :2],
    "getitem new axis": lambda x: x[:, None, ..., 1],
    "getitem array": lambda x: x[:, [0, 2, 0]],
    "getitem arrays": lambda x: x[[0, 1, 1], [2, 0, 0]],
    "getitem mask": lambda x: x[np.arange(30).reshape(2, 3, 5) % 4 == 1],
    "getitem mask of rows": lambda x: x[np.array([True, False])],
    "iteration": lambda x: sum((i + 1) * row for i, row in enumerate(x)),
    "copy": lambda x: np.copy(x),
    "astype": lambda x: x.astype(np.float64),
    "flatten": lambda x: x.flatten(),
    "method chain": lambda x: x.swapaxes(0, 1).reshape(3, -1).max(axis=1),
    "remainder": lambda x: x % 0.75,
    "floor division is flat": lambda x: x * (x // 1),
    "argmax is constant": lambda x: x * np.argmax(x),
}  # fmt: skip

#: Functions of two arrays, with their shapes.
TWO_ARRAYS = {
    "matmul": (lambda a, b: a @ b, (3, 4), (4, 5)),
    "matmul batched": (lambda a, b: np.matmul(a, b), (2, 3, 4), (2, 4, 5)),
    "matmul broadcast": (lambda a, b: a @ b, (2, 1, 3, 4), (3, 4, 2)),
    "matmul vector": (lambda a, b: a @ b, (3, 4), (4,)),
    "vector matmul": (lambda a, b: a @ b, (4,), (2, 4, 3)),
    "matmul vectors": (lambda a, b: a @ b, (4,), (4,)),
    "matmul of nothing": (lambda a, b: a @ b, (3, 0), (0, 2)),
    "dot": (lambda a, b: np.dot(a, b), (2, 3, 4), (5, 4, 2)),
    "dot with a number": (lambda a, b: np.dot(a, b), (), (3, 2)),
    "vdot": (lambda a, b: np.vdot(a, b), (2, 3), (2, 3)),
    "inner": (lambda a, b: np.inner(a, b), (2, 4), (3, 4)),
    "outer": (lambda a, b: np.outer(a, b), (3,), (2, 2)),
    "kron": (lambda a, b: np.kron(a, b), (2, 3), (3, 2)),
    "tensordot": (lambda a, b: np.tensordot(a, b, 2), (2, 3, 4), (3, 4, 5)),
    "tensordot axes": (lambda a, b: np.tensordot(a, b, ([0, 2], [1, 0])), (2, 3, 4), (4, 2, 5)),
    "einsum": (lambda a, b: np.einsum("bij,bkj->bik", a, b), (2, 3, 4), (2, 5, 4)),
    "einsum implicit": (lambda a, b: np.einsum("ij,jk", a, b), (3, 4), (4, 2)),
    "einsum ellipsis": (lambda a, b: np.einsum("...ij,...j->...i", a, b), (2, 3, 4), (4,)),
    "einsum summed alone": (lambda a, b: np.einsum("ij,k->k", a, b), (2, 3), (4,)),
    "einsum outer": (lambda a, b: np.einsum("i,j->ji", a, b), (2,), (3,)),
    "concatenate": (lambda a, b: np.concatenate([a, b, a], 1), (2, 3), (2, 4)),
    "concatenate flat": (lambda a, b: np.concatenate([a, b], None), (2, 3), (4,)),
    "stack": (lambda a, b: np.stack([a, b], axis=-1), (2, 3), (2, 3)),
    "vstack": (lambda a, b: np.vstack([a, b]), (3,), (2, 3)),
    "hstack": (lambda a, b: np.hstack([a, b]), (2, 3), (2, 1)),
    "dstack": (lambda a, b: np.dstack([a, b]), (2, 3), (2, 3)),
    "column_stack": (lambda a, b: np.column_stack([a, b]), (3,), (3, 2)),
    "broadcast_arrays": (lambda a, b: sum(np.broadcast_arrays(a, b)), (3, 1), (2,)),
    "where of two": (lambda a, b: np.where(np.eye(3, dtype=bool), a, b), (3, 1), (3,)),
    "average with weights": (lambda a, b: np.average(a, 0, np.exp(b)), (3, 2), (3, 2)),
    "clip between": (lambda a, b: np.clip(a, b - 1, b + 1), (3, 2), (3, 2)),
}
