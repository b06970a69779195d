"""Trains a little, answers the questions of a test set in between, and fuses the adapter."""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import generate, load, stream_generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset
from mlx_lm.tuner.trainer import default_loss, evaluate, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers


def answers(model, tokenizer, rows, tokens=10):
    """Greedy answers and how many of them begin like the expected one."""
    model.eval()
    found, right = [], 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True
        )
        text = generate(model, tokenizer, prompt=prompt, max_tokens=tokens, verbose=False)
        right += text.strip()[:1] == row["completion"].strip()[:1]
        found.append(text)
    model.train()
    return found, right / len(rows)


def streamed(model, tokenizer, prompt):
    """Ids and log probabilities with a penalty for repetition."""
    processors = make_logits_processors(repetition_penalty=1.3, repetition_context_size=8)
    ids, scores = [], []
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=8,
        sampler=make_sampler(temp=0.0),
        logits_processors=processors,
    ):
        ids.append(int(response.token))
        scores.append(response.logprobs[response.token].item())
    return ids, scores


def main(model_path, out, iters=10):
    folder, out = Path(model_path).parent, Path(out)
    rows = [json.loads(x) for x in (folder / "data" / "questions.jsonl").read_text().splitlines()]
    np.random.seed(6)
    model, tokenizer = load(str(model_path))
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    data = CacheDataset(CompletionsDataset(rows, tokenizer, "prompt", "completion", True))
    optimizer = optim.Adam(learning_rate=1e-3)
    step = nn.value_and_grad(model, default_loss)
    losses, texts, tokens, begin = [], [], 0, time.perf_counter()
    for it, batch in zip(range(iters), iterate_batches(data, 2, 128, loop=True)):
        if it % 5 == 0:
            texts.append(answers(model, tokenizer, rows[:3]))
        (loss, ntoks), grads = step(model, *batch)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
        tokens += ntoks.item()
    seconds = time.perf_counter() - begin
    final = evaluate(model, data, batch_size=2, num_batches=4, max_seq_length=128)

    prompt = tokenizer.encode(rows[0]["prompt"])
    with_adapter = streamed(model, tokenizer, prompt)
    fused = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))
    without = streamed(model, tokenizer, prompt)
    assert with_adapter[0] == without[0]
    remove_lora_layers(model)  # none are left
    return {
        "losses": losses + [float(final)] + with_adapter[1] + without[1],
        "more": {"texts": texts, "ids": with_adapter[0]},
        "tokens": tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
