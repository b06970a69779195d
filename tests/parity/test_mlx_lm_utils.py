"""mlx_lm.utils and mlx_lm.tuner.utils beside pyloss's: adapters, schedules, quantizing, folders."""

import json
import math

import numpy as np
import pytest
from mlx_sides import adapted, compare, filled, refused, sides

IDS = np.random.default_rng(3).integers(5, 250, (1, 20))


def loaded(side, folder, **options):
    return side().load(str(folder / "base"), **options)


def trained(side, model):
    return {name: list(v.shape) for name, v in side.tree.tree_flatten(model.trainable_parameters())}


def logits(side, model):
    return np.array(model(side.mx.array(IDS)), np.float32)


# ---- adapters


@pytest.mark.parametrize("layers", [-1, 0, 1, 2, 3, 99])
def test_layers_with_adapters(made, layers):
    compare(lambda side: trained(side, adapted(side, made, layers)[0]))


@pytest.mark.parametrize(
    "keys",
    [
        ["self_attn.q_proj"],
        ["self_attn.q_proj", "mlp.down_proj", "no.such"],
        ["model.embed_tokens"],
        ["self_attn.v_proj", "model.embed_tokens"],
    ],
    ids=" ".join,
)
def test_keys_of_adapters(made, keys):
    compare(lambda side: trained(side, adapted(side, made, 2, keys=keys)[0]))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scale", [0, 0.5, 20.0])
def test_logits_with_adapters(made, dora, scale):
    def case(side):
        return logits(side, adapted(side, made, dora=dora, scale=scale)[0])

    compare(case, atol=1e-3)


def test_new_adapters_change_nothing(made):
    def case(side):
        model, _ = loaded(side, made)
        before = logits(side, model)
        model.freeze()
        config = {"rank": 4, "scale": 10.0, "dropout": 0.0}
        side("tuner.utils").linear_to_lora_layers(model, 2, config)
        return np.abs(logits(side, model) - before).max() < 1e-5

    assert compare(case)


def test_a_config_without_scale(made):
    def case(side):
        model, _ = loaded(side, made)
        make = side("tuner.utils").linear_to_lora_layers
        return [
            refused(lambda: make(model, 1, {"rank": 4, "dropout": 0.0}), KeyError),
            refused(lambda: make(model, 1, {"rank": 4, "alpha": 8, "dropout": 0.0}), KeyError),
        ]

    assert compare(case) == ["KeyError", "KeyError"]


def test_parameters_that_were_trained_before_stay_so(made):
    def case(side):
        model, _ = loaded(side, made)
        model.freeze()
        model.layers[-1].input_layernorm.unfreeze()
        config = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
        side("tuner.utils").linear_to_lora_layers(model, 1, config)
        return trained(side, model)

    assert len(compare(case)) == 3


def test_adapters_of_a_folder(made):
    def case(side):
        model, _ = loaded(side, made)
        return logits(side, side("tuner.utils").load_adapters(model, str(made / "adapters")))

    compare(case, atol=1e-3)


