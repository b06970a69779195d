"""Prompt caches over pyloss's: models with windows and states, batches, bounds, files."""

import copy

import numpy as np
import pytest
import tiny

from pyloss.mlx_lm.arrays import seen_as_mlx
from pyloss.mlx_lm.models import cache as caches

IDS = np.random.default_rng(1).integers(1, 29, 24).astype(np.int32)


def model_of(tmp_path, name="llama"):
    options = tiny.FAMILIES.get(name, {})
    return seen_as_mlx(tiny.load_tiny(tmp_path / name, **options))


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo3", "granite", "smollm3"])
def test_parts_of_a_prompt(tmp_path, family):
    model = model_of(tmp_path, family)
    whole = np.asarray(model(IDS[None]))
    cache = caches.make_prompt_cache(model)
    parts = [np.asarray(model(IDS[None, a:b], cache=cache)) for a, b in ((0, 9), (9, 10), (10, 24))]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-4)


def test_going_back_where_it_cannot(tmp_path):
    """Rows before a window are gone."""
    model = model_of(tmp_path, "phi3")
    cache = caches.make_prompt_cache(model)
    for part in np.split(IDS, 6):
        model(part[None], cache=cache)
    for _ in range(200):
        model(IDS[None, :1], cache=cache)
    caches.trim_prompt_cache(cache, 220)
    with pytest.raises(ValueError, match="cannot go back"):
        model(IDS[None, :2], cache=cache)


def test_batches(tmp_path):
    model = model_of(tmp_path)
    rows = IDS.reshape(2, 12)
    whole = np.asarray(model(rows))
    cache = caches.make_prompt_cache(model)
    first = np.asarray(model(rows[:, :5], cache=cache))
    twin = copy.deepcopy(cache)
    for each in (cache, twin):
        second = np.asarray(model(rows[:, 5:], cache=each))
        np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-4)


def test_a_bounded_cache_is_one_with_fewer_rows(tmp_path):
    model = model_of(tmp_path)
    cache = caches.make_prompt_cache(model, max_kv_size=10)
    logits = np.asarray(model(IDS[None], cache=cache))
    assert np.isfinite(logits).all() and cache[0].offset == 24 and cache[0].keys.shape[2] == 10
    again = [caches.RotatingKVCache.from_state(c.state) for c in cache]
    np.testing.assert_allclose(
        np.asarray(model(IDS[None, :1], cache=again)),
        np.asarray(model(IDS[None, :1], cache=cache)),
        atol=1e-4,
    )


def test_bounds_need_layers_that_see_all_tokens(tmp_path):
    model = model_of(tmp_path, "olmo3")
    cache = caches.make_prompt_cache(model, max_kv_size=10)
    with pytest.raises(ValueError, match="only where all layers attend to all tokens"):
        model(IDS[None], cache=cache)


def test_files(tmp_path):
    model = model_of(tmp_path)
    cache = caches.make_prompt_cache(model)
    model(IDS[None, :9], cache=cache)
    caches.save_prompt_cache(tmp_path / "c.safetensors", cache, {"a": "b"})
    again, told = caches.load_prompt_cache(tmp_path / "c.safetensors", return_metadata=True)
    assert told == {"a": "b"}
    np.testing.assert_allclose(
        np.asarray(model(IDS[None, 9:], cache=again)),
        np.asarray(model(IDS[None, 9:], cache=cache)),
        atol=1e-4,
    )


def test_other_arguments_of_a_call(tmp_path):
    model = model_of(tmp_path)
    with pytest.raises(TypeError, match="takes token ids and a cache, not input_embeddings"):
        model(IDS[None], input_embeddings=np.zeros((1, 24, 32)))
