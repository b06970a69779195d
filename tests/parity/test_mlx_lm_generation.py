"""mlx_lm.generate beside pyloss's: texts, tokens, probabilities and ends."""

import copy

import numpy as np
import pytest
from mlx_sides import Side, assert_same, compare, plain, refused

PROMPT = "hello 12 w"


def loaded(side, folder, **options):
    return side().load(str(folder / "base"), **options)


def text(side, model, tokenizer, prompt, **options):
    """An answer without the byte 0, which mlx-lm's detokenizer shows as another character."""
    null = tokenizer.convert_tokens_to_ids("Ā")
    processors = side("sample_utils").make_logits_processors(logit_bias={null: -1e4})
    return side().generate(model, tokenizer, prompt, logits_processors=processors, **options)


def test_a_text(made):
    compare(lambda side: text(side, *loaded(side, made), PROMPT, max_tokens=12))


def test_token_ids_as_the_prompt(made):
    def case(side):
        model, tokenizer = loaded(side, made)
        ids = tokenizer.encode(PROMPT)
        return [text(side, model, tokenizer, p, max_tokens=8) for p in (ids, side.mx.array(ids))]

    compare(case)


def test_with_an_adapter(made):
    def case(side):
        model, tokenizer = loaded(side, made, adapter_path=str(made / "adapters"))
        return side().generate(model, tokenizer, PROMPT, max_tokens=12)

    compare(case)


def test_pieces(made):
    def case(side):
        steps = list(side().stream_generate(*loaded(side, made), PROMPT, max_tokens=6))
        return [
            (s.token, s.from_draft, s.prompt_tokens, s.generation_tokens, s.finish_reason)
            for s in steps
        ] + [np.array(s.logprobs) for s in steps]

    compare(case, atol=2e-4)


def test_steps(made):
    def case(side):
        model, tokenizer = loaded(side, made)
        prompt = side.mx.array(tokenizer.encode(PROMPT))
        found = list(side("generate").generate_step(prompt, model, max_tokens=5))
        return [int(token) for token, _ in found], [np.array(logs) for _, logs in found]

    compare(case, atol=2e-4)


def test_an_end_token(made):
    def case(side):
        model, tokenizer = loaded(side, made)
        steps = list(side().stream_generate(model, tokenizer, PROMPT, max_tokens=5))
        tokenizer.eos_token_ids = {steps[2].token}
        again = list(side().stream_generate(model, tokenizer, PROMPT, max_tokens=9))
        return [(s.text, s.token, s.generation_tokens, s.finish_reason) for s in again]

    assert compare(case)[-1][-1] == "stop"


def test_more_end_tokens(made):
    def case(side):
        _, tokenizer = loaded(side, made)
        tokenizer.add_eos_token("hello")
        tokenizer.add_eos_token("7")
        ends = sorted(tokenizer.eos_token_ids)
        return ends, refused(lambda: tokenizer.add_eos_token("no such token"), ValueError)

    compare(lambda side: case(side)[0])
    assert case(Side(True))[1] == "ValueError"


def test_processors_get_all_tokens(made):
    def case(side):
        seen = []

        def process(tokens, logits):
            seen.append((np.array(tokens).tolist(), list(logits.shape)))
            return logits * -1.0

        found = side().generate(
            *loaded(side, made), PROMPT, max_tokens=4, logits_processors=[process]
        )
        return found, seen[:4]

    compare(case)


def test_a_sampler_gets_log_probabilities(made):
    def case(side):
        seen = []

        def sample(logprobs):
            seen.append(np.array(logprobs))
            return side.mx.argmin(logprobs, axis=-1)

        return side().generate(*loaded(side, made), PROMPT, max_tokens=3, sampler=sample), seen[:3]

    compare(case, atol=2e-4)


@pytest.mark.parametrize("size", [1, 3, 2048])
def test_prompts_by_parts(made, size):
    def case(side):
        told = []
        options = {"max_tokens": 4, "prefill_step_size": size}
        options["prompt_progress_callback"] = lambda done, total: told.append((done, total))
        return side().generate(*loaded(side, made), PROMPT * 2, **options), told

    compare(case)


