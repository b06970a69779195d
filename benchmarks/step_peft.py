"""Training steps of a model with torch + PEFT, as users write them.

The flags are step_work's, --compile, --dtype and --device. A config.json alone gives a model of
random weights. In bfloat16 PEFT keeps adapters in float32, and logits become float32 for the loss,
as in transformers.
"""

from __future__ import annotations

import numpy as np
import step_work
import torch
from common import THREADS
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    parser = step_work.parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--device",
        default="cpu",
        help="torch's name; products on cuda are in float32, not TF32",
    )
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.model.endswith(".json"):
        config = AutoConfig.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    vocabulary = model.config.vocab_size
    rank, alpha = step_work.RANK, step_work.RANK * step_work.SCALE
    adapter = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=options.kind == "dora",
    )
    model = get_peft_model(model, adapter).to(options.device)
    if options.checkpoint:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train(not options.evaluate)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=step_work.RATE
    )
    run = torch.compile(model) if options.compile else model
    teacher = (
        AutoModelForCausalLM.from_pretrained(options.teacher, dtype=dtype).eval()
        if options.teacher
        else None
    )

    def divergence(q: torch.Tensor, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
        """The mean over the targets of KL(teacher || student), as in TRL's GKD loss."""
        with torch.no_grad():
            p = teacher(**inputs).logits.float()
        rows = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        return rows[labels != -100].mean()

    def loss_of(batch: step_work.Batch) -> torch.Tensor:
        steps = np.arange(batch.ids.shape[1])
        first, end = batch.lengths[:, :1], batch.lengths[:, 1:]
        labels = (
            torch.from_numpy(np.where((steps >= first) & (steps < end), batch.ids, -100)[:, 1:])
            .long()
            .to(options.device)
        )
        mask = (
            torch.from_numpy((steps < end)[:, :-1]).long().to(options.device)
            if batch.padded
            else None
        )
        ids = torch.from_numpy(batch.ids[:, :-1]).long().to(options.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        logits = run(**inputs).logits.float()
        if teacher is not None:
            return divergence(logits, inputs, labels)
        return torch.nn.functional.cross_entropy(logits.view(-1, vocabulary), labels.reshape(-1))

    def step(batch: step_work.Batch) -> float:
        if options.evaluate:
            with torch.no_grad():
                return loss_of(batch).item()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step_work.measure(options, vocabulary, base, step)


if __name__ == "__main__":
    main()
