"""Sampling against exact probabilities; the loop's end, its text, and repeated sampling."""

import math
import subprocess
import sys

import numpy as np
import pytest
import tiny
from fake import END, SPECIALS, FakeTokenizer

import pyloss
from pyloss import generation
from pyloss.generation import generate, generate_tokens, make_sampler, stream_generate

LOGITS = np.array([0.5, 2.0, -1.0, 1.5, -np.inf, 2.0], np.float32)


def exact(temperature=1.0, keep=None):
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    if keep is not None:
        p[[i for i in range(len(p)) if i not in keep]] = 0
    return p / p.sum()


def frequencies(n=20_000, **options):
    sampler = make_sampler(generator=np.random.default_rng(0), **options)
    return np.bincount([sampler(LOGITS) for _ in range(n)], minlength=len(LOGITS)) / n


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"temperature": 1.0}, exact()),
        ({"temperature": 0.5}, exact(0.5)),
        ({"temperature": 3.0}, exact(3.0)),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, exact(keep={1, 3, 5})),
        ({"temperature": 1.0, "top_k": 99}, exact()),
        # Probabilities in order: 0.36 (1), 0.36 (5), 0.22 (3), 0.08 (0), ...
        ({"temperature": 1.0, "top_p": 0.3}, exact(keep={1})),
        ({"temperature": 1.0, "top_p": 0.5}, exact(keep={1, 5})),
        ({"temperature": 1.0, "top_p": 0.9}, exact(keep={1, 3, 5})),
        ({"temperature": 1.0, "min_p": 1.0}, exact(keep={1, 5})),
        ({"temperature": 1.0, "min_p": 0.5}, exact(keep={1, 3, 5})),
        ({"temperature": 1.0, "min_p": 0.2}, exact(keep={0, 1, 3, 5})),
        ({"temperature": 2.0, "top_k": 4, "top_p": 0.8, "min_p": 0.1}, exact(2.0, keep={1, 3, 5})),
    ],
)
def test_draws_follow_the_exact_probabilities(options, want):
    got, want, n = frequencies(**options), np.asarray(want, np.float64), 20_000
    assert (got[want == 0] == 0).all()
    np.testing.assert_array_less(np.abs(got - want), 4.5 * np.sqrt(want * (1 - want) / n) + 1e-9)


@pytest.mark.parametrize("n", [1, 7, 64, 500, 2999, 3000, 4000])
@pytest.mark.parametrize("kinds", [50, 10**6])
def test_the_largest_are_those_of_a_stable_sort(n, kinds):
    values = np.random.default_rng(n).integers(0, kinds, 3000).astype(np.float32)
    np.testing.assert_array_equal(
        generation._largest(values, n), np.argsort(-values, kind="stable")[:n]
    )


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.3, 0.9, 0.999, 1.0, 2.0])
@pytest.mark.parametrize("kinds", [5, 10**6])
def test_the_fewest_of_a_sum(share, kinds):
    p = np.random.default_rng(1).integers(1, 1 + kinds, 3000).astype(np.float64)
    order = np.argsort(-p, kind="stable")
    want = order[: np.searchsorted(np.cumsum(p[order]), share * p.sum()) + 1]
    np.testing.assert_array_equal(generation._first_of(p, share * p.sum()), want)


