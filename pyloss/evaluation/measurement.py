"""`measure`: scores a model on the records of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyloss.checks.numbers import whole
from pyloss.distributed import Group, group_of
from pyloss.evaluation.likelihood import score_targets
from pyloss.evaluation.metrics import ANSWER_METRICS, LOSS_METRICS, read_metrics
from pyloss.evaluation.questions import Question, read_question
from pyloss.generation import BatchGenerator, SamplingParams
from pyloss.io.bars import watched
from pyloss.tuner.data.batching import NoTargets
from pyloss.tuner.data.dataset_classes import CacheDataset

#: records whose losses are computed between two looks at the dataset
_AT_ONCE = 64


@dataclass
class Result:
    """What was measured on one record.

    Attributes:
        prompt, reference: the text that the model read, and the data's answer; None where no
            answer was generated.
        answer: the generated text, without the end token.
        finish_reason: "stop", or "length" for an answer that `max_tokens` cut.
        loss_sum, targets: the weighted sum of the target tokens' losses, and that of their weights.
        scores: by metric; None for the loss of a record without targets.
    """

    prompt: str | None = None
    reference: str | None = None
    answer: str | None = None
    finish_reason: str | None = None
    loss_sum: float = 0.0
    targets: float = 0.0
    scores: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Scores of a model.

    Attributes:
        metrics: names, in the order of the request.
        results: of each record.
        scores: by metric, over all records: `loss` is the mean over their target tokens,
            `perplexity` its exponential, the others are means over the records.
    """

    metrics: tuple[str, ...]
    results: list[Result]
    scores: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.scores = {name: self.total(name) for name in self.metrics}

    @property
    def cut(self) -> int:
        """The number of answers that `max_tokens` cut."""
        return sum(result.finish_reason == "length" for result in self.results)

    def terms(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """float64 [records] each: weighted scores and weights, whose sums' ratio is the score."""
        if metric not in LOSS_METRICS:
            values = np.array([result.scores[metric] for result in self.results], np.float64)
            return values, np.ones(len(values))
        sums = [(result.loss_sum, result.targets) for result in self.results]
        losses, targets = np.array(sums, np.float64).T
        return losses, targets

    def total(self, metric: str) -> float:
        """The metric over all records."""
        values, weights = self.terms(metric)
        return float(finished(metric, values.sum() / weights.sum()))


def finished(metric: str, mean: Any) -> Any:
    """The metric of a mean: a mean loss becomes a perplexity."""
    if metric != "perplexity":
        return mean
    with np.errstate(over="ignore"):
        return np.exp(mean)


def measure(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    metrics: str | Iterable[str] = LOSS_METRICS,
    *,
    max_tokens: int = 100,
    batch_size: int = 16,
    max_seq_length: int = 2048,
    limit: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
    group: Group | None = None,
) -> Evaluation:
    """Measures a model on a dataset of `load_dataset`.

    `loss` and `perplexity` are those of the dataset's target tokens, as `evaluate` computes them.
    The other metrics compare a greedy answer to the prompt of each record with the record's last
    assistant turn, see `evaluation.metrics`.

    Args:
        metrics: names from `METRICS`, in a list or a text with commas.
        max_tokens: of an answer.
        batch_size: answers that are generated at once.
        max_seq_length: tokens of a record that the losses are computed of.
        limit: measure the first records only.
        progress: called with the number of answers so far, and of all.
        group: the ranks that share the records (`pyloss.distributed`); None: all processes of MPI's
            launcher. All return the same evaluation.

    Raises:
        ValueError: an unknown metric, an empty dataset, or a record without a reference answer,
            such as plain text, where a metric needs one.
        NoTargets: no record has a target token, for `loss` and `perplexity`.
    """
    names = read_metrics(metrics)
    count = len(dataset) if limit is None else min(len(dataset), whole(limit, "limit", 1))
    if not count:
        raise ValueError("nothing to evaluate: the dataset is empty")
    answering = [name for name in names if name in ANSWER_METRICS]
    group = group_of(group)
    own = group.share(count)
    questions = [read_question(dataset, i, tokenizer) for i in own] if answering else []
    results = [Result() for _ in own]
    was_training = getattr(model, "training", False)
    model.eval()
    try:
        if len(answering) < len(names):
            _add_losses(results, own, names, model, dataset, max_seq_length)
        if answering:
            params = SamplingParams(max_tokens=max_tokens)
            generator = BatchGenerator(model, tokenizer, batch_size)
            running = generator.run([question.tokens for question in questions], params)
            shown = watched(running, "answering", "answer", len(own))
            for done, completion in enumerate(shown, 1):
                _add_answer(
                    results[completion.index], answering, questions[completion.index], completion
                )
                if progress is not None:
                    progress(min(done * group.size(), count), count)
    finally:
        model.train(was_training)
    results = group.collect(results)
    if len(answering) < len(names) and not any(result.targets for result in results):
        raise NoTargets("nothing to evaluate: the records have no target token")
    return Evaluation(names, results)


def _add_losses(
    results: list[Result],
    indices: Sequence[int],
    names: Iterable[str],
    model: Any,
    dataset: Any,
    max_seq_length: int,
) -> None:
    """Add the losses of the records with these `indices` to their `results`."""
    cache = dataset if isinstance(dataset, CacheDataset) else CacheDataset(dataset)
    for begin in watched(range(0, len(results), _AT_ONCE), "measuring losses", "part"):
        part = results[begin : begin + _AT_ONCE]
        own = indices[begin : begin + _AT_ONCE]
        samples = [cache.sample(index).cut(max_seq_length) for index in own]
        for result, sample, scores in zip(
            part, samples, score_targets(model, samples), strict=True
        ):
            weights = sample.weights[sample.weights > 0].astype(np.float64)
            result.targets, result.loss_sum = float(weights.sum()), float(scores.losses @ weights)
            loss = result.loss_sum / result.targets if result.targets else None
            for name in LOSS_METRICS:
                if name in names:
                    result.scores[name] = loss if loss is None else float(finished(name, loss))


def _add_answer(result: Result, names: Iterable[str], question: Question, completion: Any) -> None:
    result.prompt, result.reference = question.prompt, question.reference
    result.answer, result.finish_reason = completion.text, completion.finish_reason
    for name in names:
        result.scores[name] = ANSWER_METRICS[name](completion.text, question.reference)
