"""Arguments of every operation of the core, made from its specifications, between guarded bytes."""

import re

import numpy as np
from kernel_checks import Memory
from running import bad_text
from stored_weights import stored

from pyloss import _core
from pyloss.weights.weight import FORMATS

TYPES = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "u8": np.uint8}
TYPES |= {"act": np.float32, "half": np.float32}
ROWS = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}
SIZES = (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33)
_PARAM = re.compile(r"\+?(=?~?)(\w+)(\??):(\w+)(?:\[([^\]]*)\])?(?:<(\w)(~?))?(?:\^(\w)(~?))?$")
_OPS = []
_SPEC = re.compile(r'\([^()]*\w:\w+[^()]*\)|in "[^"]*"')


class Param:
    """One argument of a specification."""

    def __init__(self, text, output):
        (
            in_place,
            self.name,
            optional,
            self.type,
            dims,
            self.below,
            ignored,
            self.offsets,
            before,
        ) = _PARAM.match(text).groups()
        self.output, self.in_place, self.optional = output, bool(in_place), bool(optional)
        self.dims = dims.split(",") if dims else []
        self.ignored, self.before = bool(ignored), bool(before)


def parse(spec):
    """The arguments of a specification, and its pairs H%G and 2R<=D."""
    params, multiples, output = [], [], False
    for part in spec.split():
        if part == ">":
            output = True
        elif re.fullmatch(r"\w%\w|2\w<=\w", part):
            multiples.append(part)
        else:
            params.append(Param(part, output))
    return params, multiples


def prepare():
    if not _OPS:
        _OPS.extend((name, *parse(spec)) for name, spec in _core.ops())


def check_text(error):
    """Check an error's text; the core may quote specifications to its own callers."""

    class Said(type(error)):
        def __str__(self):
            return _SPEC.sub("", str(error))

    try:
        return bad_text(Said(*error.args))
    except TypeError:
        return bad_text(error)


def _sizes(m, params, multiples, format):
    """A size for each letter."""
    letters = sorted({c for p in params for d in p.dims for c in re.findall(r"[A-Z]", d)})
    size = {letter: m.pick(SIZES if m.chance(0.5) else SIZES[1:7]) for letter in letters}
    if format and "I" in size:
        size["I"] = FORMATS[format].elements * m.pick((1, 2))
    if format and "D" in size and any(p.type == "weight" and p.dims == ["V", "D"] for p in params):
        size["D"] = FORMATS[format].elements
    for p in params:
        for dim in p.dims:
            if dim.endswith("/2"):
                size[dim[0]] += size[dim[0]] % 2
        if p.type == "stack":
            size[p.dims[0]] = max(size[p.dims[0]], 1)
        if p.below:
            size[p.below] = max(size[p.below], 1)
        if p.offsets:
            own = p.dims[0]
            if not own.endswith("+1"):
                size[own] = max(size[own], 2)
            elif size[p.offsets]:
                size[own[0]] = max(size[own[0]], 1)
    for pair in multiples:
        if pair[0] == "2":
            size[pair[-1]] = max(size[pair[-1]], 2 * size[pair[1]])
            continue
        size[pair[0]] = size[pair[2]] * m.pick((1, 2, 3))
    return size


