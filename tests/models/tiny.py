"""A random Llama small enough for NumPy: written as a folder or GGUF file, computed in float64."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from stored_weights import stored as random_weight

from pyloss.models.config.families import FAMILIES

#: Families without experts, which need no sizes of their own.
DENSE = [name for name, family in FAMILIES.items() if family.experts is None]

SIZES = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "max_position_embeddings": 512,
}
TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def config(tied=True, bias=False, **changes):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "mlp_bias": bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SIZES,
        **changes,
    }


# Options of `config` for families whose layers differ from Llama's.
FAMILIES = {
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "granite": {"model_type": "granite", "attention_multiplier": 0.3, "residual_multiplier": 0.22},
    "granite 4": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": SIZES["intermediate_size"],
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "nope",
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
    },
    # yarn with a factor of 1 leaves positions as they are.
    "ministral3": {
        "model_type": "ministral3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 1.0,
            "original_max_position_embeddings": 3,
            "llama_4_scaling_beta": 0.7,
        },
    },
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 5},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        },
    },
}
OLMO = ("olmo2", "olmo3")


def norms(c):
    """The names of a layer's norms of hidden states."""
    both = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
    return both[1:] if c["model_type"] in OLMO else both[:2]


def tensors(c, seed=0):
    """float32 arrays under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    width, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    out = {"model.embed_tokens.weight": rng.standard_normal((c["vocab_size"], hidden))}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", width, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, width), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            out[f"{at}.{name}.weight"] = (
                rng.standard_normal((rows, columns)) / np.sqrt(columns) * 1.5
            )
            if c["attention_bias" if "attn" in name else "mlp_bias"]:
                out[f"{at}.{name}.bias"] = rng.standard_normal(rows) / 2
        for name in norms(c):
            out[f"{at}.{name}.weight"] = rng.uniform(0.5, 1.5, hidden)
        if c["model_type"] in OLMO:
            out[f"{at}.self_attn.q_norm.weight"] = rng.uniform(0.5, 1.5, width)
            out[f"{at}.self_attn.k_norm.weight"] = rng.uniform(0.5, 1.5, kv)
    out["model.norm.weight"] = rng.uniform(0.5, 1.5, hidden)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = rng.standard_normal((c["vocab_size"], hidden))
    return {name: array.astype(np.float32) for name, array in out.items()}


def write_folder(folder, seed=0, dtype="f32", change=None, **options):
    """Write config.json and model.safetensors; return (config, arrays as stored).

    `change` may alter the arrays first.
    """
    c = config(**options)
    arrays = {name: array.astype(TYPES[dtype]) for name, array in tensors(c, seed).items()}
    if c["model_type"] == "phi3":
        fuse(arrays)
    if c["model_type"] == "granitemoehybrid":
        fuse(arrays, shared=True)
    if change:
        change(arrays)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return c, {name: array.astype(np.float32) for name, array in arrays.items()}


def fuse(arrays, shared=False):
    """Put q, k and v into one matrix, and gate and up, as Phi-3's files have them.

    `shared`: only the MLP, as Granite 4's.
    """
    if shared:
        for name in [name for name in arrays if name.endswith("mlp.gate_proj.weight")]:
            at = name.removesuffix("mlp.gate_proj.weight")
            both = [arrays.pop(f"{at}mlp.{part}_proj.weight") for part in ("gate", "up")]
            arrays[f"{at}shared_mlp.input_linear.weight"] = np.concatenate(both)
            down = arrays.pop(f"{at}mlp.down_proj.weight")
            arrays[f"{at}shared_mlp.output_linear.weight"] = down
        return
    for name in [name for name in arrays if name.endswith(("q_proj.weight", "gate_proj.weight"))]:
        at, first = name.removesuffix("_proj.weight").rsplit(".", 1)
        parts = {"q": ("q", "k", "v"), "gate": ("gate", "up")}[first]
        whole = {"q": "qkv_proj", "gate": "gate_up_proj"}[first]
        matrices = [arrays.pop(f"{at}.{part}_proj.weight") for part in parts]
        arrays[f"{at}.{whole}.weight"] = np.concatenate(matrices)


def apart(c, arrays):
    """The arrays with the parts of fused matrices as matrices of their own."""
    kv, found = c["num_key_value_heads"] * c["head_dim"], dict(arrays)
    for name in [name for name in arrays if ".shared_mlp.input_linear" in name]:
        at = name.removesuffix("shared_mlp.input_linear.weight")
        halves = np.split(found.pop(name), 2)
        found |= {f"{at}mlp.{part}_proj.weight": half for part, half in zip(("gate", "up"), halves)}
        found[f"{at}mlp.down_proj.weight"] = found.pop(f"{at}shared_mlp.output_linear.weight")
    for name in [
        name for name in arrays if name.endswith(("qkv_proj.weight", "gate_up_proj.weight"))
    ]:
        at, whole = name.removesuffix("_proj.weight").rsplit(".", 1)
        rows = len(arrays[name])
        parts, ends = (
            (("q", "k", "v"), (rows - 2 * kv, rows - kv))
            if whole == "qkv"
            else (("gate", "up"), (rows // 2,))
        )
        for part, matrix in zip(parts, np.split(found.pop(name), ends), strict=True):
            found[f"{at}.{part}_proj.weight"] = matrix
    return found


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if module in whole:
        return f"{whole[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{kind}"


def interleaved(array, head_dim):
    """Reorder the rows of q or k as llama.cpp's converter does."""
    return array.reshape(-1, 2, head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, seed=0, format="F32", **options):
    """Write the model as GGUF with matrices in `format`; return (config, arrays as stored)."""
    import gguf

    kind = gguf.GGMLQuantizationType[format]
    c = config(**options)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_rope_dimension_count(c["head_dim"])
    stored = {}
    for name, array in tensors(c, seed).items():
        rotary = ".q_proj." in name or ".k_proj." in name
        placed = interleaved(array, c["head_dim"]) if rotary else array
        # gguf only reads this format: use random blocks with values of the arrays' size.
        if array.ndim == 2 and format.endswith("_K"):
            packed = random_weight(
                np.random.default_rng(len(name)), *array.shape, format.lower(), size=array.std()
            ).raw
            packed = packed.reshape(len(array), -1)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
            stored[name] = gguf.quants.dequantize(packed, kind)
            if rotary:
                stored[name] = (
                    stored[name]
                    .reshape(-1, c["head_dim"] // 2, 2, array.shape[1])
                    .swapaxes(1, 2)
                    .reshape(array.shape)
                )
        elif array.ndim == 2:
            packed = gguf.quants.quantize(placed, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
            # Each row is quantized by itself, so their order does not matter.
            stored[name] = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind).astype(
                np.float32
            )
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(placed))
            stored[name] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return c, stored