def test_a_cache_goes_on(made):
    """Two turns: the cache holds every token of the first."""

    def case(side):
        model, tokenizer = loaded(side, made)
        cache = side("models.cache").make_prompt_cache(model)
        first = text(side, model, tokenizer, PROMPT, max_tokens=5, prompt_cache=cache)
        offset = cache[0].offset
        twin = copy.deepcopy(cache)
        texts = [
            text(side, model, tokenizer, "w 12", max_tokens=5, prompt_cache=c)
            for c in (cache, twin)
        ]
        return first, offset, texts, cache[0].offset

    found = compare(case)
    assert found[2][0] == found[2][1]


def test_a_trimmed_cache(made):
    def case(side):
        caches, (model, tokenizer) = side("models.cache"), loaded(side, made)
        cache, ids = caches.make_prompt_cache(model), tokenizer.encode(PROMPT)
        step = side("generate").generate_step
        first = [
            int(t) for t, _ in step(side.mx.array(ids), model, max_tokens=4, prompt_cache=cache)
        ]
        number = caches.trim_prompt_cache(cache, 4)
        last = side.mx.array(first[:1])
        second = [int(t) for t, _ in step(last, model, max_tokens=3, prompt_cache=cache)]
        return first, number, second

    found = compare(case)
    assert found[2] == found[0][1:]


def test_a_bounded_cache(made):
    def case(side):
        model, tokenizer = loaded(side, made)
        kind = side("models.cache").RotatingKVCache
        cache = [kind(max_size=16, keep=4) for _ in model.layers]
        return text(side, model, tokenizer, PROMPT, max_tokens=30, prompt_cache=cache)

    compare(case)


@pytest.mark.parametrize("drafts", [1, 3])
def test_a_draft_model(made, drafts):
    """The draft is the model itself with an adapter, so that some tokens are refused."""

    def case(side):
        model, tokenizer = loaded(side, made)
        draft, _ = loaded(side, made, adapter_path=str(made / "adapters"))
        options = {"max_tokens": 12, "draft_model": draft, "num_draft_tokens": drafts}
        steps = list(side().stream_generate(model, tokenizer, PROMPT, **options))
        return [(s.token, s.from_draft) for s in steps]

    found = compare(case)
    plain = list(Side(True)().stream_generate(*loaded(Side(True), made), PROMPT, max_tokens=12))
    assert [token for token, _ in found] == [s.token for s in plain]


def test_refused_options(made):
    def case(side):
        model, tokenizer = loaded(side, made)
        step = side("generate").generate_step
        return [
            refused(lambda: side().generate(model, tokenizer, PROMPT, max_tokens=0), ValueError),
            refused(lambda: list(step(side.mx.array([], side.mx.int32), model)), ValueError),
            refused(lambda: list(step(side.mx.array([5]), model, nothing=1)), TypeError),
        ]

    assert compare(case) == ["ValueError", "ValueError", "TypeError"]


# ---- many prompts

PROMPTS = ["hello", "w 12 hello", "12", "hell w"]


def many(side, folder, **options):
    model, tokenizer = loaded(side, folder)
    ids = [tokenizer.encode(p) for p in PROMPTS]
    response = side().batch_generate(model, tokenizer, ids, **options)
    return response.texts, response.token_ids, response.logprobs, response.caches is not None


def test_many_prompts(made):
    compare(lambda side: many(side, made, max_tokens=7))


def test_many_prompts_with_all_that_is_known(made):
    options = {"return_token_ids": True, "return_logprobs": True}
    compare(lambda side: many(side, made, max_tokens=[3, 9, 1, 5], **options), atol=2e-4)


def test_few_at_a_time(made):
    options = {"completion_batch_size": 2, "prefill_batch_size": 1, "return_token_ids": True}
    compare(lambda side: many(side, made, max_tokens=6, **options))