@pytest.mark.parametrize("writer", [0, 1])
def test_adapters_of_the_other_library(made, tmp_path, writer):
    both = sides()
    model = adapted(both[writer], made)[0]
    wanted = logits(both[writer], model)
    weights = dict(both[writer].tree.tree_flatten(model.trainable_parameters()))
    both[writer].mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"num_layers": -1, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    reader = both[1 - writer]
    found = logits(reader, loaded(reader, made, adapter_path=str(tmp_path))[0])
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_adapters_that_do_not_fit(made, tmp_path):
    for name in ("adapters.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((made / "adapters" / name).read_bytes())

    def case(side):
        mx, load = side.mx, side("tuner.utils").load_adapters
        weights = dict(mx.load(str(made / "adapters" / "adapters.safetensors")))
        first = sorted(weights)[0]
        weights[first] = mx.zeros((3, 3))
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
        return [
            refused(lambda: load(loaded(side, made)[0], str(tmp_path)), ValueError),
            refused(lambda: load(loaded(side, made)[0], str(tmp_path / "none")), FileNotFoundError),
        ]

    assert compare(case)[0] == "ValueError"


def test_removed_adapters(made):
    def case(side):
        model = adapted(side, made)[0]
        model = side("tuner.utils").remove_lora_layers(model)
        names = [name for name, _ in side.tree.tree_flatten(model.trainable_parameters())]
        return logits(side, model), [name for name in names if "lora" in name]

    assert compare(case, atol=1e-3)[1] == []


@pytest.mark.parametrize("dora", [False, True])
def test_fused_layers(made, dora):
    def case(side):
        model = adapted(side, made, dora=dora)[0]
        before = logits(side, model)
        fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse") and n]
        model.update_modules(side.tree.tree_unflatten(fused))
        after = logits(side, model)
        assert np.abs(after - before).max() < 1e-3
        return after, sorted(
            {type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj")}
        )

    compare(case, atol=1e-3)


def test_layers_by_themselves():
    def case(side):
        found = []
        for module, name in (("lora", "LoRALinear"), ("dora", "DoRALinear")):
            kind, base = getattr(side(f"tuner.{module}"), name), side.nn.Linear(16, 8, bias=True)
            layer = kind.from_base(base, r=3, dropout=0.0, scale=2.0)
            found.append([list(layer.lora_a.shape), list(layer.lora_b.shape), layer.scale])
            other = kind(16, 8, r=4)
            found.append(
                [list(other.lora_a.shape), bool(abs(np.array(other.lora_a)).max() <= 0.25)]
            )
        return found

    compare(case)


def test_another_base_of_dora():
    def case(side):
        nn, rng = side.nn, np.random.default_rng(0)
        layer = side("tuner.dora").DoRALinear.from_base(nn.Linear(6, 4, bias=False), r=2)
        weight = rng.standard_normal((4, 6)).astype(np.float32)
        base = nn.Linear(6, 4, bias=False)
        base.weight = side.mx.array(weight)
        layer.set_linear(base)
        return np.array(layer.m)

    compare(case)


# ---- counts and schedules


def test_counts(made, capsys):
    """Without adapters: mlx-lm's total leaves theirs out."""

    def case(side):
        model, _ = loaded(side, made)
        model.freeze()
        model.layers[-1].mlp.unfreeze()
        side("tuner.utils").print_trainable_parameters(model)
        return side("utils").get_total_parameters(model), capsys.readouterr().out

    compare(case)


SCHEDULES = [
    {"name": "cosine_decay", "arguments": [1e-4, 50]},
    {"name": "cosine_decay", "arguments": [1e-4, 50, 1e-6], "warmup": 5},
    {"name": "linear_schedule", "arguments": [1e-3, 1e-5, 30], "warmup": 4, "warmup_init": 1e-6},
    {"name": "exponential_decay", "arguments": [1e-3, 0.9]},
    {"name": "step_decay", "arguments": [1e-3, 0.5, 7], "warmup": 3},
]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c['name']} {c.get('warmup', 0)}")
def test_schedules(config):
    def case(side):
        schedule = side("tuner.utils").build_schedule(config)
        mx = side.mx
        return [
            float(np.array(schedule(step if side.own else mx.array(step)))) for step in range(60)
        ]

    compare(case, atol=1e-8)


# ---- models and folders


def test_a_config_comes_along(made):
    def case(side):
        config = loaded(side, made, return_config=True)[2]
        return {
            key: config[key]
            for key in ("model_type", "hidden_size", "eos_token_id", "num_hidden_layers")
        }

    compare(case)


def test_ends_of_the_generation_config(made, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "eos_token_id": 1, "x": {"__float__": "Infinity"}})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    compare(lambda side: side("utils").load_config(tmp_path))
    (tmp_path / "generation_config.json").write_text("{damaged")
    found = compare(lambda side: side("utils").load_config(tmp_path))
    assert found["eos_token_id"] == 1 and math.isinf(found["x"])


def test_written_configs(tmp_path):
    config = {
        "b": 1,
        "a": [1.5, -math.inf],
        "vision_config": {},
        "_name_or_path": "x",
        "quantization": {"bits": 4},
    }

    def case(side):
        file = tmp_path / "config.json"
        side("utils").save_config(dict(config), file)
        return json.loads(file.read_text()), list(json.loads(file.read_text()))

    compare(case)


def test_saved_models(made, tmp_path):
    """A folder that one library writes is read by the other."""
    written = {}
    for side in sides():
        model, tokenizer, config = loaded(side, made, return_config=True)
        folder = tmp_path / str(side.own)
        side("utils").save(folder, str(made / "base"), model, tokenizer, config)
        written[side.own] = folder
        model, _ = loaded(side, made)
        wanted = logits(side, model)
    for side in sides():
        for folder in written.values():
            model, tokenizer = side().load(str(folder))
            np.testing.assert_allclose(logits(side, model), wanted, atol=1e-3)
            assert tokenizer.encode("hello") == loaded(side, made)[1].encode("hello")


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (None, None), (3, 32)])
def test_quantized_models(made, bits, group):
    def case(side):
        model, _, config = loaded(side, made, return_config=True)
        model, config = side("utils").quantize_model(model, config, group, bits)
        told = {key: config[key] for key in ("quantization", "quantization_config")}
        return told, logits(side, model)

    compare(case, atol=2e-2)


def test_layers_chosen_for_quantizing(made):
    def choose(path, module):
        if "mlp" not in path:
            return False
        return {"bits": 8, "group_size": 32} if "down_proj" in path else True

    def case(side):
        model, _, config = loaded(side, made, return_config=True)
        model, config = side("utils").quantize_model(model, config, 32, 4, quant_predicate=choose)
        return config["quantization"], logits(side, model)

    compare(case, atol=2e-2)


