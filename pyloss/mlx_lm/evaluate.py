"""mlx_lm.evaluate: lm-evaluation-harness on a model, with mlx-lm's flags."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from pyloss.io.console import out
from pyloss.io.files import write_text
from pyloss.mlx_lm.command import as_command
from pyloss.mlx_lm.names import absent

__all__ = ["DEFAULT_MAX_TOKENS", "main"]

__getattr__ = absent(__name__)

DEFAULT_MAX_TOKENS = 8192


def main() -> None:
    """The command `python -m pyloss.mlx_lm.evaluate`."""
    parser = argparse.ArgumentParser("Evaluate an MLX model using lm-evaluation-harness.")
    add = parser.add_argument
    add("--model", required=True, help="the model: its folder, GGUF file or name")
    add("--tasks", nargs="+", required=True, help="lm-eval's names of tasks")
    add("--output-dir", default=".", help="folder of the file of results")
    add("--batch-size", type=int, default=8, help="answers generated at a time")
    add("--num-shots", type=int, default=None, help="examples before a question")
    text = "most tokens of an answer, of tasks that do not say it"
    add("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help=text)
    add("--limit", type=int, default=None, help="questions per task")
    add("--seed", type=int, default=123, help="seed of the random numbers")
    text = "examples are turns of a conversation"
    add("--fewshot-as-multiturn", action="store_true", default=False, help=text)
    action = argparse.BooleanOptionalAction
    text = "use the chat template; default: if there is one"
    add("--apply-chat-template", action=action, default=None, help=text)
    text = "run code that tasks execute"
    add("--confirm-run-unsafe-code", action="store_true", default=False, help=text)
    add("--trust-remote-code", action="store_true", help="no effect: no model's code is run")
    args = parser.parse_args()
    # The extra's error names the command that installs it.
    from pyloss.interop.lm_eval import PylossLM  # isort: skip
    import lm_eval

    model = PylossLM(args.model, batch_size=args.batch_size, max_gen_toks=args.max_tokens)
    templated = args.apply_chat_template
    if templated is None:
        templated = model.tokenizer.chat_template is not None
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=args.tasks,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        apply_chat_template=templated,
        num_fewshot=args.num_shots,
        limit=args.limit,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        fewshot_random_seed=args.seed,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
    )["results"]
    shots = [] if args.num_shots is None else [f"{args.num_shots:02d}"]
    parts = ["eval", args.model.replace("/", "_"), version("lm_eval"), *shots, *args.tasks]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "_".join(parts), json.dumps(results, indent=4))
    out("Results:")
    for result in results.values():
        out(json.dumps(result, indent=4))


if __name__ == "__main__":
    as_command(main)
