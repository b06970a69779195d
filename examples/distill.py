"""Does distillation help a shallower student? The whole comparison in one script.

    python examples/distill.py [--small] [--seeds 3] [--iters 400] [--precision bfloat16]
        [--out build/distill]

Task 1: SmolLM2-135M, tuned on `examples/data` (spoken requests to JSON tool calls), teaches a
student of 12 of its 30 layers. The students train on the same number of batches: on the labels,
with forward KL, with Jensen-Shannon, from the teacher's stored top 64, and on answers that they
draw themselves. Exact match counts answers on requests whose phrasings are not in the training
data.

Task 2: the untuned model teaches the same student 2,000 lines of running text (Python's own
reference, which every Python carries); perplexity on the lines that follow.

Prints tables after each seed, and draws them with matplotlib. `results.json` in the output folder
has each result as soon as it is known: a run that was stopped goes on at the student at which it
stopped. --small runs everything in a minute on a model of random weights: it checks the script.
"""

import argparse
import math
import pydoc_data.topics
import time
from pathlib import Path

import numpy as np

import pyloss
from pyloss.checks.durations import duration_text
from pyloss.distillation.on_policy import OnPolicyLoss
from pyloss.distillation.stored import StoredTeacher, write_teacher
from pyloss.evaluation import measure
from pyloss.io.files import read_json, write_json
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


class Results:
    """The results of earlier and of this run: one for each task, way, seed and set of options."""

    def __init__(self, path, settings):
        self.path, self.settings = path, settings
        self.entries = read_json(path, list) if path.exists() else []

    def value(self, task, way, seed, measured):
        """The result of a way of training, from an earlier run or else by calling `measured`.

        `seed` is None for a model that is not trained here.
        """
        key = {"task": task, "way": way, "seed": seed, "settings": self.settings}
        said = f"{task}: {way}" + (f", seed {seed}" if seed is not None else "")
        for entry in self.entries:
            if all(entry.get(name) == value for name, value in key.items()):
                print(f"{said}: {entry['value']:.3f}, known from {self.path}; skipped", flush=True)
                return entry["value"]
        begin = time.monotonic()
        value = measured()
        seconds = round(time.monotonic() - begin, 1)
        self.entries.append({**key, "value": value, "seconds": seconds})
        write_json(self.path, self.entries)
        print(f"{said}: {value:.3f} after {duration_text(seconds)}", flush=True)
        return value


