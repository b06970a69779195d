"""Flags of `pyloss distill`: those of `pyloss train`, and the keys of `distillation`."""

from __future__ import annotations

from typing import Any

from pyloss.cli.flags.training import run_flags
from pyloss.cli.parser import command, real, whole
from pyloss.losses.distillation import KINDS
from pyloss.losses.hidden import KINDS as HIDDEN_LOSSES
from pyloss.losses.sparse import RESTS
from pyloss.tuner.run.settings import DISTILLATION_SCHEMA


def distill_parser(commands: Any) -> None:
    parser = command(
        commands,
        "distill",
        text="train a model towards the probabilities of a teacher",
        description="""Train a student with the probabilities of a teacher as its targets, by LoRA,
DoRA or in full, on the same data and with the same flags as pyloss train. The loss of a
target token is alpha CE + (1 - alpha) T^2 D: the cross entropy of the label, and the
divergence D between teacher and student at temperature T.""",
        epilog="""examples:
  pyloss distill --teacher adapters-fused --data examples/data --mask-prompt --iters 200 \\
      --learning-rate 1e-3
                              teach the embedded small model what a tuned one answers
  pyloss distill --teacher big.gguf --model small/ --kind js --beta 0.3 --data data/
                              a quantized teacher: its weights stay in the file
  pyloss distill --teacher big/ --temperature 2 --alpha 0.5 --data data/
                              soft targets, and half of the loss from the labels
  pyloss distill --teacher big/ --hidden-loss cosine --hidden-layers 3:7,11:29 --data data/
                              hidden states as targets, too
  pyloss distill --teacher big/ --data data/ --write-teacher stored/ --top-k 64
  pyloss distill --teacher stored/ --data data/
                              run the teacher once, and train without it

Teacher and student need the same tokenizer. The files of a run, --resume and Ctrl-C are
those of pyloss train; a YAML file has these settings under the key distillation.""",
    )
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--teacher",
        metavar="PATH",
        help="a model's folder, a .gguf file, or a known name; or the folder of --write-teacher",
    )

    def add(flag: str, key: str, text: str, **more: Any) -> None:
        default = DISTILLATION_SCHEMA[key].default
        group.add_argument(flag, help=f"{text} (default: {default})", **more)

    add(
        "--kind",
        "kind",
        "divergence from the teacher P to the student Q: KL(P || Q), KL(Q || P), "
        "Jensen-Shannon with --beta, or a KL to a mixture that has the share --skew of the first",
        metavar="|".join(KINDS),
    )
    add("--temperature", "temperature", "divides both models' logits", type=real, metavar="T")
    add(
        "--alpha",
        "alpha",
        "share of the labels' cross entropy, 0 to 1",
        type=real,
        metavar="X",
        dest="label_share",
    )
    add(
        "--beta",
        "beta",
        "for js: from 0, the forward KL, to 1, the reverse KL",
        type=real,
        metavar="X",
    )
    add("--skew", "skew", "for skew-kl: the teacher's share of the mixture", type=real, metavar="X")
    group.add_argument(
        "--rest",
        metavar="|".join(RESTS),
        help="of a stored teacher: its other classes are one more class, or are left out and the "
        "stored ones add up to 1 (default: bucket)",
    )
    add(
        "--on-policy",
        "on_policy",
        "share of the samples whose answers the student draws itself; the teacher must be a model",
        type=real,
        metavar="X",
    )
    add(
        "--max-new-tokens",
        "max_new_tokens",
        "of an answer that the student draws",
        type=whole,
        metavar="N",
    )
    group = parser.add_argument_group("hidden states (the teacher must be a model)")
    group.add_argument(
        "--hidden-loss",
        metavar="|".join(HIDDEN_LOSSES),
        help="add the distance between hidden states of student and teacher: cosine distance or "
        "mean square (default: none)",
    )
    group.add_argument(
        "--hidden-layers",
        metavar="S:T,...",
        help="the pairs of layers that are compared, counted from 0, such as 3:7,11:29: the "
        "student's and the teacher's (default: the last layers of four equal parts of both)",
    )
    add("--hidden-weight", "hidden_weight", "factor of this term", type=real, metavar="W")
    group = parser.add_argument_group("storing a teacher")
    group.add_argument(
        "--write-teacher",
        metavar="FOLDER",
        help="store the teacher's probabilities of the data's target tokens, and train nothing; a "
        "stopped command goes on where it stopped",
    )
    group.add_argument(
        "--top-k", type=whole, metavar="K", help="the likeliest classes of a token (default: 64)"
    )
    group.add_argument(
        "--samples",
        type=whole,
        metavar="N",
        help="instead, N classes drawn from the teacher's distribution: no bias, for forward-kl",
    )
    run_flags(parser, lora_alpha="--lora-alpha")