def _shape(m, p, size, split=True):
    shape = []
    for dim in p.dims:
        if dim[0].isdigit():
            shape.append(int(dim))
            continue
        n = sum(size[letter] for letter in re.findall(r"[A-Z]", dim))
        n = n + 1 if dim.endswith("+1") else n // 2 if dim.endswith("/2") else n
        if dim[0] == "*" and split and n % 2 == 0 and m.chance(0.3):
            shape += [2, n // 2]
        else:
            shape.append(n)
    return tuple(shape)


def _argument(m, p, size, rng, memory, rows, wide, format):
    shape = _shape(m, p, size)
    if p.optional and m.chance(0.4):
        return None
    if p.type == "int":
        return m.pick((0, 1, 2, 5)) if m.chance(0.7) else m.pick((-1, 2**31, 2**63 - 1, -(2**63)))
    if p.type == "real":
        return m.pick((0.0, 0.5, 1.0, 2.0)) if m.pristine or m.chance(0.8) else m.real()
    if p.type == "weight":
        values = _shape(m, p, size, split=False)
        if format is None:
            return memory.put(rng.standard_normal(values))
        head = m.pick((0, 0, 2, 4))
        return stored(
            rng,
            *values,
            format,
            head if head and values[0] % head == 0 and format not in ("nf4",) else 0,
        ).handle
    if p.type == "stack":
        count, *values = _shape(m, p, size, split=False)
        if format is None or not count:
            return memory.put(rng.standard_normal((count, *values)))
        return tuple(stored(rng, *values, format).handle for _ in range(count))
    if p.type == "float":
        dtype = rows.setdefault(
            p.name.removeprefix("d"), ROWS[m.pick(list(ROWS)) if m.chance(0.5) else "f32"]
        )
        values = rng.standard_normal(shape) * 3
        return memory.put(_as_bf16(values) if dtype == np.uint16 else values, dtype)
    if p.type in ("act", "half") and rows.setdefault("acts", m.chance(0.5)) and m.chance(0.8):
        return memory.put(_as_bf16(rng.standard_normal(shape)), np.uint16)
    if p.type == "acc":
        return memory.put(rng.standard_normal(shape), np.float64 if wide() else np.float32)
    dtype = TYPES[p.type]
    if p.below:
        return memory.put(rng.integers(-1 if p.ignored else 0, size[p.below], shape), dtype)
    if p.offsets:
        inner = np.sort(rng.integers(0, size[p.offsets] + 1, shape))
        if len(inner):
            inner[0], inner[-1] = 0, size[p.offsets]
        return memory.put(inner, dtype)
    if dtype == np.float32 and m.chance(0.05):
        values = rng.choice([0, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-40], shape)
    else:
        values = (
            rng.standard_normal(shape)
            if dtype in (np.float32, np.float64)
            else rng.integers(0, 3, shape)
        )
    return memory.put(values, dtype)


def _as_bf16(values):
    """The upper halves of float32 numbers."""
    return values.astype(np.float32).view(np.uint32) >> 16


def _other(m, value, arguments, memory):
    """Another object in place of an argument."""
    kind = m.below(14)
    if isinstance(value, tuple) and m.chance(0.85):
        return _handle(m, value)
    if kind == 0 or (not isinstance(value, np.ndarray) and kind < 9):
        return m.pick(
            (
                None,
                1,
                "x",
                1.5,
                [1.0],
                (),
                (1, 2),
                b"abc",
                True,
                2j,
                object,
                m.whole(),
                m.real(),
                np.int64(1),
                np.float32(2),
                np.array(1.0),
                {},
            )
        )
    if kind < 3:
        return m.pick((m.whole(), m.real(), str(m.whole()), None))
    if not isinstance(value, np.ndarray):
        return m.whole()
    if kind == 3 and not value.dtype.hasobject:
        return value.astype(
            m.pick(
                (
                    np.float64,
                    np.float32,
                    np.float16,
                    np.int32,
                    np.int64,
                    np.uint8,
                    np.uint16,
                    np.bool_,
                    object,
                    np.complex64,
                )
            )
        )
    if kind == 4 and value.ndim:
        axis = m.below(value.ndim)
        return (
            np.ascontiguousarray(np.delete(value, 0, axis))
            if value.shape[axis] and m.chance(0.5)
            else np.concatenate([value] * 2, axis)
        )
    if kind == 5:
        return m.pick(
            (
                value[None],
                value.reshape(-1),
                value[..., None],
                value.T,
                value.reshape(-1)[:1],
                value.reshape(-1)[:0],
            )
        )
    if kind == 6 and value.ndim:
        return np.repeat(value, 2, -1)[..., ::2] if m.chance(0.5) else value[::-1]
    if kind == 7:
        return value.astype(value.dtype.newbyteorder(">"))
    if kind == 8:
        frozen = value.copy()
        frozen.flags.writeable = False
        return frozen
    if kind == 9:
        raw = np.zeros(value.nbytes + 1, np.uint8)[1:].view(np.uint8)
        return (
            np.frombuffer(memoryview(raw), value.dtype, value.size).reshape(value.shape)
            if value.size and value.dtype != object
            else value
        )
    if kind == 10 and value.dtype.kind == "i" and value.size:
        changed = value.copy()
        changed.flat[m.below(value.size)] = m.pick((-1, -2, 2**31 - 1, -(2**31), value.size, 10**6))
        return changed
    if kind == 11:
        return m.pick([a for a in arguments if isinstance(a, np.ndarray)] or [None])
    if kind == 12 and value.size:
        # Overlaps another argument's memory, one element further.
        others = [
            a
            for a in arguments
            if isinstance(a, np.ndarray) and a.dtype == value.dtype and a.size > value.size
        ]
        if others:
            flat = m.pick(others).reshape(-1)
            return flat[1 : 1 + value.size].reshape(value.shape)
    return value[..., : m.below(4)] if value.ndim else value


def _handle(m, handle):
    """A weight's tuple with one part changed, at any depth."""
    if not handle:
        return (m.whole(),)
    at = m.below(len(handle))
    part = handle[at]
    if isinstance(part, tuple) and m.chance(0.8):
        part = _handle(m, part)
    elif isinstance(part, np.ndarray):
        part = m.pick(
            (
                part[: m.below(len(part) + 1)],
                part[:0],
                part.astype(np.int32),
                part[::2],
                None,
                5,
                part[1:],
            )
        )
    else:
        part = m.pick((m.whole(), m.real(), None, "x", part, 2**40, 2**32, -1, 0))
    changed = (*handle[:at], part, *handle[at + 1 :])
    return m.pick((handle[:-1], (*handle, 1))) if m.chance(0.05) else changed


def make(m):
    name, params, multiples = m.pick(_OPS)
    rng, memory, rows = np.random.default_rng(m.below(2**32)), Memory(), {}
    stacked = any(p.type in ("weight", "stack") for p in params)
    format = m.pick(sorted(FORMATS)) if stacked and m.chance(0.7) else None
    size = _sizes(m, params, multiples, format)

    def wide():
        return np.float64 in rows.values()

    # Inputs first: their types determine the type of accumulators.
    made = {}
    added = {letter for p in params for dim in p.dims for letter in re.findall(r"\+([A-Z])", dim)}
    for p in sorted(params, key=lambda p: p.type == "acc"):
        made[p] = _argument(m, p, size, rng, memory, rows, wide, format)
        if made[p] is None and p.dims and p.dims[-1] in added:
            size[p.dims[-1]] = 0  # an absent argument adds nothing to a sum of dimensions
    arguments = [made[p] for p in params]
    for p, number in zip(params, range(len(params))):
        if p.in_place and m.chance(0.2):  # in place of an input
            like = [
                a
                for a in arguments[:number]
                if isinstance(a, np.ndarray)
                and isinstance(arguments[number], np.ndarray)
                and a.shape == arguments[number].shape
                and a.dtype == arguments[number].dtype
            ]
            if like and not any(
                other.in_place and arguments[i] is like[0] for i, other in enumerate(params)
            ):
                arguments[number] = like[0]
    for _ in range(m.count() if m.chance(0.8) else 0):
        at = m.below(len(arguments))
        arguments[at] = _other(m, arguments[at], arguments, memory)
        if m.chance(0.02):
            arguments = m.pick((arguments[:-1], [*arguments, 1], []))
            break
    return name, arguments, memory


def use(made, folder):
    name, arguments, memory = made
    with np.errstate(all="ignore"):
        try:
            getattr(_core, name)(*arguments)
        finally:
            memory.check()
