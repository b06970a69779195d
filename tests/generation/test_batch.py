"""Answers in batches, against the same prompts one at a time."""

import functools
import threading

import numpy as np
import pytest
import tiny
from fake import END, SPECIALS, FakeTokenizer

import pyloss
from pyloss.generation import (
    BatchGenerator,
    SamplingParams,
    batch,
    batch_generate,
    generate,
    stream_generate,
)
from pyloss.models.conversion import quantize_model
from pyloss.runtime.precision import matmul_precision


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.load_tiny(tmp_path_factory.mktemp("tiny"), vocab_size=258)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return tiny.load_tiny(
        tmp_path_factory.mktemp("windowed"),
        vocab_size=258,
        model_type="mistral",
        sliding_window=24,
    )


def draw(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)).tolist() for _ in range(count)]


def alone(model, prompt, params):
    """Tokens, text and the reason of `stream_generate`."""
    steps = list(
        stream_generate(
            model,
            FakeTokenizer(),
            prompt,
            params.max_tokens,
            params.temperature,
            params.top_p,
            params.min_p,
            params.top_k,
            params.seed,
        )
    )
    return [s.token for s in steps], "".join(s.text for s in steps), steps[-1].finish_reason


def check_alone(model, prompts, params, batch_size):
    generator = BatchGenerator(model, FakeTokenizer(), batch_size)
    found = {done.index: done for done in generator.run(prompts, params)}
    assert sorted(found) == list(range(len(prompts)))
    for i, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        got = found[i]
        assert (got.tokens, got.text, got.finish_reason) == alone(model, prompt, own)
        assert got.prompt_tokens == len(prompt) and got.logprobs is None
    return generator.stats


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 8, 16, 17, 40])
def test_greedy_and_sampled_answers_are_those_of_one_at_a_time(model, batch_size):
    prompts = draw(20, 40)
    params = [
        SamplingParams(1 + 3 * (i % 8))
        if i % 2
        else SamplingParams(20, 1.2, (1.0, 0.9)[i % 4 // 2], top_k=(0, 40)[i % 3 == 0], seed=i)
        for i in range(20)
    ]
    stats = check_alone(model, prompts, params, batch_size)
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert 0 < stats.generation_tokens <= sum(p.max_tokens for p in params)
    assert stats.prompt_tps > 0 and stats.generation_tps > 0 and stats.cache_bytes > 0


@pytest.mark.parametrize("batch_size", [1, 6])
def test_windows(windowed, batch_size):
    check_alone(windowed, draw(8, 70, 1), [SamplingParams(60, 0.9, seed=4)] * 8, batch_size)


def test_adapters(tmp_path):
    model = tiny.load_tiny(tmp_path / "model", vocab_size=258)
    for kind in (False, True):
        pyloss.linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0}, use_dora=kind)
        for module in model.modules():
            if hasattr(module, "lora_b"):
                module.lora_b[...] = np.random.default_rng(5).standard_normal(module.lora_b.shape)
        model.eval()
        check_alone(model, draw(9, 20, 2), [SamplingParams(12)] * 9, 7)
        model.fuse()


@pytest.mark.parametrize("adapter", [False, True])
def test_products_in_int8(tmp_path, adapter):
    """Sums of int8 products do not depend on the number of rows either."""
    model = tiny.load_tiny(tmp_path / "model", vocab_size=258)
    quantize_model(model, "q4", group_size=32)
    if adapter:
        pyloss.linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0})
        for module in model.modules():
            if hasattr(module, "lora_b"):
                module.lora_b[...] = np.random.default_rng(5).standard_normal(module.lora_b.shape)
        model.eval()
    prompts, params = draw(9, 50, 2), [SamplingParams(12)] * 9
    exact = [alone(model, prompt, params[0])[0] for prompt in prompts]
    with matmul_precision("int8"):
        check_alone(model, prompts, params, 7)
        rounded = [alone(model, prompt, params[0])[0] for prompt in prompts]
    assert [alone(model, prompt, params[0])[0] for prompt in prompts] == exact
    assert rounded != exact  # nearly random weights: some tokens are close to others


def test_a_long_prompt_among_short_ones(model):
    prompts = [*draw(3, 9), np.random.default_rng(0).integers(0, 256, 1100).tolist()]
    check_alone(model, prompts, [SamplingParams(5)] * 4, 4)


def begun(model, tokens):
    cache = model.make_cache()
    if tokens:
        model.step(np.array(tokens, np.int32), cache)
    return cache


