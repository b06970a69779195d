"""mlx_lm.models.cache beside pyloss's: calls with a cache, going back, copies, files."""

import copy

import numpy as np
import pytest
from mlx_sides import Side, compare, refused, sides

IDS = np.random.default_rng(3).integers(5, 250, 40).tolist()


def model_of(side, folder):
    return side().load(str(folder / "base"))[0]


def logits(side, model, ids, cache=None):
    return np.array(model(side.mx.array([ids]), cache=cache), np.float32)


def test_logits_by_parts(made):
    """A prompt read by parts gives the logits of the whole."""

    def case(side):
        model = model_of(side, made)
        cache = side("models.cache").make_prompt_cache(model)
        parts = [
            logits(side, model, part, cache) for part in (IDS[:7], IDS[7:8], IDS[8:30], IDS[30:])
        ]
        return np.concatenate(parts, axis=1), [c.offset for c in cache]

    found, offsets = compare(case, atol=2e-4)
    assert offsets == [40] * 3
    for side in sides():
        np.testing.assert_allclose(logits(side, model_of(side, made), IDS), found, atol=2e-4)


def test_several_sequences(made):
    def case(side):
        model, mx = model_of(side, made), side.mx
        cache = side("models.cache").make_prompt_cache(model)
        rows = np.array([IDS[:12], IDS[12:24]])
        first = np.array(model(mx.array(rows[:, :8]), cache=cache))
        second = np.array(model(mx.array(rows[:, 8:]), cache=cache))
        return first, second, cache[0].offset, cache[0].keys_and_values()[0].shape

    compare(case, atol=2e-4)


def test_keys_and_values(made):
    def case(side):
        model = model_of(side, made)
        cache = side("models.cache").make_prompt_cache(model)
        logits(side, model, IDS[:9], cache)
        return [[np.array(part)[..., :9, :] for part in c.state[:2]] for c in cache]

    compare(case, atol=2e-4)


@pytest.mark.parametrize("dropped", [1, 5, 100])
def test_going_back(made, dropped):
    def case(side):
        caches, model = side("models.cache"), model_of(side, made)
        cache = caches.make_prompt_cache(model)
        logits(side, model, IDS[:20], cache)
        can = caches.can_trim_prompt_cache(cache)
        number = caches.trim_prompt_cache(cache, dropped)
        return can, number, [c.offset for c in cache], logits(side, model, IDS[20:26], cache)

    compare(case, atol=2e-4)


def test_an_empty_cache(made):
    def case(side):
        caches = side("models.cache")
        cache = caches.make_prompt_cache(model_of(side, made))
        return (
            len(cache),
            caches.trim_prompt_cache(cache, 7),
            caches.trim_prompt_cache([], 1),
            cache[0].size(),
            cache[0].empty(),
        )

    compare(case)


def test_copies_go_their_own_way(made):
    def case(side):
        model = model_of(side, made)
        cache = side("models.cache").make_prompt_cache(model)
        logits(side, model, IDS[:10], cache)
        twin = copy.deepcopy(cache)
        first = logits(side, model, IDS[10:14], cache)
        second = logits(side, model, IDS[14:20], twin)
        return first, second, cache[0].offset, twin[0].offset

    compare(case, atol=2e-4)


def test_a_file_of_a_cache(made, tmp_path):
    def case(side):
        caches, model = side("models.cache"), model_of(side, made)
        cache = caches.make_prompt_cache(model)
        logits(side, model, IDS[:10], cache)
        file = str(tmp_path / f"{side.own}.safetensors")
        caches.save_prompt_cache(file, cache, {"model": "tiny", "note": "a"})
        again, told = caches.load_prompt_cache(file, return_metadata=True)
        kinds = [type(c).__name__ for c in again]
        return told, kinds, again[0].offset, logits(side, model, IDS[10:15], again)

    assert compare(case, atol=2e-4)[0] == {"model": "tiny", "note": "a"}


