"""Checks of models with layers that mix tokens otherwise than attention: adapters, packed
sequences, checkpointing, the cache.
"""

import numpy as np

import pyloss
from pyloss.io.tensor_file import StoredTensor


def with_lora(net, rank):
    """The model with LoRA over all linear layers, whose `lora_b` is not 0."""
    config = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": None}
    pyloss.linear_to_lora_layers(net, -1, config)
    rng = np.random.default_rng(5)
    for name, array in net.trainable_parameters().items():
        if name.endswith("lora_b"):
            array[...] = rng.standard_normal(array.shape) / 8
    return net


def packed_as_alone(net, lengths, make, tolerance):
    """Packed sequences have the hidden states of each alone, and a mixer's operation their bits.

    `make(rows, rng)` returns the operation's arrays, and a function of them and of the offsets.
    """
    rng = np.random.default_rng(2)
    parts = [rng.integers(0, net.vocab_size, n).astype(np.int32) for n in lengths]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    packed = net.hidden(np.concatenate(parts), offsets)
    arrays, mix = make(len(packed), rng)
    mixed = mix(*arrays, offsets)
    for part, begin, end in zip(parts, offsets, offsets[1:], strict=False):
        bounds = np.array([0, len(part)], np.int32)
        alone = net.hidden(part, bounds)
        np.testing.assert_allclose(packed[begin:end], alone, rtol=1e-6, atol=tolerance)
        own = mix(*(array[begin:end] for array in arrays), bounds)
        np.testing.assert_array_equal(mixed[begin:end], own)


def same_when_checkpointed(net, length):
    """Gradients of an adapted model have the same bits with recomputed layers, and none is 0."""
    net.train()
    batch = np.random.default_rng(3).integers(0, net.vocab_size, (3, length)).astype(np.int32)
    lengths = np.array([[1, length], [7, 13], [1, 2]], np.int32)
    step = pyloss.nn.value_and_grad(net, pyloss.tuner.default_loss)
    (loss, _), grads = step(net, batch, lengths)
    net.set_grad_checkpoint(True)
    (again, _), others = step(net, batch, lengths)
    assert again == loss
    for name, grad in grads.items():
        np.testing.assert_array_equal(others[name], grad)
        assert grad.any(), name


def same_through_the_cache(net):
    """A long prompt gives the same logits at once, in parts, and one token at a time."""
    tokens = np.random.default_rng(4).integers(0, net.vocab_size, 300)
    want = net(tokens[None])[0]
    for sizes in ([1] * 300, [3, 1, 1, 200, 1, 1, 93], [299, 1]):
        cache, at = net.make_cache(), 0
        for n in sizes:
            got = net.step(tokens[at : at + n], cache)
            at += n
            np.testing.assert_allclose(got, want[at - 1], rtol=0, atol=5e-5)


def gguf_tensors():
    """The tensors that the configuration of a GGUF file of three layers needs."""
    names = ("token_embd.weight", *(f"blk.{i}.attn_norm.weight" for i in range(3)))
    raw = np.zeros(4 * 29 * 24, np.uint8)
    return {name: StoredTensor("m.gguf", name, "F32", (29, 24), raw) for name in names}
