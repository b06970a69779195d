"""The whole workflow in one script: load, measure, fine-tune, measure, save, fuse, reload.

    python examples/demo.py [--out build/demo] [--iters 200]

Fine-tunes the embedded SmolLM2-135M on `examples/data` (spoken requests to JSON tool calls) and
counts exact answers on requests whose phrasings are not in the training data.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import pyloss
from pyloss import evaluation

HERE = Path(__file__).resolve().parent


def measure(model, tokenizer, test):
    """Prints the test loss and the number of exact answers, and returns what was measured."""
    began = time.perf_counter()
    found = evaluation.measure(model, tokenizer, test, ["loss", "exact-match"], max_tokens=40)
    seconds = time.perf_counter() - began
    right, count = right_answers(found), len(found.results)
    print(f"test loss {found.scores['loss']:.3f}, exact match {right}/{count}   ({seconds:.0f} s)")
    return found


def right_answers(found):
    return sum(result.scores["exact-match"] == 1 for result in found.results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/demo"),
        help="folder for the adapter and the fused model",
    )
    parser.add_argument("--iters", type=int, default=200, help="training iterations")
    options = parser.parse_args()
    began = time.perf_counter()

    pyloss.random.seed(0)
    model, tokenizer = pyloss.load("smollm2-135m")
    train, valid, test = pyloss.load_dataset(HERE / "data", tokenizer, mask_prompt=True)

    print("== the base model")
    before = measure(model, tokenizer, test)

    print("\n== fine-tuning")
    pyloss.linear_to_lora_layers(
        model, num_layers=-1, config={"rank": 8, "scale": 2.0, "dropout": 0.0}
    )
    schedule = pyloss.optim.build_schedule(
        {"name": "cosine_decay", "warmup": 10, "arguments": [1e-3, options.iters, 1e-4]}
    )
    arguments = pyloss.TrainingArgs(
        iters=options.iters,
        batch_size=4,
        val_batches=-1,
        steps_per_report=20,
        steps_per_eval=100,
        max_seq_length=256,
        adapter_file=options.out / "adapter" / "adapters.safetensors",
        seed=0,
        overwrite=True,  # this script owns the folder
    )
    pyloss.train(model, pyloss.optim.AdamW(schedule), train, valid, arguments)

    print("\n== the fine-tuned model")
    after = measure(model, tokenizer, test)
    for i in range(3):
        print(f"\n  request:  {test[i]['messages'][-2]['content']}")
        print(f"  expected: {after.results[i].reference}")
        print(f"  before:   {before.results[i].answer!r}")
        print(f"  after:    {after.results[i].answer}")

    print("\n== fused and loaded again")
    model.fuse(dequantize=True)
    model.save(options.out / "fused", tokenizer, overwrite=True)
    fused, fused_tokenizer = pyloss.load(options.out / "fused")
    again = evaluation.measure(fused, fused_tokenizer, test, "exact-match", max_tokens=40, limit=20)
    same = sum(a.answer == b.answer for a, b in zip(again.results, after.results[:20], strict=True))
    print(f"{options.out / 'fused'}: the same answer to {same} of 20 requests")
    print(f"adapter: {options.out / 'adapter'}")
    print(f"\nall in {time.perf_counter() - began:.0f} s")
    folder = Path(sys.executable).parent
    if (folder / "pyloss").exists() and shutil.which("pyloss") is None:
        here = os.path.relpath(folder)
        print(f"The command line is {here}/pyloss, or pyloss after `source {here}/activate`.")
    return 0 if same == 20 and right_answers(after) > len(test) // 2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
