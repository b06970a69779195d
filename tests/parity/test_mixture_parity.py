"""Whole mixture models against transformers and mlx-lm: logits, adapter gradients, saved files."""

import json
import re

import numpy as np
import pytest
import tiny as tiny_files
from parity_gguf import write_gguf
from parity_models import (
    GEMMA4_EXPERTS,
    GRANITE4_MAMBA,
    MIXTURES,
    add_adapter,
    greedy,
    load_in_mlx,
    make_tiny,
    mlx_logits,
    our_logits,
    relative,
    torch,
    torch_logits,
    torch_loss,
    torch_model,
)
from safetensors.numpy import load_file, save_file

import pyloss
from pyloss import FormatError, nn
from pyloss.models.files.gguf_writer import write_gguf as write_our_gguf
from pyloss.models.files.names import language_model_name
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.losses import target_weights

IDS = np.random.default_rng(0).integers(0, 300, 60)
VARIANTS = {
    **MIXTURES,
    "mixtral with a window": {**MIXTURES["mixtral"], "sliding_window": 24},
    "qwen3_moe with an MLP": {
        **MIXTURES["qwen3_moe"],
        "mlp_only_layers": [0],
        "norm_topk_prob": False,
    },
    "lfm2_moe without a bias": {
        **MIXTURES["lfm2_moe"],
        "use_expert_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
    },
    "granitemoehybrid without positions": {
        **MIXTURES["granitemoehybrid"],
        "position_embedding_type": "nope",
        "tie_word_embeddings": False,
    },
    "granitemoehybrid with a mamba layer": {
        **GRANITE4_MAMBA,
        **MIXTURES["granitemoehybrid"],
        "layer_types": ["mamba", "attention"],
    },
    "gemma4": GEMMA4_EXPERTS,
    "gemma4 with values of their own": {
        **GEMMA4_EXPERTS,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 32,
    },
    "qwen2_moe with MLPs and windows": {
        **MIXTURES["qwen2_moe"],
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 3,
    },
}


@pytest.fixture(params=[*VARIANTS, *(f"{name}, gguf" for name in MIXTURES)])
def tiny(request, tmp_path):
    """(our model, transformers' model) with the same weights in float32."""
    name, gguf, _ = request.param.partition(", gguf")
    theirs = make_tiny(**VARIANTS[name])
    if gguf:
        write_gguf(theirs, tmp_path / "model.gguf")
        return pyloss.load_model(tmp_path / "model.gguf"), theirs
    theirs.save_pretrained(tmp_path)
    return pyloss.load_model(tmp_path), theirs


def test_logits_and_cache(tiny):
    ours, theirs = tiny
    expected = torch_logits(theirs, IDS)
    assert expected.std() > 0.5
    np.testing.assert_allclose(our_logits(ours, IDS), expected, rtol=0, atol=1e-4)
    cache = ours.make_cache()
    for begin, end in ((0, 20), (20, 21), (21, 23), (23, 60)):
        np.testing.assert_allclose(
            ours.step(IDS[begin:end], cache), expected[end - 1], rtol=0, atol=1e-4
        )


def merged(name, adapter):
    """The weight with its adapter, and a function from its gradient to the adapter's gradients."""
    a, b, scale = (
        adapter.lora_a.astype(np.float64),
        adapter.lora_b.astype(np.float64),
        adapter.scale,
    )
    weight = adapter.base.weight
    dense = weight if isinstance(weight, np.ndarray) else weight.dequantize()
    if a.ndim == 3:
        return dense + scale * b @ a, lambda g: (
            scale * b.swapaxes(1, 2) @ g,
            scale * g @ a.swapaxes(1, 2),
        )
    return dense + scale * (a @ b).T, lambda g: (scale * g.T @ b.T, scale * (g @ a).T)


def their_parameter(model, name):
    """transformers' parameter for our module `name`, and the module's rows in it."""
    parameters = dict(model.named_parameters())
    if not any("block_sparse_moe" in other for other in parameters):
        name = name.replace("block_sparse_moe", "mlp")
    name = name.replace(".router.layer", ".router")
    if ".switch_mlp." not in name:
        return parameters[f"{name}.weight"], slice(None)
    block, part = name.split(".switch_mlp.")
    if part == "down_proj":
        return parameters[f"{block}.experts.down_proj"], slice(None)
    both = parameters[f"{block}.experts.gate_up_proj"]
    half = both.shape[1] // 2
    return both, (slice(None), slice(0, half) if part == "gate_proj" else slice(half, None))


