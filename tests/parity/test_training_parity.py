"""Training steps against PEFT and torch.optim from the same adapter and the same batches."""

import numpy as np
import pytest
from parity_models import (
    GEMMA2,
    GEMMA4,
    GEMMA4_EXPERTS,
    GRANITE,
    GRANITE4,
    GRANITE4_MAMBA,
    LFM2,
    MINISTRAL3,
    MIXTURES,
    OLMO2,
    OLMO3,
    PHI3,
    PHI4,
    QWEN3_5,
    SMOLLM3,
    TINY,
    add_adapter,
    make_tiny,
    peft_matrices,
    peft_twin,
    relative,
    torch,
    torch_loss,
    torch_model,
)

import pyloss
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.losses import target_weights

STEPS = 20
RATE, DECAY = 5e-4, 0.1
TEXT = (
    "The old harbour lies between two hills, and in the evening the boats come home with nets full of silver fish. "
    "def area(width, height):\n    '''The area of a rectangle.'''\n    return width * height\n"
    "Wasser gefriert bei null Grad Celsius; les oiseaux chantent avant la pluie, 3 x 7 = 21 and 6 x 7 = 42. "
)


def make_batches(tokens, count, seed=0):
    """Yield `(batch, lengths)`: two padded rows of 20 to 40 tokens.

    Every third batch trains only on the ends of the rows.
    """
    rng = np.random.default_rng(seed)
    for step in range(count):
        sizes = rng.integers(20, 41, 2)
        batch = np.zeros((2, sizes.max() + 3), np.int32)
        for row, n in zip(batch, sizes, strict=True):
            begin = rng.integers(0, len(tokens) - n)
            row[:n] = tokens[begin : begin + n]
        first = rng.integers(5, 15, 2) if step % 3 == 2 else np.zeros(2, int)
        yield batch, np.stack([first, sizes], axis=1).astype(np.int32)


def begin_adapter(model, **options):
    """An adapter in its initial state: lora_b is zero."""
    return add_adapter(model, size=0.0, **options)


def train_ours(model, batches, **options):
    optimizer = pyloss.optim.AdamW(RATE, weight_decay=DECAY, **options)
    step = pyloss.nn.value_and_grad(model, pyloss.tuner.default_loss)
    losses = []
    for batch, lengths in batches:
        (loss, _), grads = step(model, batch, lengths)
        optimizer.update(model, grads)
        losses.append(float(loss))
    return losses


def train_peft(model, batches):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=DECAY
    )
    losses = []
    for batch, lengths in batches:
        loss = torch_loss(model, batch, target_weights(batch, lengths))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare_changes(ours, before, theirs):
    """Compare the changes of training as a whole; `theirs` are torch's parameters by our names."""
    after = ours.trainable_parameters()
    changes = [
        np.concatenate([(end[n] - before[n]).ravel() for n in before])
        for end in (after, {n: theirs[n] for n in before})
    ]
    return relative(*changes)


@pytest.mark.parametrize(
    ("use_dora", "tolerance"), [(False, 2e-4), (True, 1e-3)], ids=["LoRA", "DoRA"]
)
def test_losses_of_twenty_steps(smollm2_gguf, smollm2_folder, use_dora, tolerance):
    """Q4_1 weights in pyloss, the same weights in float32 in torch.

    Without weight decay, losses would differ by 1e-3.
    """
    ours, tokenizer = pyloss.load(smollm2_gguf)
    begin_adapter(ours, use_dora=use_dora)
    base = torch_model(smollm2_folder)
    theirs = peft_twin(ours, base)
    before = {name: array.copy() for name, array in ours.trainable_parameters().items()}
    batches = list(make_batches(tokenizer.encode(TEXT), STEPS))
    found, expected = train_ours(ours, batches), train_peft(theirs, batches)
    np.testing.assert_allclose(found, expected, rtol=tolerance)
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])  # the steps had an effect
    # Adam divides by the gradient's own size, so rounding may turn small elements. Compare the
    # change as a whole.
    assert (
        compare_changes(
            ours, before, {name: p.detach().numpy().T for name, p in peft_matrices(theirs).items()}
        )
        < 10 * tolerance
    )