class Comparison:
    """One teacher, the students that learn from it in different ways, and their metric."""

    def __init__(self, options, task, source, tokenizer, train_set, metric):
        self.options, self.task, self.source, self.metric = options, task, source, metric
        self.tokenizer, self.train_set = tokenizer, train_set
        self.teacher, _ = pyloss.load(source)
        #: {name: [value of each seed]}
        self.found = {}

    def ways(self):
        """Functions that make the loss of each way of training, by its name.

        A student's loss is its own, so that a result does not depend on what was trained before.
        """
        live = self.teacher
        return {
            "labels": lambda: default_loss,
            "forward KL": lambda: pyloss.DistillationLoss(live, "forward-kl"),
            "Jensen-Shannon": lambda: pyloss.DistillationLoss(live, "js"),
            "stored top 64": lambda: pyloss.DistillationLoss(self.stored_teacher(), "forward-kl"),
            "on-policy": lambda: OnPolicyLoss(
                pyloss.DistillationLoss(live, "js"), self.tokenizer, 0.5, max_new_tokens=40
            ),
        }

    def stored_teacher(self):
        """The teacher's likeliest classes; a folder that has them already stays as it is."""
        place = self.options.out / f"{Path(self.source).name}-top64"
        write_teacher(
            self.teacher, self.train_set, place, tokenizer=self.tokenizer, top_k=64, overwrite=True
        )
        return StoredTeacher(place)

    def untrained(self):
        """The model with a student's layers."""
        model, _ = pyloss.load(self.source)
        prune_model(model, even_layers(len(model.layers), self.options.layers))
        return model

    def student(self, loss, seed):
        """A student that was trained with `loss`."""
        options = self.options
        pyloss.random.seed(seed)
        model = self.untrained()
        pyloss.tuner.unfreeze_layers(model, -1)
        schedule = pyloss.optim.WarmUp(options.rate, max(options.iters // 20, 1))
        pyloss.train(
            model,
            pyloss.optim.AdamW(schedule),
            self.train_set,
            args=TrainingArgs(
                iters=options.iters, batch_size=options.batch, seed=seed, adapter_file=None,
                steps_per_report=max(options.iters // 4, 1), max_grad_norm=1.0,
                matmul_precision=options.precision,
            ),
            loss=loss,
        )  # fmt: skip
        return model.eval()

    def measure_untrained(self, results):
        """The metric of the teacher and of the student before training."""
        for name, model in (
            ("teacher", lambda: self.teacher),
            ("untrained student", self.untrained),
        ):
            value = results.value(self.task, name, None, lambda of=model: self.metric(of()))
            self.found[name] = [value]

    def measure_seed(self, results, seed):
        """The metric of each way's student of one seed."""
        for name, loss in self.ways().items():
            value = results.value(
                self.task, name, seed, lambda of=loss: self.metric(self.student(of(), seed))
            )
            self.found.setdefault(name, []).append(value)

    def table(self, seeds):
        """Prints what is known after a number of seeds."""
        said = "1 seed" if seeds == 1 else f"{seeds} seeds"
        print(f"\n| {self.task} ({said}) | mean | lowest | highest |")
        print("| --- | ---: | ---: | ---: |")
        for name, values in self.found.items():
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
    kind = "small-teacher" if options.small else "teacher"
    place = options.out / f"{kind}-{options.teacher_iters}-{options.precision}"
    if place.exists():
        print(f"{place}: the teacher is there already", flush=True)
        return str(place)
    model, _ = pyloss.load(options.model)
    pyloss.linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0})
    pyloss.random.seed(0)
    pyloss.train(
        model,
        pyloss.optim.AdamW(1e-3),
        train_set,
        args=TrainingArgs(
            iters=options.teacher_iters, batch_size=8, seed=0, adapter_file=None,
            matmul_precision=options.precision,
        ),
    )  # fmt: skip
    # The folder has its name once it is whole.
    beside = place.with_name(f"{place.name}.part")
    model.fuse(dequantize=True).save(beside, tokenizer, overwrite=True)
    beside.rename(place)
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
    parser.add_argument("--seeds", type=int, help="students of each kind (3; --small: 1)")
    parser.add_argument("--iters", type=int, default=400, help="batches of a student's training")
    parser.add_argument("--teacher-iters", type=int, default=200, help="of the teacher's")
    parser.add_argument("--layers", type=int, default=12, help="layers of a student")
    parser.add_argument("--batch", type=int, default=8, help="records of a batch")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of a student")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "mixed"), default="float32",
        help="of the matrix products in training, as in pyloss train",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="random weights, a few steps")
    options = parser.parse_args()
    options.seeds = options.seeds or (1 if options.small else 3)
    options.out.mkdir(parents=True, exist_ok=True)
    options.model = "smollm2-135m"
    _, tokenizer = pyloss.load(options.model)
    lines = running_text()[: LINES + TEST_LINES]
    if options.small:
        options.model = small_model(options.out / "small", tokenizer)
        options.iters, options.teacher_iters, options.layers = 2, 2, 2
        lines = lines[: TEST_LINES + 40]
    train_set, _, test_set = pyloss.load_dataset(HERE / "data", tokenizer, mask_prompt=True)
    names = ("small", "iters", "teacher_iters", "layers", "batch", "rate", "precision")
    results = Results(
        options.out / "results.json", {name: getattr(options, name) for name in names}
    )

    def exact_match(model):
        limit = 4 if options.small else None
        found = measure(model, tokenizer, test_set, "exact-match", max_tokens=40, limit=limit)
        return found.scores["exact-match"]

    text_test = chunks(lines[-TEST_LINES:], tokenizer)

    def perplexity(model):
        return math.exp(evaluate(model, text_test, options.batch))

    teacher = tuned_teacher(options, train_set, tokenizer)
    text_set = chunks(lines[:-TEST_LINES], tokenizer)
    tasks = [
        Comparison(options, "requests, exact match", teacher, tokenizer, train_set, exact_match),
        Comparison(
            options, "running text, perplexity", options.model, tokenizer, text_set, perplexity
        ),
    ]
    for task in tasks:
        task.measure_untrained(results)
    # All ways of the first seed are a first picture long before the last seed.
    for seed in range(options.seeds):
        for task in tasks:
            task.measure_seed(results, seed)
        for task in tasks:
            task.table(seed + 1)
        draw({task.task: task.found for task in tasks}, options.out / "distill.svg")


if __name__ == "__main__":
    main()
