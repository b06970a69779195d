"""Group relative policy optimization with a clipped ratio and a penalty for leaving the reference.

Answers are drawn with NumPy's numbers, token by token with a cache.
"""

import copy
import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models import cache
from mlx_lm.tuner.utils import linear_to_lora_layers

GROUP, NEW, CLIP, BETA = 3, 10, 0.2, 0.05


class Drawing:
    """A sampler with a generator of its own."""

    def __init__(self, seed, temperature=1.0):
        self.rng, self.temperature = np.random.default_rng(seed), temperature

    def __call__(self, logprobs):
        noise = mx.array(self.rng.gumbel(size=logprobs.shape).astype(np.float32))
        return mx.argmax(logprobs / self.temperature + noise, axis=-1)


def answer(model, tokenizer, prompt, seed):
    kept = cache.make_prompt_cache(model)
    steps = generate_step(
        mx.array(prompt), model, max_tokens=NEW, sampler=Drawing(seed), prompt_cache=kept
    )
    ids = []
    for token, _ in steps:
        token = int(token)
        ids.append(token)
        if token == tokenizer.eos_token_id:
            break
    return ids


def reward(ids):
    """Prefers answers with many different even tokens."""
    return len({i for i in ids if i % 2 == 0}) / max(len(ids), 1) - 0.02 * len(ids)


def token_log_probs(model, ids):
    logits = model(ids[:, :-1])
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(logits, ids[:, 1:, None], axis=-1).squeeze(-1)


def policy_loss(model, ids, mask, advantages, old, reference):
    new = token_log_probs(model, ids)
    ratio = mx.exp(new - old)
    clipped = mx.clip(ratio, 1 - CLIP, 1 + CLIP)
    gain = mx.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    kl = mx.exp(reference - new) - (reference - new) - 1
    each = -(gain - BETA * kl)
    rows = (each * mask).sum(axis=1) / mx.maximum(mask.sum(axis=1), 1)
    return mx.mean(rows), mx.mean((mx.abs(ratio - 1) > CLIP).astype(mx.float32))


def main(model_path, out, iters=10):
    folder = Path(model_path).parent
    model, tokenizer = load(str(model_path))
    model.freeze()
    reference = copy.deepcopy(model)
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    model.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    rows = [json.loads(x) for x in (folder / "data" / "questions.jsonl").read_text().splitlines()]
    prompts = [tokenizer.encode(row["prompt"])[:24] for row in rows]
    optimizer = optim.Adam(learning_rate=1e-3)
    step = nn.value_and_grad(model, policy_loss)
    losses, rewards, tokens, begin = [], [], 0, time.perf_counter()
    for it in range(max(iters // 2, 1)):
        prompt = prompts[it % len(prompts)]
        model.eval()
        answers = [answer(model, tokenizer, prompt, 100 * it + g) for g in range(GROUP)]
        got = np.array([reward(ids) for ids in answers])
        rewards.append(got.tolist())
        advantages = mx.array((got - got.mean()) / (got.std() + 1e-4)).astype(mx.float32)
        width = max(map(len, answers))
        ids = mx.array([prompt + a + [0] * (width - len(a)) for a in answers])
        at = mx.arange(1, ids.shape[1])
        ends = mx.array([len(prompt) + len(a) for a in answers])
        mask = (at >= len(prompt)) & (at[None, :] < ends[:, None])
        model.train()
        old = mx.stop_gradient(token_log_probs(model, ids))
        known = token_log_probs(reference, ids)
        mx.eval(old, known)
        for _ in range(2):
            (loss, _share), grads = step(model, ids, mask, advantages, old, known)
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
            losses.append(loss.item())
        tokens += ids.size
    seconds = time.perf_counter() - begin
    return {"losses": losses, "more": rewards, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
