"""On-policy distillation: the student answers, the teacher scores every token of the answers.

Prompts share a beginning, whose keys and values are computed once for each update.
"""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import batch_generate, load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.utils import linear_to_lora_layers

SYSTEM = "Answer in a few words.\n"
NEW = 12


def prompts_of(path, tokenizer):
    rows = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    return [tokenizer.encode(row[0]["content"]) for row in rows]


def rollouts(model, tokenizer, prompts):
    """Answers of the model as lists of ids; the system prompt is read once."""
    shared = make_prompt_cache(model)
    model(mx.array([tokenizer.encode(SYSTEM)]), cache=shared)
    mx.eval([c.state for c in shared])
    answers = batch_generate(
        model,
        tokenizer,
        prompts,
        prompt_caches=[shared] * len(prompts),
        max_tokens=NEW,
        return_token_ids=True,
        sampler=make_sampler(temp=0.0),
    )
    return answers.token_ids


def padded(rows):
    width = max(map(len, rows))
    return mx.array([row + [0] * (width - len(row)) for row in rows])


def reverse_kl(student, teacher_log_probs, ids, mask):
    """KL(student || teacher) at the answers' tokens."""
    log_probs = nn.log_softmax(student(ids[:, :-1]), axis=-1)
    kl = (mx.exp(log_probs) * (log_probs - teacher_log_probs)).sum(-1)
    return (kl * mask).sum() / mx.maximum(mask.sum(), 1)


def main(model_path, out, iters=10):
    folder = Path(model_path).parent
    teacher, _ = load(str(folder / "teacher"))
    student, tokenizer = load(str(model_path))
    student.freeze()
    linear_to_lora_layers(student, -1, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    student.load_weights(str(folder / "start" / "adapters.safetensors"), strict=False)
    prompts = prompts_of(folder / "data" / "train.jsonl", tokenizer)
    system = tokenizer.encode(SYSTEM)
    optimizer = optim.AdamW(learning_rate=1e-3)
    step = nn.value_and_grad(student, reverse_kl)
    losses, answers, tokens = [], [], 0
    begin = time.perf_counter()
    for it in range(iters):
        chosen = [prompts[(3 * it + j) % len(prompts)] for j in range(3)]
        student.eval()
        continued = rollouts(student, tokenizer, chosen)
        student.train()
        rows = [system + p + a for p, a in zip(chosen, continued)]
        ids = padded(rows)
        at = mx.arange(1, ids.shape[1])
        starts = mx.array([len(system) + len(p) for p in chosen])
        ends = mx.array([len(row) for row in rows])
        mask = mx.logical_and(at >= starts[:, None], at < ends[:, None]).astype(mx.float32)
        teacher_log_probs = nn.log_softmax(teacher(ids[:, :-1]), axis=-1)
        mx.eval(teacher_log_probs)
        loss, grads = step(student, teacher_log_probs, ids, mask)
        optimizer.update(student, grads)
        mx.eval(student.trainable_parameters(), optimizer.state, loss)
        losses.append(loss.item())
        answers.append(continued)
        tokens += ids.size
    seconds = time.perf_counter() - begin
    return {"losses": losses, "more": answers, "tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