def test_checkpointing_changes_no_bit(smollm2_gguf):
    runs = []
    for on in (False, True):
        model, tokenizer = pyloss.load(smollm2_gguf)
        begin_adapter(model)
        model.set_grad_checkpoint(on)
        losses = train_ours(model, make_batches(tokenizer.encode(TEXT), 3))
        runs.append((losses, model.trainable_parameters()))
    assert runs[0][0] == runs[1][0]
    for name, array in runs[0][1].items():
        np.testing.assert_array_equal(array, runs[1][1][name], err_msg=name)


FAMILIES = {
    "gemma4": GEMMA4,
    "gemma2": GEMMA2,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
    "granite 4": GRANITE4,
    "granite 4 with a mamba layer": GRANITE4_MAMBA,
    "ministral3": MINISTRAL3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "lfm2": {**LFM2, "conv_bias": True},
    "qwen3_5": QWEN3_5,
    "phi3": PHI3,
    "phi4": PHI4,
    "granitemoeshared": MIXTURES["granitemoeshared"],
    "lfm2_moe": MIXTURES["lfm2_moe"],
    "qwen2_moe": MIXTURES["qwen2_moe"],
    "qwen3_5_moe": MIXTURES["qwen3_5_moe"],
    "qwen3_next": MIXTURES["qwen3_next"],
    "gemma4 with experts": GEMMA4_EXPERTS,
}
# In transformers, experts and routers are no layers that PEFT could adapt.
KEYS = {
    "granitemoeshared": [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"shared_mlp.{name}_linear" for name in ("input", "output")),
    ],
    "lfm2_moe": [
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *(f"conv.{name}_proj" for name in ("in", "out")),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    ],
    "qwen2_moe": [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
        "mlp.shared_expert_gate",
    ],
}
KEYS["gemma4 with experts"] = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "router.proj",
]
for name, parts in {
    "qwen3_5_moe": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    "qwen3_next": ("in_proj_qkvz", "in_proj_ba", "out_proj"),
}.items():
    KEYS[name] = KEYS["qwen2_moe"] + [f"linear_attn.{part}" for part in parts]
# PEFT takes the shared expert's matrices in this family for those of all experts.
KEYS["qwen3_next"] = [key for key in KEYS["qwen3_next"] if ".shared_expert." not in key]


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_of_families(tmp_path, name):
    """LoRA over all linear layers."""
    make_tiny(**FAMILIES[name]).save_pretrained(tmp_path)
    ours = begin_adapter(pyloss.load_model(tmp_path), rank=4, keys=KEYS.get(name))
    theirs = peft_twin(ours, torch_model(tmp_path))
    before = {name: array.copy() for name, array in ours.trainable_parameters().items()}
    tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], 60)
    batches = list(make_batches(tokens, STEPS))
    found, expected = train_ours(ours, batches), train_peft(theirs, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    after = {name: p.detach().numpy().T for name, p in peft_matrices(theirs).items()}
    assert compare_changes(ours, before, after) < 2e-3


@pytest.fixture
def tiny(tmp_path):
    """(our model, the same in PEFT, token ids), with an initial adapter."""
    make_tiny(attention_bias=True).save_pretrained(tmp_path)
    ours = begin_adapter(pyloss.load_model(tmp_path), rank=4)
    base = torch_model(tmp_path)
    return ours, peft_twin(ours, base), np.random.default_rng(0).integers(0, TINY["vocab_size"], 60)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_float_weights(tiny, checkpointing):
    ours, theirs, tokens = tiny
    ours.set_grad_checkpoint(checkpointing)
    rng = np.random.default_rng(3)
    batches = []
    for batch, lengths in make_batches(tokens, STEPS):
        weights = rng.choice(np.array([0.0, 0.25, 1.0, 3.0], np.float32), batch.shape)
        weights[np.arange(batch.shape[1]) >= lengths[:, 1:]] = 0
        batches.append((batch, weights))
    np.testing.assert_allclose(train_ours(ours, batches), train_peft(theirs, batches), rtol=1e-4)


@pytest.mark.parametrize(
    "keys", [None, ["self_attn", "mlp.down_proj", "model.embed_tokens", "model.norm"]]
)
def test_full_fine_tuning(tmp_path, keys):
    """The whole last layer, norms and biases included, or parts and a tied embedding."""
    make_tiny(attention_bias=True).save_pretrained(tmp_path)
    ours = pyloss.load_model(tmp_path)
    pyloss.tuner.unfreeze_layers(ours, 1, keys)
    theirs = torch_model(tmp_path)
    trained = dict(theirs.named_parameters())
    assert set(ours.trainable_parameters()) <= set(trained)
    for name, parameter in trained.items():
        parameter.requires_grad_(name in ours.trainable_parameters())
    before = {name: array.copy() for name, array in ours.trainable_parameters().items()}
    batches = list(
        make_batches(np.random.default_rng(0).integers(0, TINY["vocab_size"], 60), STEPS)
    )
    found, expected = train_ours(ours, batches), train_peft(theirs, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])
    assert (
        compare_changes(
            ours, before, {name: parameter.detach().numpy() for name, parameter in trained.items()}
        )
        < 5e-3
    )