def test_gradients_of_adapters(tiny):
    """Over all linear layers, router and experts; transformers has merged weights in float64."""
    ours, theirs = tiny
    add_adapter(ours, size=0.1)
    theirs.double().set_experts_implementation("eager")  # others compute in float32
    adapters = adapter_modules(ours)
    kinds = {type(adapter).__name__ for adapter in adapters.values()}
    assert kinds == {"LoRALinear", "LoRASwitchLinear"} and any(
        name.endswith((".gate", ".router.layer", ".router.proj")) for name in adapters
    )
    back = {}
    with torch.no_grad():
        for name, adapter in adapters.items():
            value, back[name] = merged(name, adapter)
            parameter, rows = their_parameter(theirs, name)
            parameter[rows] = torch.from_numpy(value)
    batch = np.zeros((2, 40), np.int32)
    batch[0], batch[1, :21] = IDS[:40], IDS[39:60]
    lengths = np.array([[3, 40], [0, 21]], np.int32)
    (loss, _), grads = nn.value_and_grad(ours, pyloss.tuner.default_loss)(ours, batch, lengths)
    expected = torch_loss(theirs, batch, target_weights(batch, lengths).astype(np.float64))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    ours.set_grad_checkpoint()
    _, again = nn.value_and_grad(ours, pyloss.tuner.default_loss)(ours, batch, lengths)
    assert all((again[name] == grad).all() for name, grad in grads.items())
    for name in adapters:
        parameter, rows = their_parameter(theirs, name)
        by_a, by_b = back[name](parameter.grad[rows].numpy())
        assert relative(grads[f"{name}.lora_a"], by_a) < 1e-4, name
        assert relative(grads[f"{name}.lora_b"], by_b) < 1e-4, name


