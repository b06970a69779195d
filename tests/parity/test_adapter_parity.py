"""Adapters and fused models exchanged with mlx-lm, PEFT and transformers, in both directions."""

import json

import numpy as np
import pytest
from parity_models import (
    LINEARS,
    TINY,
    add_adapter,
    fill_adapter,
    make_tiny,
    mlx_logits,
    our_logits,
    torch,
    torch_logits,
    torch_model,
)
from safetensors.numpy import load_file

import pyloss
from pyloss.io.files import write_safetensors
from pyloss.tuner.adapters.adapter import adapter_modules

KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
IDS = np.random.default_rng(0).integers(0, TINY["vocab_size"], 50)


@pytest.fixture
def mlx_lm():
    return pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="compares with PEFT (parity extra)")


@pytest.fixture
def folder(tmp_path):
    """A tiny model with arbitrary tokenizer files; only weights and configuration matter."""
    place = tmp_path / "base"
    make_tiny(tie_word_embeddings=False, mlp_bias=True).save_pretrained(place)
    return place


def load_mlx(mlx_lm, folder, adapter=None):
    """Do what `mlx_lm.load` does, without the tokenizer, which tiny models lack."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.eval()
    return model


# ---- The embedded model


@pytest.fixture(scope="module")
def adapted(smollm2_gguf):
    """(model with a filled adapter over the GGUF weights, tokenizer, token ids, logits)."""
    model, tokenizer = pyloss.load(smollm2_gguf)
    plain = our_logits(
        model, ids := tokenizer.encode("The quick brown fox jumps over the lazy dog, and then it")
    )
    add_adapter(model)
    logits = our_logits(model, ids)
    assert np.abs(logits - plain).max() > 1  # the adapter has an effect
    return model, tokenizer, ids, logits


def test_mlx_lm_loads_an_adapter_saved_here(mlx_lm, adapted, smollm2_folder, tmp_path):
    model, _, ids, logits = adapted
    pyloss.save_adapter(model, tmp_path)
    theirs, tokenizer = mlx_lm.load(str(smollm2_folder), adapter_path=str(tmp_path))
    assert tokenizer.encode("The quick brown fox") == ids[:4]
    np.testing.assert_allclose(mlx_logits(theirs, ids), logits, rtol=0, atol=2e-3)


def test_peft_loads_an_adapter_saved_here(peft, adapted, smollm2_torch, tmp_path):
    model, _, ids, logits = adapted
    pyloss.save_adapter(model, tmp_path, format="peft", base_model="smollm2")
    theirs = peft.PeftModel.from_pretrained(smollm2_torch, tmp_path)
    np.testing.assert_allclose(torch_logits(theirs, ids), logits, rtol=0, atol=1e-3)


def test_an_adapter_saved_by_peft_loads_here(peft, adapted, smollm2_gguf, smollm2_torch, tmp_path):
    _, _, ids, _ = adapted
    theirs = peft.get_peft_model(
        smollm2_torch,
        peft.LoraConfig(
            r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    )
    fill_adapter(theirs)
    theirs.save_pretrained(tmp_path)
    model, _ = pyloss.load(smollm2_gguf, adapter_path=tmp_path)
    assert len(adapter_modules(model)) == 60
    np.testing.assert_allclose(our_logits(model, ids), torch_logits(theirs, ids), rtol=0, atol=1e-3)


def test_a_fused_model_elsewhere(mlx_lm, smollm2_gguf, tmp_path):
    model, tokenizer = pyloss.load(smollm2_gguf)
    add_adapter(model, size=0.01)
    ids = tokenizer.encode("Once upon a time")
    before = our_logits(model, ids)
    model.fuse(dequantize=True).save(tmp_path, tokenizer)
    np.testing.assert_allclose(our_logits(model, ids), before, rtol=0, atol=1e-3)
    theirs = torch_model(tmp_path)
    np.testing.assert_allclose(torch_logits(theirs, ids), before, rtol=0, atol=1e-3)
    mlx_model, _ = mlx_lm.load(str(tmp_path))
    np.testing.assert_allclose(mlx_logits(mlx_model, ids), before, rtol=0, atol=2e-3)
    expected = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=16, pad_token_id=2
    )[0, len(ids) :].tolist()
    found = [step.token for step in pyloss.stream_generate(model, tokenizer, ids, max_tokens=16)]
    assert found == expected
    again, _ = pyloss.load(tmp_path)
    np.testing.assert_allclose(our_logits(again, ids), our_logits(model, ids), rtol=0, atol=1e-4)


# ---- Every layout and option, over a tiny model


@pytest.mark.parametrize(
    ("keys", "num_layers"),
    [(None, -1), (KEYS, -1), (KEYS, 1), ([*KEYS, "lm_head"], 1)],
    ids=["all", "some", "last", "head"],
)
def test_mlx_lm_loads_each_choice_of_layers(mlx_lm, folder, tmp_path, keys, num_layers):
    model = pyloss.load_model(folder)
    plain = our_logits(model, IDS)
    add_adapter(model, keys=keys, num_layers=num_layers, size=0.3)
    pyloss.save_adapter(model, tmp_path / "adapter")
    logits = our_logits(model, IDS)
    assert np.abs(logits - plain).max() > 0.1
    np.testing.assert_allclose(
        mlx_logits(load_mlx(mlx_lm, folder, tmp_path / "adapter"), IDS), logits, rtol=0, atol=1e-4
    )
    again = pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "adapter")
    np.testing.assert_array_equal(our_logits(again, IDS), logits)


@pytest.mark.parametrize("keys", [KEYS, [*KEYS, "lm_head"]], ids=["layers", "head"])
def test_peft_loads_each_choice_of_layers(peft, folder, tmp_path, keys):
    """Also in one layer only, which PEFT is told by full names."""
    model = add_adapter(pyloss.load_model(folder), keys=keys, num_layers=1, size=0.3, scale=1.7)
    pyloss.save_adapter(model, tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(theirs, IDS), our_logits(model, IDS), rtol=0, atol=1e-4)


def check_the_way_round(peft, mlx_lm, folder, tmp_path, theirs, tolerance):
    """A PEFT adapter gives the same logits in pyloss, then in mlx-lm, then back in PEFT."""
    expected = torch_logits(theirs, IDS)
    assert np.abs(expected - torch_logits(torch_model(folder), IDS)).max() > 0.1
    theirs.save_pretrained(tmp_path / "peft")
    model = pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "peft")
    np.testing.assert_allclose(our_logits(model, IDS), expected, rtol=0, atol=tolerance)
    pyloss.export(model, tmp_path / "mlx", "mlx")
    np.testing.assert_allclose(
        mlx_logits(load_mlx(mlx_lm, folder, tmp_path / "mlx"), IDS),
        expected,
        rtol=0,
        atol=tolerance,
    )
    pyloss.export(model, tmp_path / "again", "peft")
    again = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "again")
    np.testing.assert_allclose(torch_logits(again, IDS), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": list(LINEARS)},
        {"target_modules": "all-linear", "lora_alpha": 3},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj", "gate_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["o_proj"], "lora_dropout": 0.3},
        {"target_modules": r".*\.0\.mlp\.(up|gate)_proj", "init_lora_weights": "gaussian"},
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 7, "1.self_attn.q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
        {
            "target_modules": ["v_proj", "up_proj"],
            "rank_pattern": {"up_proj": 7},
            "use_rslora": True,
        },
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["0.mlp.up_proj.weight"],
            "rank_pattern": {"up_proj.weight": 2},
        },
    ],
    ids=[
        "linears",
        "all-linear",
        "one layer",
        "rslora",
        "head",
        "dropout",
        "pattern",
        "ranks and alphas",
        "ranks and rslora",
        "parameter",
    ],
)
def test_adapters_of_peft_load_here_and_go_on_to_mlx_lm(peft, mlx_lm, folder, tmp_path, options):
    theirs = peft.get_peft_model(
        torch_model(folder), peft.LoraConfig(**{"r": 4, "lora_alpha": 10, **options})
    ).eval()
    fill_adapter(theirs)
    check_the_way_round(peft, mlx_lm, folder, tmp_path, theirs, 1e-4)


def test_an_adapted_head_comes_with_its_base_from_peft(peft, folder, tmp_path):
    """PEFT saves the base of an adapted head, and loads it, too: it may be another one."""
    theirs = peft.get_peft_model(
        torch_model(folder), peft.LoraConfig(r=4, target_modules=["lm_head"])
    )
    theirs.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.lm_head.base_layer.weight"
    base = arrays[name]
    file = tmp_path / "adapter_model.safetensors"
    model = pyloss.load_model(folder)
    before = model.lm_head.weight
    write_safetensors(file, {**arrays, name: base[:-1].copy()})
    with pytest.raises(ValueError, match=r"lm_head: tables must have as many rows"):
        pyloss.tuner.load_adapters(model, tmp_path)
    write_safetensors(file, {**arrays, name: base[:, :-1].copy()})
    with pytest.raises(ValueError, match=r"lm_head: the adapter was made over a weight of shape"):
        pyloss.tuner.load_adapters(model, tmp_path)
    assert not adapter_modules(model) and model.lm_head.weight is before and not model.own_tables
    write_safetensors(file, {**arrays, name: base})
    assert list(adapter_modules(pyloss.tuner.load_adapters(model, tmp_path))) == ["lm_head"]
    assert model.lm_head.linear.weight is before and not model.own_tables
    for other in (base[::-1].copy(), pyloss.Weight.quantize(base, "q4_0").dequantize()):
        write_safetensors(file, {**arrays, name: other})
        model = pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path)
        np.testing.assert_array_equal(model.lm_head.linear.weight, other)
        reread = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path)
        logits = torch_logits(reread, IDS)
        np.testing.assert_allclose(our_logits(model, IDS), logits, rtol=0, atol=2e-4)


def test_mlx_lm_loads_adapters_alone(mlx_lm, folder, tmp_path):
    """Not what is trained beside them: `one_rank`, whose files are for mlx-lm, refuses it."""
    model = pyloss.load_model(folder)
    settings = {"rank": 4, "scale": 2.0, "keys": KEYS, "modules_to_save": ["lm_head"]}
    pyloss.tuner.linear_to_lora_layers(model, -1, settings)
    with pytest.raises(ValueError, match="lm_head: mlx-lm loads adapters alone; fuse"):
        pyloss.save_adapter(model, tmp_path / "refused", one_rank=True)
    assert not (tmp_path / "refused").exists()
    pyloss.save_adapter(model, tmp_path / "mlx")
    with pytest.raises(ValueError, match="lm_head.weight: not an adapter parameter"):
        load_mlx(mlx_lm, folder, tmp_path / "mlx")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora_bias", {"lora_bias": True}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
        ("layer_replication", {"layer_replication": [[0, 2], [0, 2]]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_has_and_we_have_not_is_refused_by_name(peft, folder, tmp_path, name, options):
    theirs = peft.get_peft_model(
        torch_model(folder),
        peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}),
    )
    theirs.save_pretrained(tmp_path / "peft")
    model = pyloss.load_model(folder)
    with pytest.raises(ValueError, match=rf"peft.*{name}"):
        pyloss.tuner.load_adapters(model, tmp_path / "peft")
    assert not adapter_modules(model)


def test_other_methods_of_peft_are_refused_by_name(peft, folder, tmp_path):
    theirs = peft.get_peft_model(
        torch_model(folder), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="IA3"):
        pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "peft")


@pytest.mark.parametrize("keys", [None, KEYS], ids=["default keys", "keys"])
def test_an_adapter_saved_by_mlx_lm_loads_here(mlx_lm, folder, tmp_path, keys):
    """Written as by mlx_lm.lora: all arguments in adapter_config.json, matrices from the model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    theirs = load_mlx(mlx_lm, folder)
    theirs.freeze()
    parameters = {
        "rank": 5,
        "scale": 3.0,
        "dropout": 0.1,
        **({} if keys is None else {"keys": keys}),
    }
    linear_to_lora_layers(theirs, 1, parameters)
    weights = dict(tree_flatten(theirs.trainable_parameters()))
    weights = {
        name: mx.random.normal(value.shape, scale=0.1, key=mx.random.key(i))
        for i, (name, value) in enumerate(weights.items())
    }
    theirs.load_weights(list(weights.items()), strict=False)
    theirs.eval()
    adapter = tmp_path / "mlx"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    settings = {
        "model": str(folder),
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": parameters,
        "seed": 0,
        "resume_adapter_file": None,
    }
    save_config(settings, adapter / "adapter_config.json")
    model = pyloss.tuner.load_adapters(pyloss.load_model(folder), adapter)
    assert len(adapter_modules(model)) == (7 if keys is None else 3)
    np.testing.assert_allclose(our_logits(model, IDS), mlx_logits(theirs, IDS), rtol=0, atol=1e-4)
    pyloss.save_adapter(model, tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_parameters"]
        == parameters
    )
    np.testing.assert_allclose(
        mlx_logits(load_mlx(mlx_lm, folder, tmp_path / "again"), IDS),
        mlx_logits(theirs, IDS),
        rtol=0,
        atol=0,
    )