def test_dequantized_models(made):
    def case(side):
        model, _, config = loaded(side, made, return_config=True)
        model, _ = side("utils").quantize_model(model, config, 32, 4)
        before = logits(side, model)
        after = logits(side, side("utils").dequantize_model(model))
        return bool(np.abs(after - before).max() < 1e-2)

    assert compare(case)


def test_bits_per_weight(made):
    def case(side):
        model, _, config = loaded(side, made, return_config=True)
        before = side("utils").compute_bits_per_weight(model)
        model, _ = side("utils").quantize_model(model, config, 32, 4)
        return before, side("utils").compute_bits_per_weight(model)

    compare(case, atol=2e-2)


def test_shards():
    weights = {
        name: np.zeros((size, 1 << 20), np.uint8)
        for name, size in zip("abcd", (300, 900, 1100, 10), strict=True)
    }
    compare(lambda side: [list(part) for part in side("utils").make_shards(weights, 1)])


@pytest.mark.parametrize(
    ("a", "b"), [([1, 2, 3], [1, 2, 4]), ([], [1]), ([1, 2], [1, 2, 3]), ("abc", "xbc")]
)
def test_common_prefixes(a, b):
    compare(lambda side: side("utils").common_prefix_len(a, b))


def test_no_metal():
    compare(lambda side: side("utils").can_run_metal())


def test_a_loaded_model_can_be_trained_at_once(made):
    compare(lambda side: trained(side, loaded(side, made)[0]))


def test_filled_models_agree(made):
    compare(lambda side: logits(side, filled(side, adapted(side, made)[0], seed=9)), atol=1e-3)


ARGS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
ARGS |= {"rms_norm_eps": 1e-5, "vocab_size": 260, "num_key_value_heads": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {
        "head_dim": 8,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_new_models(family):
    """Names, shapes, and the logits of the same weights."""

    def case(side):
        module = side(f"models.{family}")
        model = module.Model(module.ModelArgs(model_type=family, **ARGS, **FAMILIES[family]))
        shapes = trained(side, model)
        model.update(side.tree.tree_unflatten(
            [(n, side.mx.array(np.random.default_rng(len(n)).normal(0.1, 0.2, s).astype(np.float32)))
             for n, s in sorted(shapes.items())]
        ))  # fmt: skip
        return shapes, logits(side, model)

    compare(case, atol=1e-4)


def test_adapters_freeze_a_base_that_nothing_froze(made, caplog):
    """pyloss alone: mlx-lm would train the base, too."""
    _, side = sides()
    model, _ = loaded(side, made)
    parts = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.v_proj"]}
    side("tuner.utils").linear_to_lora_layers(model, 1, parts)
    assert "nothing has called model.freeze()" in caplog.text
    assert {name.rsplit(".", 1)[1] for name in trained(side, model)} == {"lora_a", "lora_b"}


def test_hidden_states_below_the_head(made):
    """`model.model(ids)`, and the head over them."""

    def case(side):
        model, _ = loaded(side, made)
        states = model.model(side.mx.array(IDS))
        head = getattr(model, "lm_head", None) or model.model.embed_tokens.as_linear
        return np.array(states), np.array(head(states)), not hasattr(model, "fuse")

    compare(case, atol=1e-4)


def test_layers_one_by_one(made):
    """A script that walks through the decoder layers, and their gradients."""

    def case(side):
        model, _ = adapted(side, made)
        filled(side, model, seed=4)
        masks = side("models.base").create_attention_mask

        def states(model, ids):
            h = model.model.embed_tokens(ids)
            for layer in model.model.layers:
                h = layer(h, masks(h, None), None)
            return h

        ids = side.mx.array(np.concatenate([IDS, IDS[:, ::-1]]))
        step = side.nn.value_and_grad(model, lambda m, x: side.mx.square(states(m, x)).mean())
        value, grads = step(model, ids)
        return np.array(states(model, ids)), value, sorted(side.tree.tree_flatten(grads))

    compare(case, atol=1e-4)


def test_layers_take_causal_masks_alone(made):
    _, side = sides()
    model, _ = loaded(side, made)
    h = side.mx.zeros((1, 3, 32))
    ones = side.mx.array(np.tri(3, dtype=bool))
    np.testing.assert_array_equal(model.layers[0](h, "causal"), model.layers[0](h, ones))
    for mask in (None, ~np.array(ones), side.mx.zeros((3, 3))):
        with pytest.raises(ValueError, match='mask must be "causal"'):
            model.layers[0](h, mask)
    with pytest.raises(ValueError, match="takes no cache"):
        model.layers[0](h, "causal", object())
    with pytest.raises(TypeError, match="attention is called by its layer alone"):
        model.layers[0].self_attn(h, "causal")
