"""Answers of llama.cpp, from either of its Python packages, in a new process that may abort."""

import importlib.util
import json
import subprocess
import sys
from typing import NamedTuple

import pytest

PACKAGES = ("llama_cpp", "xllamacpp")


class Answer(NamedTuple):
    """Token ids, and for each the log probabilities of the likeliest tokens by id."""

    tokens: list
    logprobs: list


def require():
    if not any(map(importlib.util.find_spec, PACKAGES)):
        pytest.skip("compares with llama.cpp: llama-cpp-python or xllamacpp (parity extra)")


def run(path, prompt, count, lora=None):
    """Continue a text or token ids greedily by `count` tokens; keys and values stay in float32."""
    ids = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
    task = {"path": str(path), "prompt": ids, "count": count, "lora": str(lora) if lora else None}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(task)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return Answer(
        found["tokens"], [{int(k): v for k, v in step.items()} for step in found["logprobs"]]
    )


def _llama_cpp(task):
    import llama_cpp
    import numpy as np

    f32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        task["path"],
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        lora_path=task["lora"],
        type_k=f32,
        type_v=f32,
        logits_all=True,
        verbose=False,
    )
    tokens, logprobs = [], []
    prompt = task["prompt"]
    llama.eval(llama.tokenize(prompt.encode(), special=True) if isinstance(prompt, str) else prompt)
    while len(tokens) < task["count"]:
        logits = np.array(llama.scores[llama.n_tokens - 1], np.float64)
        logits -= logits.max() + np.log(np.exp(logits - logits.max()).sum())
        best = np.argsort(-logits)[:50]
        tokens.append(int(best[0]))
        logprobs.append({int(i): float(logits[i]) for i in best})
        llama.eval(tokens[-1:])
    return {"tokens": tokens, "logprobs": logprobs}


def _xllamacpp(task):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = task["path"]
    params.n_ctx, params.warmup, params.verbosity = 512, False, -1
    # Two threads would wait for each other on a busy machine.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if task["lora"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = task["lora"], 1.0
        params.lora_adapters = [adapter]
    request = {
        "prompt": task["prompt"],
        "max_tokens": task["count"],
        "temperature": 0,
        "logprobs": 50,
        "n_probs": 50,
        "ignore_eos": True,
    }
    steps = xllamacpp.Server(params).handle_completions(request)["choices"][0]["logprobs"][
        "content"
    ]
    return {
        "tokens": [step["id"] for step in steps],
        "logprobs": [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps],
    }


if __name__ == "__main__":
    import os

    first = next(filter(importlib.util.find_spec, PACKAGES))
    print(
        "\n"
        + json.dumps(
            {"llama_cpp": _llama_cpp, "xllamacpp": _xllamacpp}[first](json.loads(sys.argv[1]))
        ),
        flush=True,
    )
    os._exit(0)  # do not wait for the server's threads