@pytest.mark.parametrize("writes", [0, 1])
def test_files_of_the_other_library(made, tmp_path, writes):
    """A cache that one library wrote goes on in the other."""
    both, file = sides(), str(tmp_path / "cache.safetensors")
    writer, reader = both[writes], both[1 - writes]
    model = model_of(writer, made)
    cache = writer("models.cache").make_prompt_cache(model)
    logits(writer, model, IDS[:10], cache)
    writer("models.cache").save_prompt_cache(file, cache)
    wanted = logits(writer, model, IDS[10:15], cache)
    again = reader("models.cache").load_prompt_cache(file)
    np.testing.assert_allclose(
        logits(reader, model_of(reader, made), IDS[10:15], again), wanted, atol=2e-4
    )


def test_arrays_without_a_model():
    """`KVCache` alone, as layers of one's own use it."""

    def case(side):
        mx, rng = side.mx, np.random.default_rng(0)
        cache, found = side("models.cache").KVCache(), []
        for n in (10, 1, 3):
            part = mx.array(rng.standard_normal((1, 2, n, 4)).astype(np.float32))
            keys, values = cache.update_and_fetch(part, part * 2)
            found += [np.array(keys), np.array(values), cache.offset]
        number = cache.trim(4)
        keys, _ = cache.update_and_fetch(part, part)
        return found, number, np.array(keys), cache.size(), cache.empty(), cache.is_trimmable()

    compare(case)


@pytest.mark.parametrize("cls", ["KVCache", "ConcatenateKVCache"])
def test_states(cls):
    def case(side):
        mx = side.mx
        kind = getattr(side("models.cache"), cls)
        part = mx.array(np.random.default_rng(0).standard_normal((1, 2, 6, 4)).astype(np.float32))
        cache = kind()
        cache.update_and_fetch(part, part)
        again = kind.from_state(cache.state)
        return again.offset, np.array(again.update_and_fetch(part, part)[0])

    compare(case)


def test_bounded_caches(made):
    """At most so many tokens: the first 4, and the last ones."""

    def case(side):
        model = model_of(side, made)
        # mlx-lm ignores max_kv_size for models that make their caches, such as Llama.
        kind = side("models.cache").RotatingKVCache
        cache = [kind(max_size=16, keep=4) for _ in model.layers]
        found = [logits(side, model, IDS[:12], cache)]
        found += [logits(side, model, IDS[i : i + 1], cache) for i in range(12, 30)]
        return [f[:, -1] for f in found], cache[0].offset, cache[0].size(), cache[0].is_trimmable()

    assert compare(case, atol=3e-4)[1:] == [30, 16, False]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("as_array", [False, True])
def test_masks(window, tokens, as_array):
    def case(side):
        make = side("models.cache").create_attention_mask
        found = make(tokens, 5, as_array, window)
        return found if found is None or isinstance(found, str) else np.array(found)

    compare(case)


def test_a_cache_of_another_model(made):
    """pyloss alone: mlx-lm indexes past its list, or ignores the rest."""
    side = Side(True)
    model = model_of(side, made)
    cache = side("models.cache").make_prompt_cache(model)[:2]
    assert refused(lambda: logits(side, model, IDS[:3], cache), ValueError) == "ValueError"
    cache = side("models.cache").make_prompt_cache(model)
    logits(side, model, IDS[:3], cache)
    with pytest.raises(ValueError, match="one cache for each batch"):
        model(side.mx.array([IDS[:2], IDS[:2]]), cache=cache)
    cache[0].trim(1)
    with pytest.raises(ValueError, match="different lengths"):
        logits(side, model, IDS[:3], cache)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_masks_of_bounded_caches(tokens, as_array, window):
    def case(side):
        mx = side.mx
        cache = side("models.cache").RotatingKVCache(max_size=8)
        found = []
        for n in (4, 3):
            mask = cache.make_mask(tokens, window_size=window, return_array=as_array)
            found.append(mask if mask is None or isinstance(mask, str) else np.array(mask))
            part = mx.zeros((1, 1, n, 2))
            cache.update_and_fetch(part, part)
        return found

    compare(case)
