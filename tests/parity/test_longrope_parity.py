"""Longrope on both sides of the original length, against transformers."""

import numpy as np
import pytest
from parity_models import (
    PHI3,
    longrope,
    make_tiny,
    our_logits,
    ragged,
    torch,
    torch_logits,
    torch_model,
)

import pyloss
from pyloss.generation.single import generate_tokens


def test_longrope_on_both_sides_of_the_original_length(tmp_path):
    """Each sequence of a batch has the factors for its own length, as when it is alone."""
    make_tiny(**longrope(32)).save_pretrained(tmp_path)
    theirs, ours = torch_model(tmp_path), pyloss.load_model(tmp_path)
    parts = ragged(ours.vocab_size, 7, 32, 33, 100, 1)
    offsets = np.cumsum([0] + [len(part) for part in parts]).astype(np.int32)
    packed = pyloss.autograd.data(ours.head(ours.hidden(np.concatenate(parts), offsets)))
    for i, part in enumerate(parts):
        expected = torch_logits(theirs, part)
        np.testing.assert_allclose(packed[offsets[i] : offsets[i + 1]], expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(our_logits(ours, part), expected, rtol=0, atol=1e-4)
    # both kinds of factors have an effect
    plain = make_tiny(**PHI3)
    for part in parts[1:4]:
        assert np.abs(torch_logits(theirs, part) - torch_logits(plain, part)).max() > 0.1


@pytest.mark.parametrize("chunks", [(1,) * 50, (20, 20, 1, 9), (31, 1, 1, 1), (32, 1), (10, 30, 4)])
def test_longrope_through_the_cache(tmp_path, chunks):
    """The token after the original length changes all earlier keys."""
    make_tiny(**longrope(32)).save_pretrained(tmp_path)
    theirs, ours = torch_model(tmp_path), pyloss.load_model(tmp_path)
    (ids,) = ragged(ours.vocab_size, sum(chunks))
    cache, done = ours.make_cache(), 0
    for n in chunks:
        logits = ours.step(ids[done : done + n], cache)
        done += n
        expected = torch_logits(theirs, ids[:done])[-1]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert cache.length == done


def test_longrope_generates_what_transformers_does(tmp_path):
    make_tiny(**longrope(32)).save_pretrained(tmp_path)
    theirs, ours = torch_model(tmp_path), pyloss.load_model(tmp_path)
    (ids,) = ragged(ours.vocab_size, 20)
    expected = theirs.generate(
        torch.tensor(ids[None], dtype=torch.long),
        do_sample=False,
        max_new_tokens=30,
        min_new_tokens=30,
        pad_token_id=0,
        eos_token_id=None,
    )[0, 20:].tolist()
    found = [token for token, _ in zip(generate_tokens(ours, ids), range(30), strict=False)]
    assert found == expected