# ---- DoRA and embeddings


def tied_folder(tmp_path):
    place = tmp_path / "tied"
    make_tiny().save_pretrained(place)
    return place


def put_adapter(folder, kind, keys, num_layers=1, seed=0):
    """A filled adapter of a kind; magnitudes are drawn around their initial norms."""
    model = pyloss.load_model(folder)
    pyloss.tuner.linear_to_lora_layers(
        model, num_layers, {"rank": 3, "scale": 1.7, "keys": keys}, use_dora=kind == "dora"
    )
    rng = np.random.default_rng(seed)
    for name, array in model.trainable_parameters().items():
        if name.endswith(".m"):
            array *= rng.uniform(0.5, 1.5, array.shape).astype(np.float32)
        else:
            array[...] = rng.normal(0, 0.3, array.shape)
    return model


EMBEDDING = "model.embed_tokens"


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize(
    "keys", [KEYS, [EMBEDDING], [*KEYS, EMBEDDING]], ids=["layers", "embedding", "both"]
)
def test_mlx_lm_does_what_our_adapters_do(mlx_lm, folder, tmp_path, kind, tied, keys):
    base = tied_folder(tmp_path) if tied else folder
    keys = keys if tied or keys == KEYS else [*keys, "lm_head"]
    model = put_adapter(base, kind, keys)
    logits = our_logits(model, IDS)
    pyloss.save_adapter(model, tmp_path / "mlx")
    theirs = load_mlx(mlx_lm, base, tmp_path / "mlx")
    np.testing.assert_allclose(mlx_logits(theirs, IDS), logits, rtol=0, atol=2e-4)
    again = pyloss.tuner.load_adapters(pyloss.load_model(base), tmp_path / "mlx")
    np.testing.assert_array_equal(our_logits(again, IDS), logits)
    again.fuse().save(tmp_path / "fused")
    np.testing.assert_allclose(our_logits(again, IDS), logits, rtol=0, atol=2e-4)
    np.testing.assert_allclose(
        torch_logits(torch_model(tmp_path / "fused"), IDS), logits, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("dora", KEYS),
        ("dora", [*KEYS, "lm_head"]),
        ("lora", [EMBEDDING]),
        ("lora", [*KEYS, EMBEDDING, "lm_head"]),
    ],
    ids=["dora", "dora head", "embedding", "all"],
)
def test_peft_does_what_our_adapters_do(peft, folder, tmp_path, kind, keys):
    model = put_adapter(folder, kind, keys)
    pyloss.save_adapter(model, tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "peft")
    np.testing.assert_allclose(torch_logits(theirs, IDS), our_logits(model, IDS), rtol=0, atol=2e-4)
    again = pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "peft")
    np.testing.assert_array_equal(our_logits(again, IDS), our_logits(model, IDS))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": list(LINEARS), "use_dora": True},
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_dora": True,
            "rank_pattern": {"up_proj": 6},
            "use_rslora": True,
        },
        {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3},
        {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 5}},
    ],
    ids=["dora", "dora ranks", "embedding", "embedding and head"],
)
def test_dora_and_embeddings_of_peft_load_here_and_go_on(peft, mlx_lm, folder, tmp_path, options):
    theirs = peft.get_peft_model(
        torch_model(folder), peft.LoraConfig(**{"r": 4, "lora_alpha": 10, **options})
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif "lora" in name:
                parameter.normal_(0, 0.3, generator=generator)
    check_the_way_round(peft, mlx_lm, folder, tmp_path, theirs, 2e-4)


def test_a_tied_embedding_and_peft(peft, tmp_path):
    """PEFT adapts a tied head only on request; in pyloss and mlx-lm it is one with the table.

    `test_companions_parity.py` has what PEFT does without the request.
    """
    base = tied_folder(tmp_path)
    model = put_adapter(base, "lora", [EMBEDDING, "mlp.up_proj"])
    pyloss.save_adapter(model, tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft")
    np.testing.assert_allclose(torch_logits(theirs, IDS), our_logits(model, IDS), rtol=0, atol=2e-4)
    options = {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    theirs = peft.get_peft_model(
        torch_model(base), peft.LoraConfig(**options, ensure_weight_tying=True)
    ).eval()
    fill_adapter(theirs)
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.lora_embedding_A["default"].normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = pyloss.tuner.load_adapters(pyloss.load_model(base), tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(model, IDS), torch_logits(theirs, IDS), rtol=0, atol=2e-4)


def test_dora_of_an_embedding_is_another_thing_in_peft(peft, folder, tmp_path):
    with pytest.raises(
        ValueError, match="model.embed_tokens: PEFT's DoRA of an embedding scales columns"
    ):
        pyloss.save_adapter(
            put_adapter(folder, "dora", [EMBEDDING]), tmp_path / "ours", format="peft"
        )
    theirs = peft.get_peft_model(
        torch_model(folder), peft.LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        ValueError, match="model.embed_tokens: PEFT's DoRA of an embedding scales columns"
    ):
        pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "theirs")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_fused_tiny_model_elsewhere(mlx_lm, tmp_path, stored):
    """Biases, a separate head, adapters over some layers; fusing rounds to the base's bfloat16."""
    base = tmp_path / "base"
    make_tiny(tie_word_embeddings=False, attention_bias=True, mlp_bias=True).to(
        getattr(torch, stored)
    ).save_pretrained(base)
    model = add_adapter(pyloss.load_model(base), keys=[*KEYS, "lm_head"], num_layers=1, size=0.3)
    before = our_logits(model, IDS)
    model.fuse().save(tmp_path / "fused")
    fused = our_logits(model, IDS)
    np.testing.assert_allclose(fused, before, rtol=0, atol=1e-4 if stored == "float32" else 0.2)
    np.testing.assert_allclose(
        torch_logits(torch_model(tmp_path / "fused"), IDS), fused, rtol=0, atol=1e-4
    )
    # mlx-lm computes in the type of the weights.
    theirs = mlx_logits(load_mlx(mlx_lm, tmp_path / "fused"), IDS)
    np.testing.assert_allclose(theirs, fused, rtol=0, atol=1e-4 if stored == "float32" else 0.6)


# ---- mlx-lm's loss


def losses(mlx_lm, folder, batch, lengths, their_lengths=None):
    """(our loss, our number of tokens, mlx-lm's loss, its number of tokens)."""
    import mlx.core as mx
    from mlx_lm.tuner.trainer import default_loss

    value, count = pyloss.tuner.default_loss(pyloss.load_model(folder), batch, lengths)
    lengths = lengths if their_lengths is None else their_lengths
    theirs, their_count = default_loss(load_mlx(mlx_lm, folder), mx.array(batch), mx.array(lengths))
    return float(value), count, theirs.item(), their_count.item()


def test_mlx_loss(mlx_lm, folder):
    """Rows as long as the batch, with and without a masked prompt, so nothing is padding."""
    batch = IDS[:48].reshape(2, 24).astype(np.int32)
    lengths = np.array([[0, 24], [9, 24]], np.int32)
    ours, count, theirs, their_count = losses(mlx_lm, folder, batch, lengths)
    assert count == their_count == 23 + 15
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_mlx_loss_ends_one_token_late(mlx_lm, folder):
    """In a padded row mlx-lm also trains on the first padding token; pyloss does not."""
    batch = np.zeros((2, 24), np.int32)
    batch[0], batch[1, :11] = IDS[:24], IDS[24:35]
    lengths = np.array([[0, 24], [4, 11]], np.int32)
    ours, count, theirs, their_count = losses(mlx_lm, folder, batch, lengths)
    assert (count, their_count) == (23 + 7, 23 + 8)
    assert abs(ours - theirs) > 1e-3
    # With one token less per row mlx-lm agrees, so that token is the whole difference.
    ours, count, theirs, their_count = losses(mlx_lm, folder, batch, lengths, lengths - [0, 1])
    assert count == their_count == 30
    assert ours == pytest.approx(theirs, rel=1e-5)