def rows_of(model, cache):
    return [np.array(part) for i in range(len(model.layers)) for part in cache.layer_rows(i)]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_prompts_go_on_after_caches(request, kind, batch_size):
    """Answers are those of the whole texts, and neither shared nor other caches change."""
    model = request.getfixturevalue(kind)
    prompts, first = draw(6, 30, 3), draw(3, 50, 4)
    held = [begun(model, tokens) for tokens in first]
    before = [rows_of(model, cache) for cache in held]
    whose = [0, 0, 1, None, 2, 0]
    generator = BatchGenerator(model, FakeTokenizer(), batch_size, caches=True)
    caches = [None if i is None else held[i] for i in whose]
    params = SamplingParams(12)
    found = {done.index: done for done in generator.run(prompts, params, caches)}
    for i, (prompt, own) in enumerate(zip(prompts, whose, strict=True)):
        whole = (first[own] if own is not None else []) + prompt
        tokens = found[i].tokens
        assert tokens == alone(model, whole, params)[0]
        assert found[i].prompt_tokens == len(prompt)
        kept, want = found[i].cache, begun(model, whole + tokens)
        assert kept.length == want.length == len(whole) + len(tokens)
        last = [23 if kind == "windowed" else None] * len(before[0])
        for got, rows, count in zip(rows_of(model, kept), rows_of(model, want), last, strict=True):
            count = min(count or len(rows), len(rows), len(got))
            np.testing.assert_allclose(got[-count:], rows[-count:], atol=2e-5)
        np.testing.assert_allclose(model.step([7], kept), model.step([7], want), atol=1e-4)
    for cache, rows in zip(held, before, strict=True):
        for got, want in zip(rows_of(model, cache), rows, strict=True):
            np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="6 prompts, but caches for 1"):
        generator.run(prompts, params, held[:1])


def test_functions_of_the_caller_are_called_in_order(model):
    """Not in threads: they draw and count."""
    names, threads = [], set()

    def sample(logits, name):
        names.append(name)
        threads.add(threading.get_ident())
        return 65

    params = [SamplingParams(4, sampler=functools.partial(sample, name=i)) for i in range(3)]
    batch_generate(model, FakeTokenizer(), draw(3, 9), params=params, return_logprobs=True)
    assert names == [0, 1, 2] * 4 and threads == {threading.get_ident()}


class Scripted:
    """A model that says tokens chosen beforehand, a script for each prompt's first token."""

    vocab_size = 258

    def __init__(self, scripts):
        self.scripts, self.places, self.most = scripts, {}, 0

    def _tokens(self, ids, ndim):
        return np.asarray(ids, np.int32)

    def cache_bytes(self, lengths):
        return sum(lengths)

    def make_batch_cache(self, slots):
        return self

    def enter(self, prompts):
        self.most = max(self.most, len(prompts))

    def release(self, slot):
        del self.places[slot]

    def read_each(self, prompts, cache, slots):
        for ids, slot in zip(prompts, slots, strict=True):
            self.places[slot] = iter(self.scripts[int(ids[0])])
        return np.stack([self._logits(slot) for slot in slots])

    def step_each(self, tokens, cache, slots):
        assert slots == sorted(self.places)
        return np.stack([self._logits(slot) for slot in slots])

    def _logits(self, slot):
        logits = np.zeros(258, np.float32)
        logits[next(self.places[slot])] = 1
        return logits


def scripted(texts, end=True):
    return Scripted([[*text.encode(), *([SPECIALS[END]] * 9 if end else [])] for text in texts])


TEXTS = ["one two three", "", "naïve — 漢字 🙂 done", "x", "two one"]


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_end_tokens_stop_texts_and_lengths(batch_size):
    def run(**options):
        generator = BatchGenerator(scripted(TEXTS), FakeTokenizer(), batch_size)
        done = sorted(
            generator.run([[i] for i in range(5)], SamplingParams(**options)), key=lambda d: d.index
        )
        return (
            [d.text for d in done],
            [d.finish_reason for d in done],
            [len(d.tokens) for d in done],
        )

    texts, reasons, lengths = run()
    assert texts == TEXTS and reasons == ["stop"] * 5
    assert lengths == [len(text.encode()) + 1 for text in TEXTS]
    texts, reasons, _ = run(max_tokens=4)
    assert texts == ["one ", "", "naï", "x", "two "]
    assert reasons == ["length", "stop", "length", "stop", "length"]
    texts, reasons, lengths = run(stop=["two", "漢", "zzz"])
    assert texts == ["one ", "", "naïve — ", "x", ""]
    assert reasons == ["stop"] * 5 and lengths[0] == 7 and lengths[4] == 3
    assert run(stop="e t")[0][0] == "on"


def test_sequences_leave_and_others_enter():
    model = scripted(["a" * n for n in (9, 1, 1, 1, 1, 1, 1, 9)])
    generator = BatchGenerator(model, FakeTokenizer(), 2)
    order = [d.index for d in generator.run([[i] for i in range(8)])]
    assert order == [1, 2, 3, 4, 5, 6, 0, 7] and model.most == 2
    assert generator.stats.generation_tokens == 24 + 8