def test_greedy_takes_the_first_largest():
    assert make_sampler()(LOGITS) == 1
    assert make_sampler(0.0, top_k=2, top_p=0.1)(np.array([-3.0, -1.0, -2.0])) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1 << 70}, "top_k"),
        ({"temperature": 10**400}, "temperature"),
    ],
)
def test_options_outside_their_range(options, name):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
        make_sampler(**options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.load_tiny(tmp_path_factory.mktemp("tiny"), vocab_size=258)


class Scripted:
    """A model that returns the same tokens for any input."""

    def __init__(self, script):
        self.script = script
        self.fed = []

    def make_cache(self):
        return iter(self.script)

    def step(self, ids, cache):
        self.fed.append(list(ids))
        logits = np.zeros(258, np.float32)
        logits[next(cache)] = 1
        return logits


def test_greedy_generation_is_the_largest_of_full_forwards(model):
    ids = [5, 100, 7]
    tokens = generate_tokens(model, ids)
    for _ in range(12):
        want = int(model(np.array([ids]))[0, -1].argmax())
        assert next(tokens) == want
        ids = [*ids, want]


def test_a_long_prompt_is_read_in_parts(model):
    prompt = np.random.default_rng(0).integers(0, 258, 1100)
    cut = next(generate_tokens(model, prompt))
    assert cut == int(model(prompt[None])[0, -1].argmax())
    scripted = Scripted([1] * 9)
    next(generate_tokens(scripted, prompt))
    assert np.concatenate(scripted.fed).tolist() == list(prompt) and len(scripted.fed) == 3


def test_the_same_seed_gives_the_same_answer(model):
    def run(seed):
        return [
            s.token
            for s in stream_generate(model, FakeTokenizer(), "abc", 20, temperature=1.5, seed=seed)
        ]

    assert run(1) == run(1) != run(2)
    runs = []
    for seed in (3, 3, 4):
        pyloss.random.seed(seed)
        runs.append(run(None))
    assert runs[0] == runs[1] != runs[2]
    state = pyloss.random.state()
    run(7)
    assert pyloss.random.state() == state, "a seed of its own leaves the library's state alone"


TEXT = "naïve — 漢字 🙂 done"


def test_texts_join_to_the_whole_answer():
    ids = list(TEXT.encode())
    steps = list(stream_generate(Scripted([*ids, SPECIALS[END]]), FakeTokenizer(), "prompt", 100))
    assert "".join(s.text for s in steps) == TEXT
    assert not any("\ufffd" in s.text for s in steps), "never half a character"
    assert [s.token for s in steps] == [*ids, SPECIALS[END]]
    assert [s.finish_reason for s in steps] == [None] * len(ids) + ["stop"]
    assert steps[-1].generation_tokens == len(ids) + 1 and steps[-1].prompt_tokens == 6
    assert steps[-1].prompt_tps > 0 and steps[-1].generation_tps > 0
    assert (
        generate(Scripted([*ids, SPECIALS[END]]), FakeTokenizer(), "prompt", max_tokens=100) == TEXT
    )


@pytest.mark.parametrize("n", [1, 4, 9])
def test_max_tokens(n):
    ids = list(b"0123456789")
    steps = list(stream_generate(Scripted(ids), FakeTokenizer(), [1, 2], n))
    assert "".join(s.text for s in steps) == "0123456789"[:n]
    assert len(steps) == n and steps[-1].finish_reason == "length" and steps[-1].prompt_tokens == 2


def test_an_answer_cut_within_a_character_says_so():
    ids = list("ab🙂".encode())
    assert generate(Scripted(ids), FakeTokenizer(), "x", max_tokens=4) == "ab\ufffd"


def test_the_end_token_alone_and_as_the_last_allowed():
    assert generate(Scripted([SPECIALS[END]]), FakeTokenizer(), "x") == ""
    (step,) = stream_generate(Scripted([SPECIALS[END]]), FakeTokenizer(), "x", 1)
    assert step.finish_reason == "stop" and step.text == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": [300]}, "outside the vocabulary"),
    ],
)
def test_wrong_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        list(stream_generate(model, FakeTokenizer(), **{"prompt": "x", **options}))


def test_under_a_tape_generation_is_not_recorded(model):
    prompt = [1, 2, 3]
    plain = generate(model, FakeTokenizer(), prompt, max_tokens=3)
    out = []
    pyloss.value_and_grad(
        lambda x: (out.append(generate(model, FakeTokenizer(), prompt, max_tokens=3)), x.sum())[1]
    )(np.ones(2))
    assert out == [plain]


@pytest.mark.parametrize(
    "first",
    [
        "pyloss.stream_generate",
        "pyloss.generate",
        "import_module('pyloss.generation')",
        "pyloss.tuner.train",
    ],
)
def test_the_package_gives_the_function_whatever_is_imported_first(first):
    """A module `pyloss.generate` would replace the function of that name once it is imported."""
    code = f"from importlib import import_module; import pyloss; {first}; assert callable(pyloss.generate), pyloss.generate"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
