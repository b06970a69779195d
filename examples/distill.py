"""Does distillation help a shallower student? The whole comparison in one script.

    python examples/distill.py [--small] [--seeds 3] [--iters 400] [--out build/distill]

Task 1: SmolLM2-135M, tuned on `examples/data` (spoken requests to JSON tool calls), teaches a
student of 12 of its 30 layers. The students train on the same number of batches: on the labels,
with forward KL, with Jensen-Shannon, from the teacher's stored top 64, and on answers that they
draw themselves. Exact match counts answers on requests whose phrasings are not in the training
data.

Task 2: the untuned model teaches the same student 2,000 lines of running text (Python's own
reference, which every Python carries); perplexity on the lines that follow.

Prints tables, and draws them with matplotlib. --small runs everything in a minute on a model of
random weights: it checks the script.
"""

import argparse
import math
import pydoc_data.topics
from pathlib import Path

import numpy as np

import pyloss
from pyloss.distillation.on_policy import OnPolicyLoss
from pyloss.distillation.stored import StoredTeacher, write_teacher
from pyloss.evaluation import measure
from pyloss.models.pruning import even_layers, prune_model
from pyloss.tuner import TrainingArgs, evaluate
from pyloss.tuner.losses import default_loss

HERE = Path(__file__).resolve().parent
LINES, TEST_LINES, LINES_TOGETHER = 2000, 200, 10


def running_text():
    """Lines of Python's reference, without empty ones, headings' underlines and code."""
    topics = pydoc_data.topics.topics
    lines = (line for name in sorted(topics) for line in topics[name].splitlines())
    return [line.strip() for line in lines if len(line.split()) > 5 and "   " not in line.strip()]


def chunks(lines, tokenizer):
    texts = [" ".join(lines[i : i + LINES_TOGETHER]) for i in range(0, len(lines), LINES_TOGETHER)]
    return pyloss.TextDataset([{"text": text} for text in texts], tokenizer)


