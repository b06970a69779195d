"""The loop that generates: where it ends, what text it gives, what repeats."""

import subprocess
import sys

import numpy as np
import pytest
import tiny
from fake import END, SPECIALS, FakeTokenizer

import pyloss
from pyloss.generation import KeptTokens, generate, generate_tokens, stream_generate


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


class Short(FakeTokenizer):
    """Has fewer tokens than the model has rows."""

    highest_id = 99


def test_rows_past_the_tokenizers_tokens_are_never_sampled(model):
    for seed in range(3):
        answer = stream_generate(model, Short(), "abc", 40, temperature=50.0, seed=seed)
        assert all(step.token <= 99 for step in answer)
    seen = []
    steps = stream_generate(
        model, Short(), "abc", 3, logits_processors=[lambda ids, z: seen.append(z.shape) or z]
    )
    assert len(list(steps)) == 3 and set(seen) == {(1, 100)}
    params = pyloss.SamplingParams(max_tokens=40, temperature=50.0, seed=1)
    found = pyloss.batch_generate(
        model, Short(), ["abc", "d"], params=params, return_token_ids=True
    )
    assert all(token <= 99 for ids in found.token_ids for token in ids)


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


#: longer sequences need other keys: factors of 1 below 20 tokens
LONGROPE = {
    "model_type": "phi3",
    "original_max_position_embeddings": 20,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
}


@pytest.mark.parametrize(
    "options",
    [{}, *(tiny.FAMILIES[name] for name in ("phi3", "olmo3", "granite")), LONGROPE],
    ids=["llama", "phi3", "olmo3", "granite", "longrope"],
)
def test_kept_tokens_are_not_read_again_and_change_nothing(tmp_path, options):
    model = tiny.load_tiny(tmp_path / "tiny", **options)
    rng, kept = np.random.default_rng(0), KeptTokens(model)
    first = rng.integers(0, 29, 12).tolist()
    reused = []
    # goes on; ends differently; is the same; is shorter; grows long; shares nothing
    more = rng.integers(0, 29, 90).tolist()
    other = [(token + 1) % 29 for token in first]
    for prompt in (first, first + more[:4], first + other[:3], first + other[:3], first[:9],
                   first + more, first[:2] + more, other):  # fmt: skip
        logits = kept.read_prompt(prompt)
        expected = KeptTokens(model).read_prompt(prompt)
        # parts of a prompt are summed in another order
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        assert kept.ids == prompt
        reused.append(kept.reused)
    assert reused[0] == 0 and reused[1] == 12 and reused[-1] == 0
    if not options:
        assert reused[2:6] == [12, 14, 8, 9] and reused[6] >= 2


def test_streams_with_kept_tokens_give_the_same_answers(model):
    kept, tokenizer = KeptTokens(model), FakeTokenizer()
    prompt = [5, 100, 7]
    for _ in range(3):
        steps = list(stream_generate(model, tokenizer, prompt, max_tokens=5, kept=kept))
        alone = list(stream_generate(model, tokenizer, prompt, max_tokens=5))
        assert [step.token for step in steps] == [step.token for step in alone]
        prompt = [*prompt, *(step.token for step in steps), 9]
    assert kept.reused == 13  # all but the last answer's last token, and 9


def test_a_step_that_fails_drops_the_kept_tokens(model, monkeypatch):
    kept = KeptTokens(model)
    expected = kept.read_prompt([1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(model, "step", lambda ids, cache: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kept.read(np.array([4]))
    assert kept.ids == []
    np.testing.assert_array_equal(kept.read_prompt([1, 2, 3]), expected)
