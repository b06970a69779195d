"""The model `pyloss` of lm-eval: its three kinds of requests, and a run of the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

pytest.importorskip("lm_eval", reason="needs the package lm-eval (lm-eval extra)")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import pyloss
from pyloss.interop.lm_eval import PylossLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny") / "model"
    config, arrays = tiny.write_folder(place, vocab_size=tiny.TOKENS)
    tiny.byte_tokenizer().save(place)
    return place, config, arrays


@pytest.fixture(scope="module")
def model(folder):
    return PylossLM(str(folder[0]))


def requests(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def expected(folder, ids, first):
    """The log-probability of ids[first:], and whether they are the most likely tokens."""
    _, config, arrays = folder
    rows = tiny.logits(config, arrays, np.array(ids[:-1]))[first - 1 :]
    labels = np.array(ids[first:])
    norms = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    return (rows[np.arange(len(labels)), labels] - norms).sum(), bool(
        (rows.argmax(1) == labels).all()
    )


def test_the_name_is_registered():
    assert get_model("pyloss") is PylossLM


def test_loglikelihood(folder, model):
    tokenizer = model.tokenizer
    pairs = [("hello", " world"), ("a longer text ", "12"), ("", "hello"), ("x", "yz")]
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, text), (score, greedy) in zip(pairs, found):
        before = context.rstrip() or tokenizer.bos_token
        ids = tokenizer.encode(context + text)
        ids = ids if context else [tokenizer.bos_token_id, *ids]
        first = len(tokenizer.encode(before))
        want, likely = expected(folder, ids, first)
        assert score == pytest.approx(want, rel=2e-5) and greedy is likely


def test_the_most_likely_continuation_is_greedy(folder, model):
    _, config, arrays = folder
    context = model.tokenizer.encode("hello")
    best = int(tiny.logits(config, arrays, np.array(context))[-1].argmax())
    [(score, greedy)] = model._loglikelihood_tokens([(None, context, [best])], disable_tqdm=True)
    assert greedy and score == pytest.approx(
        expected(folder, [*context, best], len(context))[0], rel=2e-5
    )


def test_early_context_is_left_out(folder):
    short = PylossLM(str(folder[0]), max_length=6)
    ids = short.tokenizer.encode("a text of many tokens")
    [(score, _)] = short._loglikelihood_tokens([(None, ids[:-2], ids[-2:])], disable_tqdm=True)
    assert score == pytest.approx(expected(folder, ids[-7:], 5)[0], rel=2e-5)
    with pytest.raises(ValueError, match="a continuation has 7 tokens, and max_length is 6"):
        short._loglikelihood_tokens([(None, ids[:1], ids[:7])])


@pytest.mark.parametrize("length", [None, 8])
def test_loglikelihood_rolling(folder, length):
    """Each token is predicted once, from as many tokens before it as a window has."""
    model = PylossLM(str(folder[0]), max_length=length)
    text = "hello world, this is a text"
    ids = [model.tokenizer.bos_token_id, *model.tokenizer.encode(text)]
    size = model.max_length
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + size, len(ids))
        begin = max(0, end - size - 1)
        total += expected(folder, ids[begin:end], done - begin)[0]
        done = end
    [found] = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    assert found == pytest.approx(total, rel=2e-5)


def test_generate_until(model):
    def answer(prompt, **options):
        return pyloss.generate(model.model, model.tokenizer, prompt, **options)

    whole = answer("hello", max_tokens=12)
    stop = whole[3]
    given = [
        ("hello", {"until": ["\x00\x01"], "max_gen_toks": 12}),
        ("hello", {"until": stop, "max_new_tokens": 12, "temperature": 0.7, "do_sample": False}),
        ("12 12", {"max_gen_toks": 3, "until": []}),
    ]
    found = model.generate_until(requests("generate_until", *given), disable_tqdm=True)
    assert found == [whole, whole.split(stop)[0], answer("12 12", max_tokens=3)]


def test_sampling_of_a_request(model):
    sampled = model._params(
        {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": ["a", ""]}
    )
    assert (sampled.temperature, sampled.top_p, sampled.stop) == (0.5, 0.9, ("a",))
    assert sampled.max_tokens == 256
    greedy = model._params({"temperature": 0.0, "top_p": 0.9, "max_tokens": 5})
    assert (greedy.temperature, greedy.top_p, greedy.max_tokens) == (0, 1, 5)
    with pytest.raises(ValueError, match="generation options 'num_beams' are not supported"):
        model._params({"num_beams": 4})


def test_room_for_the_answer(folder):
    short = PylossLM(str(folder[0]), max_length=10)
    found = short.generate_until(
        requests("generate_until", ("a text of many tokens", {"max_gen_toks": 4})),
        disable_tqdm=True,
    )
    ids = short.tokenizer.encode("a text of many tokens")[-6:]
    assert found == [pyloss.generate(short.model, short.tokenizer, ids, max_tokens=4)]
    with pytest.raises(ValueError, match="max_gen_toks is 10; it must be below max_length, 10"):
        short.generate_until(requests("generate_until", ("a", {"max_gen_toks": 10})))


def test_special_tokens(folder, model):
    bos = model.tokenizer.bos_token_id
    assert model.tok_encode("hello") == model.tokenizer.encode("hello")
    assert model.tok_encode("<s>hello", add_special_tokens=False)[0] == bos
    assert model.prefix_token_id == bos and model.eot_token_id == model.tokenizer.eos_token_id


def test_chat_templates(model):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "wor"}]
    assert model.apply_chat_template(turns[:1]) == "user: hello"
    assert (
        model.apply_chat_template(turns, add_generation_prompt=False) == "user: helloassistant: wor"
    )
    assert model.chat_template(True) == model.tokenizer.chat_template


def test_with_an_adapter(folder, tmp_path):
    model, _ = pyloss.load(folder[0])
    pyloss.linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array[...] = rng.normal(0, 0.1, array.shape)
    pyloss.save_adapter(model, tmp_path / "adapter")
    adapted = PylossLM(str(folder[0]), adapter_path=str(tmp_path / "adapter"), batch_size="auto")
    ids = [adapted.prefix_token_id, *adapted.tokenizer.encode("hello world")]
    want = sum(
        row[i] - np.log(np.exp(row).sum())
        for row, i in zip(np.asarray(model(np.array([ids]))).astype(float)[0], ids[1:])
    )
    [found] = adapted.loglikelihood_rolling(
        requests("loglikelihood_rolling", ("hello world",)), disable_tqdm=True
    )
    assert found == pytest.approx(want, rel=2e-5)


def test_results_are_those_of_lm_evals_own_model(folder, model):
    """lm-eval's `hf` runs the same weights in transformers."""
    pytest.importorskip("transformers", reason="compares with transformers (parity extra)")
    pytest.importorskip("torch", reason="compares with torch (parity extra)")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder[0]), dtype="float32", device="cpu", max_length=16)
    ours = PylossLM(str(folder[0]), max_length=16)
    pairs = [
        ("hello", " world"),
        ("", "hello"),
        ("a context of many tokens", " 12 12"),
        ("x ", "y"),
    ]
    asked = requests("loglikelihood", *pairs)
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    for (score, greedy), (other, likely) in zip(ours.loglikelihood(asked, True), want, strict=True):
        assert score == pytest.approx(other, rel=2e-5) and greedy == likely
    texts = [("hello world, this is a text of some windows",), ("12",)]
    asked = requests("loglikelihood_rolling", *texts)
    want = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked, True) == pytest.approx(want, rel=2e-5)
    options = {"until": ["zz"], "max_gen_toks": 6, "do_sample": False}
    asked = requests("generate_until", ("hello", options), ("a context of many tokens", options))
    want = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, True) == want


TASK = """task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_a_task_on_the_command_line(folder, model, tmp_path):
    """A task of local data, offline; its accuracy is that of the scores."""
    docs = [
        {"question": f"hello {i}", "choices": ["one", "two", "three"], "label": i % 3}
        for i in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    right = 0
    for doc in docs:
        pairs = [(doc["question"], f" {choice}") for choice in doc["choices"]]
        scores = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        right += int(np.argmax([score for score, _ in scores])) == doc["label"]
    line = [sys.executable, "-m", "pyloss.interop.lm_eval", "--model", "pyloss"]
    line += ["--model_args", f"pretrained={folder[0]}", "--include_path", str(tmp_path)]
    line += ["--tasks", "tiny", "--output_path", str(tmp_path / "out")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(pyloss.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    [report] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]["tiny"]
    assert results["acc,none"] == pytest.approx(right / 6)
