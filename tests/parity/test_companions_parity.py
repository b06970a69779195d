"""What PEFT trains beside LoRA, in both directions: whole modules, biases, tokens, new rows.

Also adapters over one use of a tied table, and ranks above a layer's size.
"""

import numpy as np
import pytest
from parity_models import TINY, make_tiny, our_logits, torch, torch_logits, torch_loss, torch_model

import pyloss
from pyloss.tuner.adapters.adapter import adapter_modules

peft = pytest.importorskip("peft", reason="compares with PEFT (parity extra)")

IDS = np.random.default_rng(0).integers(0, TINY["vocab_size"], 50)
ROWS = TINY["vocab_size"] + 4
#: By name: whether the head is tied, the rows of the tables, the settings, those of saving.
CASES = {
    "embedding and head": (False, None, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "head": (False, None, {"modules_to_save": ["lm_head"]}, {}),
    "norms": (False, None, {"modules_to_save": ["norm"]}, {}),
    "a layer with a bias": (False, None, {"modules_to_save": ["k_proj"]}, {}),
    "a block": (False, None, {"modules_to_save": ["mlp"]}, {}),
    "both tied copies": (True, None, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "one tied copy": (True, None, {"modules_to_save": ["embed_tokens"]}, {}),
    "tied": (True, None, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}),
    "bias": (False, None, {"bias": "lora_only"}, {}),
    "all biases": (False, None, {"bias": "all"}, {}),
    "tokens": (False, None, {"trainable_token_indices": [7, 3, 250]}, {}),
    "tokens tied": (True, None, {"trainable_token_indices": [7, 3, 250]}, {}),
    "tokens of both": (
        False,
        None,
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [8]}},
        {},
    ),
    "new rows": (False, ROWS, {}, {}),
    "new rows tied": (True, ROWS, {}, {}),
    "new tokens": (False, ROWS, {"trainable_token_indices": [ROWS - 2, ROWS - 1]}, {}),
    "new tokens tied": (True, ROWS, {"trainable_token_indices": [ROWS - 2, ROWS - 1]}, {}),
    "new rows under LoRA": (True, ROWS, {"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "saved tables": (False, None, {}, {"save_embedding_layers": True}),
    "LoRA over the embedding": (True, None, {"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "LoRA over the head": (True, None, {"target_modules": ["q_proj", "lm_head"]}, {}),
    "a large rank": (False, None, {"r": 150}, {}),
}
LEARNING_RATE, DECAY = 5e-3, 0.1


def base(folder, tied, rows):
    """A model in transformers, of the folder, with `rows` rows; new ones are random."""
    model = torch_model(folder)
    if rows is not None:
        torch.manual_seed(1)
        model.resize_token_embeddings(rows)
    return model


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request, tmp_path):
    """(folder of the base, folder of an adapter, the PEFT model that wrote it, the case)"""
    tied, rows, settings, saving = CASES[request.param]
    make_tiny(family="Qwen2", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = base(tmp_path / "base", tied, rows)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | settings
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "embedding_A" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter", **saving)
    return tmp_path / "base", tmp_path / "adapter", theirs.eval(), CASES[request.param]


def assert_same(ours, theirs, tolerance=1e-5):
    size = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * size)


def batches(rows):
    rng = np.random.default_rng(3)
    for _ in range(5):
        batch = rng.integers(0, rows, (2, 24)).astype(np.int32)
        batch[:, 3] = rows - 1
        yield batch, np.ones(batch.shape, np.float32)


def test_read_trained_and_written(case, tmp_path):
    place, adapter, theirs, (tied, rows, _, saving) = case
    ids = np.append(IDS, [(rows or TINY["vocab_size"]) - 1, 3])
    plain = our_logits(pyloss.models.load_model(place), IDS)
    model = pyloss.models.load_model(place)
    pyloss.tuner.load_adapters(model, adapter)
    logits = torch_logits(theirs, ids)
    assert_same(our_logits(model, ids), logits)
    assert saving or rows or np.abs(logits[: len(IDS), : plain.shape[1]] - plain).max() > 1e-2
    # Some updates of both.
    optimizer = pyloss.optim.AdamW(LEARNING_RATE, weight_decay=DECAY)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    assert sum(a.size for a in model.trainable_parameters().values()) == count
    other = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=DECAY)
    step = pyloss.nn.value_and_grad(model, pyloss.tuner.default_loss)
    for batch, weights in batches(rows or TINY["vocab_size"]):
        (loss, _), grads = step(model, batch, weights)
        optimizer.update(model, grads)
        other.zero_grad()
        reference = torch_loss(theirs, batch, weights)
        reference.backward()
        other.step()
        assert float(loss) == pytest.approx(float(reference), rel=1e-4)
    trained_logits = our_logits(model, ids)
    assert_same(trained_logits, torch_logits(theirs, ids), 2e-3)
    # Written here, read by PEFT, and read again here from both layouts.
    pyloss.save_adapter(model, tmp_path / "peft", format="peft", base_model=str(place))
    reread = peft.PeftModel.from_pretrained(base(place, tied, rows), tmp_path / "peft").eval()
    assert_same(torch_logits(reread, ids), trained_logits)
    for format in ("peft", "mlx"):
        pyloss.save_adapter(model, tmp_path / format, format=format, overwrite=True)
        again = pyloss.models.load_model(place)
        pyloss.tuner.load_adapters(again, tmp_path / format)
        assert_same(our_logits(again, ids), trained_logits, 2e-6)
        trainable = {name: a.shape for name, a in again.trainable_parameters().items()}
        assert trainable == {name: a.shape for name, a in model.trainable_parameters().items()}
    # Without the adapters, the base's logits; with them fused, the adapted ones.
    pyloss.tuner.utils.remove_lora_layers(again)
    if rows is None and not saving:
        np.testing.assert_array_equal(our_logits(again, IDS), plain)
    model.fuse().save(tmp_path / "fused")
    assert not adapter_modules(model)
    assert_same(our_logits(model, ids), trained_logits)
    assert_same(our_logits(pyloss.models.load_model(tmp_path / "fused"), ids), trained_logits)
    assert_same(torch_logits(torch_model(tmp_path / "fused"), ids), trained_logits)
