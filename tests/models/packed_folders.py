"""Folders as AutoGPTQ, AutoAWQ and others write them, from random numbers, packed bit by bit."""

import json

import ml_dtypes
import numpy as np
import tiny
from safetensors.numpy import save_file

E4M3 = ml_dtypes.float8_e4m3fn
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def gptq_words(codes, bits):
    """codes [n, out] to uint32 [n * bits / 32, out]: each column is a stream, lowest bits first."""
    n, out = codes.shape
    stream = ((codes[:, None] >> np.arange(bits)[None, :, None]) & 1).reshape(
        n * bits // 32, 32, out
    )
    return (
        (stream.astype(np.uint64) << np.arange(32, dtype=np.uint64)[None, :, None])
        .sum(1)
        .astype(np.uint32)
    )


def less_one(words, zeros, bits):
    """GPTQ's first format of zeros, from words of the second."""
    ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}.get(bits)
    if ones is None:
        return gptq_words(((zeros - 1) % (1 << bits)).T, bits).T
    return words - np.uint32(ones)


def awq_words(codes):
    """codes [n, out] to uint32 [n, out / 8]: eight codes of a row in AWQ's order."""
    eights = codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].astype(np.uint64)
    return (eights << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype(np.uint32)


def random_layer(rng, out, cols, bits, groups, group_of, sym, scale_type):
    """Codes [cols, out], zeros and scales [groups, out], and the matrix [out, cols] of these."""
    codes = rng.integers(0, 1 << bits, (cols, out))
    zeros = rng.integers(0, 1 << bits, (groups, out))
    if sym:
        zeros[...] = 1 << (bits - 1)
    size = 3 / (1 << bits) / np.sqrt(cols)
    scales = (rng.uniform(0.5, 1.5, (groups, out)) * size).astype(scale_type)
    matrix = (codes - zeros[group_of]) * scales.astype(np.float64)[group_of]
    return codes, zeros, scales, np.ascontiguousarray(matrix.T, np.float32)


def write_packed(
    folder,
    method="gptq",
    bits=4,
    group_size=32,
    sym=False,
    order=None,
    g_idx=True,
    format=None,
    scale_type=np.float16,
    zero_biases=False,
    skip=("embed_tokens", "lm_head"),
    seed=0,
    change=None,
    settings=None,
    given=None,
    **options,
):
    """Write such a folder; return (config, arrays of the model that it stands for).

    `given` is the configuration and the arrays of a model that is not Llama's. With `order` the
    columns of a group lie apart, as desc_act leaves them.
    """
    c = given[0] if given else tiny.config(**{"tied": False, **options})
    rng = np.random.default_rng(seed)
    arrays, stored = dict(given[1]) if given else tiny.tensors(c, seed), {}
    if c["model_type"] == "phi3" and not given:
        tiny.fuse(arrays)
    shared = {}
    for name, array in list(arrays.items()):
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or array.ndim != 2 or any(part in name for part in skip):
            stored[name] = array.astype(np.float32)
            continue
        out, cols = array.shape
        size = cols if group_size == -1 else group_size
        groups = -(-cols // size)
        group_of = np.arange(cols) // size
        if order:  # q, k and v have one order, as in real files
            at, one = layer.rpartition(".")[::2]
            key = at if one in ("q_proj", "k_proj", "v_proj") else layer
            drawn = shared.setdefault(key, rng.permutation(cols))
            group_of = group_of[drawn]
        codes, zeros, scales, arrays[name] = random_layer(
            rng, out, cols, bits, groups, group_of, sym, scale_type
        )
        if method == "awq":
            stored[f"{layer}.qweight"], stored[f"{layer}.qzeros"] = map(awq_words, (codes, zeros))
        else:
            stored[f"{layer}.qweight"] = gptq_words(codes, bits)
            stored[f"{layer}.qzeros"] = gptq_words(zeros.T, bits).T
            if format != "gptq_v2":  # as gptqmodel: a zero of 0 borrows from the next one
                stored[f"{layer}.qzeros"] = less_one(stored[f"{layer}.qzeros"], zeros, bits)
            if g_idx:
                index = group_of if g_idx != "zeros" else 0 * group_of
                stored[f"{layer}.g_idx"] = index.astype(np.int32)
            if zero_biases and f"{layer}.bias" not in arrays:
                stored[f"{layer}.bias"] = np.zeros(out, np.float16)
        stored[f"{layer}.scales"] = scales
    for name, array in stored.items():
        if array.dtype == np.uint32:
            stored[name] = np.ascontiguousarray(array).view(np.int32)
    if change:
        change(stored)
    stored = {name: np.ascontiguousarray(array) for name, array in stored.items()}
    own = (
        {"version": "GEMM", "zero_point": True}
        if method == "awq"
        else {"sym": sym, "desc_act": bool(order)}
    )
    if format and method == "gptq":
        own["checkpoint_format"] = format
    c["quantization_config"] = {
        "quant_method": method, "bits": bits, "group_size": group_size, **own, **(settings or {})
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return c, arrays


def write_plain(folder, c, arrays):
    """The folder of floats that a packed folder stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in c.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    save_file(
        {name: a.astype(np.float32) for name, a in arrays.items()}, folder / "model.safetensors"
    )


def write_float8(
    folder,
    block=(16, 32),
    kind=E4M3,
    per="block",
    scale="weight_scale_inv",
    change=None,
    given=None,
    **options,
):
    """Write such a folder; return (config, float32 arrays of the model that it stands for)."""
    c = given[0] if given else tiny.config(**{"tied": False, "torch_dtype": "float32", **options})
    rng = np.random.default_rng(0)
    arrays, stored = dict(given[1]) if given else tiny.tensors(c), {}
    for name, array in list(arrays.items()):
        layer, _, part = name.rpartition(".")
        if part != "weight" or array.ndim != 2 or "embed" in name or "lm_head" in name:
            stored[name] = array
            continue
        rows, cols = array.shape
        down, across = {"block": block, "row": (1, cols), "tensor": (rows, cols)}[per]
        shape = (-(-rows // down), -(-cols // across))
        scales = rng.uniform(0.5, 1.5, shape).astype(np.float32) / 64
        whole = np.repeat(np.repeat(scales, down, 0), across, 1)[:rows, :cols]
        stored[name] = (array / whole).astype(kind)
        arrays[name] = stored[name].astype(np.float32) * whole
        stored[f"{layer}.{scale}"] = scales[0, 0].reshape(()) if per == "tensor" else scales
        if per == "tensor":
            stored[f"{layer}.activation_scale"] = np.array(0.5, np.float32)
    if change:
        change(stored)
    c["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static" if per == "tensor" else "dynamic",
        "weight_block_size": list(block) if per == "block" else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(
        {n: np.ascontiguousarray(a) for n, a in stored.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return c, arrays