def logits(c, arrays, tokens, states=None):
    """Logits [T, V] of one sequence, in float64 and with T x T attention.

    The list `states` gets the output [T, hidden] of each layer.
    """
    w = {name: array.astype(np.float64) for name, array in apart(c, arrays).items()}

    def norm(x, name):
        return (
            x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * w[f"{name}.weight"]
        )

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    d, n = c["head_dim"], len(tokens)
    after, types = c["model_type"] in OLMO, c.get("layer_types")
    r = int(d * c.get("partial_rotary_factor", 1))
    scaling, factors = c.get("rope_scaling") or {}, 1.0
    if "short_factor" in scaling:  # longrope
        long = n > c["original_max_position_embeddings"]
        factors = np.array(scaling["long_factor" if long else "short_factor"])
    by = scaling.get("attention_factor", 1)

    def heads(x, i, rotate=True):
        rope = c.get("rope_parameters", {}).get(types[i] if types else "", c)
        angles = np.arange(n)[:, None] * rope["rope_theta"] ** -(np.arange(0, r, 2) / r)
        angles /= rope.get("factor", 1) * factors
        rotate = rotate and (c.get("no_rope_layers") or [1] * (i + 1))[i]
        rotate = rotate and c.get("position_embedding_type") != "nope"
        cos, sin = by * np.cos(angles)[:, None], by * np.sin(angles)[:, None]
        x = x.reshape(n, -1, d)
        a, b, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
        return turned if rotate else x

    x = w["model.embed_tokens.weight"][tokens] * c.get("embedding_multiplier", 1)
    scale, added = c.get("attention_multiplier", d**-0.5), c.get("residual_multiplier", 1)
    share = c["num_attention_heads"] // c["num_key_value_heads"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = x if after else norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(y, f"{at}.self_attn.{name}_proj") for name in "qkv")
        if after:
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        q, k, v = heads(q, i), heads(k, i), heads(v, i, rotate=False)
        if beta := c.get("rope_parameters", {}).get("llama_4_scaling_beta"):
            original = c["rope_parameters"]["original_max_position_embeddings"]
            q = q * (1 + beta * np.log1p(np.arange(n) // original))[:, None, None]
        k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
        scores = np.einsum("nhd,mhd->hnm", q, k) * scale
        seen = np.tril(np.ones((n, n), bool))
        if types[i] == "sliding_attention" if types else c.get("sliding_window"):
            seen = np.triu(seen, 1 - c["sliding_window"])
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("hnm,mhd->nhd", p, v).reshape(n, -1)
        mixed, middle = linear(mixed, f"{at}.self_attn.o_proj"), f"{at}.post_attention_layernorm"
        x = x + added * (norm(mixed, middle) if after else mixed)
        y = x if after else norm(x, middle)
        gate = linear(y, f"{at}.mlp.gate_proj")
        fed = linear(
            gate / (1 + np.exp(-gate)) * linear(y, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj"
        )
        x = x + added * (norm(fed, f"{at}.post_feedforward_layernorm") if after else fed)
        if states is not None:
            states.append(x)
    head = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    return norm(x, "model.norm") @ head.T / c.get("logits_scaling", 1)


def load_tiny(folder, **options):
    """A tiny model over a new folder."""
    from pyloss.models import load_model

    write_folder(folder, **options)
    return load_model(folder)


def byte_tokenizer(pre="smollm", **changes):
    """A byte-level tokenizer of `TOKENS` tokens, from GGUF metadata with `changes`.

    `changes` are keys after `tokenizer.ggml.`.
    """
    from tokenizers import pre_tokenizers

    from pyloss.models.tokenizer import Tokenizer

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        "<|eot|>",
        "<tool>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "he",
        "ll",
        "hell",
        "hello",
        "Ġw",
        "12",
    ]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"],
    }
    values |= {
        "token_type": [3, 3, 3, 3, 4] + [1] * (len(tokens) - 5),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
    }
    values |= changes
    template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    )
    return Tokenizer.from_gguf(
        {
            "tokenizer.chat_template": template,
            **{f"tokenizer.ggml.{k}": v for k, v in values.items()},
        }
    )


TOKENS = 5 + 256 + 6


class Tokens:
    """A dataset of token ids, all of them targets."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def process(self, row):
        return row, 0