class Comparison:
    """One teacher, and the students that learn from it in different ways."""

    def __init__(self, options, source, tokenizer, train_set):
        self.options, self.source, self.tokenizer = options, source, tokenizer
        self.train_set = train_set
        self.teacher, _ = pyloss.load(source)

    def losses(self):
        """The loss of each way of training, by its name."""
        live = self.teacher
        place = self.options.out / f"{Path(self.source).name}-top64"
        # Written once: a folder of the same teacher and data stays.
        write_teacher(
            live, self.train_set, place, tokenizer=self.tokenizer, top_k=64, overwrite=True
        )
        return {
            "labels": default_loss,
            "forward KL": pyloss.DistillationLoss(live, "forward-kl"),
            "Jensen-Shannon": pyloss.DistillationLoss(live, "js"),
            "stored top 64": pyloss.DistillationLoss(StoredTeacher(place), "forward-kl"),
            "on-policy": OnPolicyLoss(
                pyloss.DistillationLoss(live, "js"), self.tokenizer, 0.5, max_new_tokens=40
            ),
        }

    def student(self, loss, seed):
        """A student that was trained with `loss`."""
        options = self.options
        pyloss.random.seed(seed)
        model, _ = pyloss.load(self.source)
        prune_model(model, even_layers(len(model.layers), options.layers))
        pyloss.tuner.unfreeze_layers(model, -1)
        schedule = pyloss.optim.WarmUp(options.rate, max(options.iters // 20, 1))
        pyloss.train(
            model,
            pyloss.optim.AdamW(schedule),
            self.train_set,
            args=TrainingArgs(
                iters=options.iters, batch_size=options.batch, seed=seed, adapter_file=None,
                steps_per_report=max(options.iters // 4, 1), max_grad_norm=1.0,
            ),
            loss=loss,
        )  # fmt: skip
        return model.eval()


def compare(comparison, metric, seeds):
    """The metric of each way by seed: {name: [value, ...]}, the teacher's and the untrained's."""
    untrained, _ = pyloss.load(comparison.source)
    prune_model(untrained, even_layers(len(untrained.layers), comparison.options.layers))
    found = {"teacher": [metric(comparison.teacher)], "untrained student": [metric(untrained)]}
    for name, loss in comparison.losses().items():
        found[name] = []
        for seed in range(seeds):
            found[name].append(metric(comparison.student(loss, seed)))
            print(f"{name}, seed {seed}: {found[name][-1]:.3f}", flush=True)
    return found


def table(title, found):
    print(f"\n| {title} | mean | lowest | highest |\n| --- | ---: | ---: | ---: |")
    for name, values in found.items():
        print(f"| {name} | {np.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    print(flush=True)


def draw(results, path):
    """A bar for each way, with a line from the lowest to the highest seed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 3.5))
    for axis, (title, found) in zip(np.atleast_1d(axes), results.items(), strict=True):
        means = [np.mean(values) for values in found.values()]
        ends = [
            [m - min(v) for m, v in zip(means, found.values(), strict=True)],
            [max(v) - m for m, v in zip(means, found.values(), strict=True)],
        ]
        axis.barh(list(found), means, xerr=ends, color="#4477aa")
        axis.invert_yaxis()
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
    print(f"drew {path}")


def tuned_teacher(options, train_set, tokenizer):
    """The folder of the model tuned on the requests; it is trained once."""
    place = options.out / f"teacher-{options.teacher_iters}"
    if not (place / "config.json").exists():
        model, _ = pyloss.load(options.model)
        pyloss.linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0})
        pyloss.random.seed(0)
        pyloss.train(
            model,
            pyloss.optim.AdamW(1e-3),
            train_set,
            args=TrainingArgs(iters=options.teacher_iters, batch_size=8, adapter_file=None),
        )
        model.fuse(dequantize=True).save(place, tokenizer)
    return str(place)


def small_model(place, tokenizer):
    """A folder with a model of random weights and the embedded model's tokenizer."""
    from dataclasses import replace

    from pyloss.models.synthetic import SMALL, random_model

    config = replace(
        SMALL, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    random_model(config).save(place, tokenizer, overwrite=True)
    return str(place)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/distill"), help="folder to write")
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind")
    parser.add_argument("--iters", type=int, default=400, help="batches of a student's training")
    parser.add_argument("--teacher-iters", type=int, default=200, help="of the teacher's")
    parser.add_argument("--layers", type=int, default=12, help="layers of a student")
    parser.add_argument("--batch", type=int, default=8, help="records of a batch")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of a student")
    parser.add_argument("--small", action="store_true", help="random weights, a few steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.model = "smollm2-135m"
    _, tokenizer = pyloss.load(options.model)
    lines = running_text()[: LINES + TEST_LINES]
    if options.small:
        options.model = small_model(options.out / "small", tokenizer)
        options.seeds, options.iters, options.teacher_iters, options.layers = 1, 2, 2, 2
        lines = lines[: TEST_LINES + 40]
    train_set, _, test_set = pyloss.load_dataset(HERE / "data", tokenizer, mask_prompt=True)
    results = {}

    teacher = tuned_teacher(options, train_set, tokenizer)
    requests = Comparison(options, teacher, tokenizer, train_set)
    title, limit = "requests, exact match", 4 if options.small else None

    def exact_match(model):
        found = measure(model, tokenizer, test_set, "exact-match", max_tokens=40, limit=limit)
        return found.scores["exact-match"]

    results[title] = compare(requests, exact_match, options.seeds)
    table(title, results[title])

    text_test = chunks(lines[-TEST_LINES:], tokenizer)
    text = Comparison(options, options.model, tokenizer, chunks(lines[:-TEST_LINES], tokenizer))
    title = "running text, perplexity"
    results[title] = compare(
        text, lambda model: math.exp(evaluate(model, text_test, options.batch)), options.seeds
    )
    table(title, results[title])
    draw(results, options.out / "distill.svg")


if __name__ == "__main__":
    main()