def test_pissa(tmp_path):
    """PEFT subtracts the principal part from the base, pyloss in the adapter.

    The signs of singular vectors may differ.
    """
    peft = pytest.importorskip("peft", reason="compares with PEFT (parity extra)")
    make_tiny().save_pretrained(tmp_path)
    ours = pyloss.load_model(tmp_path)
    pyloss.tuner.linear_to_lora_layers(ours, -1, {"rank": 8, "scale": 2.0, "init": "pissa"})
    base = torch_model(tmp_path)
    targets = sorted(adapter_modules(ours))
    config = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, init_lora_weights="pissa"
    )
    theirs = peft.get_peft_model(base, config)
    matrices = peft_matrices(theirs)
    for name in targets:
        products = [
            (m[f"{name}.lora_a"] @ m[f"{name}.lora_b"])
            for m in (
                ours.trainable_parameters(),
                {n: p.detach().numpy().T for n, p in matrices.items()},
            )
        ]
        assert relative(*products) < 0.05, name
    batches = list(
        make_batches(np.random.default_rng(0).integers(0, TINY["vocab_size"], 60), STEPS)
    )
    np.testing.assert_allclose(train_ours(ours, batches), train_peft(theirs, batches), rtol=2e-3)


def test_train_accumulates_as_one_larger_batch(tiny, tmp_path):
    """Two batches per update against torch on both together: every token has the same weight."""
    ours, theirs, tokens = tiny
    batches = list(make_batches(tokens, 2 * STEPS))
    args = pyloss.TrainingArgs(
        batch_size=2,
        iters=2 * STEPS,
        grad_accumulation_steps=2,
        adapter_file=tmp_path / "adapters.safetensors",
        seed=0,
        progress=False,
    )
    optimizer = pyloss.optim.AdamW(RATE, weight_decay=DECAY)
    pyloss.train(
        ours,
        optimizer,
        [None] * 8,
        args=args,
        iterate_batches=lambda *unused, **options: iter(batches),
    )
    assert optimizer.step == STEPS

    joined = []
    for (first, first_lengths), (second, second_lengths) in zip(
        batches[::2], batches[1::2], strict=True
    ):
        both = np.zeros((4, max(first.shape[1], second.shape[1])), np.int32)
        both[:2, : first.shape[1]], both[2:, : second.shape[1]] = first, second
        joined.append((both, np.concatenate([first_lengths, second_lengths])))
    train_peft(theirs, joined)
    matrices = peft_matrices(theirs)
    for name, array in ours.trainable_parameters().items():
        assert relative(array, matrices[name].detach().numpy().T) < 1e-3, name