def test_caches_of_many_prompts(made):
    def case(side):
        model, tokenizer = loaded(side, made)
        ids = [tokenizer.encode(p) for p in PROMPTS[:2]]
        options = {"max_tokens": 4, "return_prompt_caches": True, "return_token_ids": True}
        first = side().batch_generate(model, tokenizer, ids, **options)
        more = [tokenizer.encode(" w"), tokenizer.encode("12 hello")]
        second = side().batch_generate(
            model, tokenizer, more, prompt_caches=first.caches, max_tokens=4, return_token_ids=True
        )
        return first.token_ids, second.token_ids, second.texts

    compare(case)


def held(cache):
    """Offsets and values of a prompt's cache."""
    return [layer.offset for layer in cache], [
        np.array(part)[:, :, : layer.offset]
        for layer in (cache[0], cache[-1])
        for part in (layer.keys, layer.values)
    ]


@pytest.mark.parametrize("ends", [False, True])
def test_prompts_after_caches(made, ends):
    """Caches that prompts share, of other lengths, empty and missing ones; none changes."""

    def case(side):
        model, tokenizer = loaded(side, made)
        make = side("models.cache").make_prompt_cache
        shared, short, empty = (make(model) for _ in range(3))
        model(side.mx.array([tokenizer.encode("w 12 hello w 12")]), cache=shared)
        model(side.mx.array([tokenizer.encode("he")]), cache=short)
        before = held(shared), held(short)
        ids = [tokenizer.encode(p) for p in ("hello", "w 12 hello", "12", "hell w", "1")]
        options = {"max_tokens": [5, 2, 6, 4, 3], "return_prompt_caches": True}
        options |= {"return_token_ids": True, "return_logprobs": True, "completion_batch_size": 3}
        if ends:
            tokenizer.eos_token_ids = set(range(5, 150))
        given = [shared, shared, short, None, empty]
        found = side().batch_generate(model, tokenizer, ids, prompt_caches=given, **options)
        again = side().batch_generate(model, tokenizer, ids[::-1], prompt_caches=found.caches)
        return (
            found.token_ids, found.logprobs, [held(c) for c in found.caches], again.texts, before,
            (held(shared), held(short)), empty[0].offset,
        )  # fmt: skip

    found = compare(case, atol=2e-4)
    assert_same(plain(found[5]), plain(found[4]), 0)
    lengths = [len(ids) for ids in found[0]]
    assert min(lengths) < 2 if ends else lengths == [5, 2, 6, 4, 3]


def test_bounded_caches_of_many_prompts(made):
    compare(lambda side: many(side, made, max_tokens=6, max_kv_size=64, return_token_ids=True))


def test_a_sampler_of_many_prompts(made):
    def case(side):
        sample = lambda logprobs: side.mx.argmin(logprobs, axis=-1)
        return many(side, made, max_tokens=3, sampler=sample, return_token_ids=True)

    compare(case)


def test_tokenizers(made):
    def case(side):
        _, tokenizer = loaded(side, made)
        messages = [{"role": "user", "content": "hello"}]
        detokenizer = tokenizer.detokenizer
        segments = []
        for token in tokenizer.encode("hello w 12 é"):
            detokenizer.add_token(token)
            segments.append(detokenizer.last_segment)
        detokenizer.finalize()
        return {
            "ids": tokenizer.encode(PROMPT),
            "text": tokenizer.decode(tokenizer.encode(PROMPT)),
            "chat": tokenizer.apply_chat_template(messages, tokenize=False),
            "chat ids": tokenizer.apply_chat_template(messages, add_generation_prompt=True),
            "ends": sorted(tokenizer.eos_token_ids),
            "special": [
                tokenizer.bos_token,
                tokenizer.eos_token,
                tokenizer.bos_token_id,
                tokenizer.eos_token_id,
            ],
            "thinking": tokenizer.has_thinking,
            "tools": tokenizer.has_tool_calling,
            "template": tokenizer.has_chat_template,
            "size": len(tokenizer),
            "names": tokenizer.convert_ids_to_tokens([5, 6]),
            "numbers": tokenizer.convert_tokens_to_ids(["hello", "12"]),
            "whole": detokenizer.text,
            "segments": "".join(segments) + detokenizer.last_segment,
            "tokens": detokenizer.tokens,
        }

    compare(case)