def test_the_library_s_state_decides_without_a_seed(model):
    def run(seed):
        pyloss.random.seed(seed)
        return batch_generate(model, FakeTokenizer(), draw(4, 9), max_tokens=8, temperature=1.0)

    assert run(1).texts == run(1).texts != run(2).texts


def test_log_probabilities(model):
    prompts = draw(3, 9)
    found = batch_generate(
        model, FakeTokenizer(), prompts, max_tokens=6, temperature=0.7, seed=1,
        return_token_ids=True, return_logprobs=True,
    )  # fmt: skip
    for prompt, tokens, got in zip(prompts, found.token_ids, found.logprobs, strict=True):
        logits = model(np.array([prompt + tokens]))[0].astype(np.float64)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        want = [np.log(p[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_processors_and_samplers_see_their_own_sequence(model):
    seen = []

    def process(tokens, logits):
        seen.append(tokens.tolist())
        logits[:, 65 + len(tokens) % 3] = 1e9
        return logits

    found = batch_generate(
        model, FakeTokenizer(), ["ab", "c"], max_tokens=3, logits_processors=[process]
    )
    assert found.texts == ["CAB", "BCA"]
    assert [97, 98, 67] in seen and [99, 66] in seen
    params = [SamplingParams(3, sampler=lambda logits, i=i: 65 + i) for i in range(2)]
    assert batch_generate(model, FakeTokenizer(), ["a", "b"], params=params).texts == ["AAA", "BBB"]


def test_mlx_lm_s_function(model, capsys):
    found = batch_generate(
        model, FakeTokenizer(), ["abc", "de", "f"], None, [3, 1, 2], True, return_token_ids=True
    )
    want = [
        generate(model, FakeTokenizer(), p, max_tokens=n)
        for p, n in (("abc", 3), ("de", 1), ("f", 2))
    ]
    assert found.texts == want and [len(ids) for ids in found.token_ids] == [3, 1, 2]
    assert found.logprobs is None and found.caches is None
    assert found.finish_reasons == ["length"] * 3 and found.stats.generation_tokens == 6
    said = capsys.readouterr().out
    assert "Finished processing 3/3" in said and "Generation: 6 tokens" in said
    assert batch_generate(model, FakeTokenizer(), []).texts == []


def test_generate_with_prompts(model):
    prompts = ["abc", [5, 6], "d"]
    want = [generate(model, FakeTokenizer(), p, max_tokens=5) for p in prompts]
    assert pyloss.generate(model, FakeTokenizer(), prompts=prompts, max_tokens=5) == want
    assert (
        pyloss.generate(model, FakeTokenizer(), prompts=prompts, max_tokens=5, batch_size=1) == want
    )
    with pytest.raises(ValueError, match="either prompt or prompts"):
        pyloss.generate(model, FakeTokenizer(), "a", prompts=["b"])
    with pytest.raises(ValueError, match="either prompt or prompts"):
        pyloss.generate(model, FakeTokenizer())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": "abc"}, TypeError, "prompts must be a list"),
        ({"prompts": [5]}, TypeError, "prompt 0 must be a text or token ids"),
        ({"prompts": ["a", ""]}, ValueError, "prompt 1 must hold at least one token"),
        ({"prompts": ["a", [300]]}, ValueError, "prompt 1: .* outside the vocabulary"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"max_tokens": [1]}, ValueError, "2 prompts, but max_tokens for 1"),
        ({"params": [SamplingParams()]}, ValueError, "2 prompts, but params for 1"),
        ({"params": SamplingParams(), "seed": 1}, ValueError, "params takes the place of seed"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"top_p": 2}, ValueError, "top_p"),
        ({"seed": -1}, ValueError, "seed"),
        ({"stop": [""]}, ValueError, "stop"),
        ({"stop": [5]}, ValueError, "stop"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"prompt_caches": []}, ValueError, "prompt_caches"),
        ({"sampler": np.argmax, "top_k": 1}, ValueError, "give one or the others"),
    ],
)
def test_wrong_arguments(model, options, error, message):
    with pytest.raises(error, match=message):
        batch_generate(model, FakeTokenizer(), **{"prompts": ["x", "y"], **options})


def test_what_cannot_fit_is_refused_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(batch, "free_memory", lambda: 10_000_000)
    one = model.cache_bytes([1])
    assert one == 3 * 2 * 2 * 8 * 4
    prompts = [[1, 2]] * 9
    most = 10_000_000 // (4 * one) - 2
    BatchGenerator(model, FakeTokenizer(), 4).run(prompts, SamplingParams(most))
    with pytest.raises(
        MemoryError, match=r"4 sequences of up to .* need 0.01 GB .* 0.01 GB are free"
    ):
        BatchGenerator(model, FakeTokenizer(), 4).run(prompts, SamplingParams(most + 1))


def test_free_memory_is_a_number_of_bytes():
    free = batch.free_memory()
    assert free is None or 1e6 < free < 1e15