def test_fused_and_saved(tiny, tmp_path):
    ours, _ = tiny
    add_adapter(ours, size=0.2)
    tokens, logits = greedy(ours, IDS, 30), our_logits(ours, IDS)
    ours.fuse().save(tmp_path / "fused")
    again = pyloss.load_model(tmp_path / "fused")
    assert again.config == ours.config and greedy(again, IDS, 30) == tokens
    np.testing.assert_array_equal(our_logits(again, IDS), our_logits(ours, IDS))
    theirs = torch_model(tmp_path / "fused")
    np.testing.assert_allclose(torch_logits(theirs, IDS), logits, rtol=0, atol=2e-4)
    # mlx-lm has no window here, and not this family.
    if ours.config.sliding_window is None and ours.config.model_type != "granitemoeshared":
        mlx = load_in_mlx(tmp_path / "fused")
        np.testing.assert_allclose(mlx_logits(mlx, IDS), logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_written_as_gguf(tmp_path, name, type):
    make_tiny(**{**MIXTURES[name], "vocab_size": tiny_files.TOKENS}).save_pretrained(tmp_path)
    ours = pyloss.load_model(tmp_path)
    ids = IDS % tiny_files.TOKENS
    write_our_gguf(ours, tmp_path / "model.gguf", tiny_files.byte_tokenizer(), type)
    again = pyloss.load_model(tmp_path / "model.gguf")
    assert again.config.mixture == ours.config.mixture
    experts = [weight for name, weight in again.stored().items() if ".switch_mlp." in name]
    assert len(experts) == 6 and {weight.format for weight in experts} == {type}
    if type == "f32":
        np.testing.assert_allclose(our_logits(again, ids), our_logits(ours, ids), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:storing the fused weight")
@pytest.mark.parametrize("name", MIXTURES)
def test_fused_into_a_quantised_base(tmp_path, name):
    """GGUF and back: experts are requantized to the base's format, and the tokens stay the same."""
    make_tiny(**{**MIXTURES[name], "vocab_size": tiny_files.TOKENS}).save_pretrained(tmp_path)
    write_our_gguf(
        pyloss.load_model(tmp_path), tmp_path / "base.gguf", tiny_files.byte_tokenizer(), "q8_0"
    )
    ours = add_adapter(pyloss.load_model(tmp_path / "base.gguf"), size=0.2)
    before, ids = our_logits(ours, IDS % tiny_files.TOKENS), IDS % tiny_files.TOKENS
    ours.fuse()
    assert {weight.format for name, weight in ours.stored().items() if ".switch_mlp." in name} == {
        "q8_0"
    }
    errors = np.linalg.norm(our_logits(ours, ids) - before, axis=1) / np.linalg.norm(before, axis=1)
    assert np.median(errors) < 0.05  # few tokens change their experts
    write_our_gguf(ours, tmp_path / "fused.gguf", tiny_files.byte_tokenizer())
    again = pyloss.load_model(tmp_path / "fused.gguf")
    # GGUF has exponentials of the delta rule's rates.
    atol = 1e-4 if ours.config.delta else 0
    np.testing.assert_allclose(our_logits(again, ids), our_logits(ours, ids), rtol=0, atol=atol)
    assert greedy(again, ids, 30) == greedy(ours, ids, 30)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3_moe",
            {"mlp_only_layers": [0]},
            r"experts in all layers of qwen3moe; here layers \[0\] have none",
        ),
        (
            "qwen3_moe",
            {"norm_topk_prob": False},
            "weights that are normalized; norm_topk_prob is False",
        ),
        (
            "olmoe",
            {"norm_topk_prob": True},
            "weights that are not normalized; norm_topk_prob is True",
        ),
        (
            "granitemoehybrid",
            {"position_embedding_type": "nope"},
            "nope cannot be written: llama.cpp has rotary positions in granitemoe",
        ),
        (
            "lfm2_moe",
            {"routed_scaling_factor": 2.0},
            "use_expert_bias true and routed_scaling_factor 1; here they are True and 2",
        ),
        (
            "qwen2_moe",
            {"decoder_sparse_step": 2},
            r"experts in all layers of qwen2moe; here layers \[0\] have none",
        ),
    ],
)
def test_what_gguf_cannot_say(tmp_path, name, changes, message):
    make_tiny(**{**MIXTURES[name], **changes, "vocab_size": tiny_files.TOKENS}).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=message):
        write_our_gguf(
            pyloss.load_model(tmp_path), tmp_path / "model.gguf", tiny_files.byte_tokenizer()
        )


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("layout", ["mlx-lm's stacks", "transformers 5's modules"])
def test_stacked_tensors(tmp_path, name, layout):
    theirs = make_tiny(**MIXTURES[name])
    theirs.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    of_experts = re.compile(r"\.experts\.|block_sparse_moe\.(in|out)put_linear")
    tensors = {k: value for k, value in load_file(file).items() if not of_experts.search(k)}
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    stacks = {key: value for key, value in state.items() if ".experts." in key}
    if layout == "mlx-lm's stacks":
        for key, value in stacks.items():
            at, _, _ = key.partition(".experts.")
            at = (
                at.replace("mlp", "block_sparse_moe") if name == "mixtral" else at
            ) + ".switch_mlp"
            halves = np.split(value, 2, axis=1)
            parts = (
                {"down_proj": value}
                if key.endswith("down_proj")
                else {"gate_proj": halves[0], "up_proj": halves[1]}
            )
            tensors |= {
                f"{at}.{part}.weight": np.ascontiguousarray(half) for part, half in parts.items()
            }
        for own, theirs_name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            tensors = {
                key.replace(f"feed_forward.{own}", f"feed_forward.{theirs_name}"): value
                for key, value in tensors.items()
            }
    else:
        tensors = {
            key.replace(".router.layer", ".router")
            if name.startswith("granite")
            else key.replace("block_sparse_moe", "mlp"): value
            for key, value in tensors.items()
        } | stacks
    save_file(tensors, file)
    ours = pyloss.load_model(tmp_path)
    np.testing.assert_allclose(our_logits(ours, IDS), torch_logits(theirs, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "granitemoeshared"])
def test_names_of_modules_are_those_of_mlx_lm(tmp_path, name):
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    from mlx.utils import tree_flatten

    model = make_tiny(**MIXTURES[name])
    model.save_pretrained(tmp_path)
    # Adds the keys of config.json that mlx-lm needs.
    pyloss.load_model(tmp_path).save(tmp_path / "saved")
    theirs = load_in_mlx(tmp_path / "saved")
    theirs.freeze()
    ours = pyloss.load_model(tmp_path)
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    tuner.linear_to_lora_layers(theirs, 1, config)
    pyloss.tuner.linear_to_lora_layers(ours, 1, config)
    found = {key: value.shape for key, value in ours.trainable_parameters().items()}
    assert found == {
        language_model_name(key): tuple(value.shape)
        for key, value in tree_flatten(theirs.trainable_parameters())
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_a_configuration_that_lies_is_named(tmp_path, name):
    make_tiny(**MIXTURES[name]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    sizes = [
        key for key in content if re.fullmatch(r"(moe|shared)_.*size|num_(local_)?experts", key)
    ]
    assert sizes
    for key in [*sizes, "num_dense_layers"]:
        if content.get(key):
            (tmp_path / "config.json").write_text(json.dumps({**content, key: content[key] + 1}))
            with pytest.raises(FormatError, match="configuration gives|missing|no part of this"):
                pyloss.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_experts_per_tok": 7}))
    with pytest.raises(FormatError, match="a token cannot visit 7 of [56] experts"):
        pyloss.load_model(tmp_path)
