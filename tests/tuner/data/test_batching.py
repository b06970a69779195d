"""Batches: order, padding, targets, truncated and skipped samples, and resuming."""

import json

import numpy as np
import pytest
from fake import FakeTokenizer

from pyloss.tuner.data.batching import BatchIterator, dealt, iterate_batches
from pyloss.tuner.datasets import CacheDataset, ChatDataset, ConcatenatedDataset, TextDataset


def rows_of(lengths):
    """One row per length; its first token is the row's number."""
    return [([i, *[1] * (n - 1)], 1) for i, n in enumerate(lengths)]


def order_of(batches):
    return [row[0] for batch, _ in batches for row in batch.tolist()]


def chat(prompt, *more):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]
    return {"messages": [*turns, *more]}


class Group:
    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def test_shapes_dtypes_and_padding_to_the_longest_row_only():
    ((batch, lengths),) = iterate_batches([([5, 6, 7], 2), ([8, 9, 4, 3, 2], 0)], 4, 100)
    assert batch.dtype == lengths.dtype == np.int32
    assert batch.tolist() == [[5, 6, 7, 0, 0], [8, 9, 4, 3, 2]]
    assert lengths.tolist() == [[2, 3], [0, 5]]


def test_sorted_by_tokens_and_not_by_the_keys_of_a_record():
    texts = [
        {"text": "x" * n, **dict.fromkeys("abcdefg"[: n % 7])} for n in (1, 30, 2, 29, 3, 28, 4, 27)
    ]
    dataset = TextDataset(texts, FakeTokenizer())
    for data in (dataset, CacheDataset(dataset)):
        widths = [
            batch.shape[1] - lengths[:, 1].min() for batch, lengths in iterate_batches(data, 2, 100)
        ]
        assert widths == [1, 1, 1, 1]


def test_targets_end_at_the_last_token_and_not_in_the_padding():
    (pair,) = iterate_batches([[1, 2, 3], [1, 2, 3, 4, 5]], 2, 100)
    steps = np.arange(pair[0].shape[1])
    trained = (steps >= np.maximum(pair[1][:, :1], 1)) & (steps < pair[1][:, 1:])
    assert trained.sum(1).tolist() == [2, 4]


def test_end_token_is_trained_where_it_is_also_the_padding():
    tokenizer = FakeTokenizer()
    ((batch, lengths),) = iterate_batches(
        ChatDataset([chat("a"), chat("a longer one")], tokenizer, mask_prompt=True), 2, 100
    )
    for row, (first, n) in zip(batch, lengths):
        assert tokenizer.decode(row[first:n]) == "yes<|im_end|>\n"


def test_last_short_batch_is_used():
    batches = list(iterate_batches(rows_of([5] * 7), 3, 100))
    assert sorted(len(b) for b, _ in batches) == [1, 3, 3] and sorted(order_of(batches)) == list(
        range(7)
    )


def test_fewer_samples_than_the_batch_are_one_short_batch():
    ((batch, _),) = iterate_batches(rows_of([3, 4]), 8, 100)
    assert batch.shape == (2, 4)


def test_weights_where_targets_are_not_one_span():
    again = ({"role": "user", "content": "b"}, {"role": "assistant", "content": "no"})
    tokenizer = FakeTokenizer()
    data = ChatDataset([chat("a", *again), chat("b")], tokenizer, train_on="assistant")
    ((batch, weights),) = iterate_batches(data, 2, 200)
    assert weights.dtype == np.float32 and weights.shape == batch.shape
    decoded = [tokenizer.decode(row[w > 0]) for row, w in zip(batch, weights)]
    assert decoded == ["yes<|im_end|>\n", "yes<|im_end|>\nno<|im_end|>\n"]
    assert next(iterate_batches(ChatDataset([chat("b")], tokenizer, train_on="assistant"), 1, 200))[
        1
    ].shape == (1, 2)
    ((_, weights),) = iterate_batches([([1, 2, 3], [9, 0.25, 1])], 1, 200)
    assert weights.tolist() == [[0, 0.25, 1]]


def test_a_prompt_that_fills_the_window_is_skipped_and_counted(caplog):
    data = CacheDataset(
        ChatDataset([chat("x" * 90), chat("hi"), chat("ho")], FakeTokenizer(), mask_prompt=True)
    )
    batches = iterate_batches(data, 2, 64)
    ((batch, lengths),) = batches
    assert len(batch) == 2 and (lengths[:, 0] < lengths[:, 1]).all()
    assert (
        batches.report.samples,
        batches.report.used,
        batches.report.skipped,
        batches.report.cut,
    ) == (3, 2, 1, 0)
    assert "1 skipped, having no target within 64 tokens" in caplog.text


def test_a_long_sample_is_cut_counted_and_said_once(caplog):
    data = CacheDataset(rows_of([50, 3]))
    for _ in range(3):
        batches = iterate_batches(data, 2, 10)
        ((batch, lengths),) = batches
        assert batch.shape == (2, 10) and lengths[:, 1].tolist() == [3, 10]
    assert batches.report.cut == 1 and batches.report.tokens == 13 and batches.report.targets == 11
    assert caplog.text.count("1 longer than 10 tokens and cut") == 1


def test_nothing_is_said_where_all_is_well(caplog):
    assert (
        iterate_batches(rows_of([3, 4]), 2, 10).report.text
        == "2 of 2 samples used: 7 tokens, 5 of them targets"
    )
    assert not caplog.records


def test_data_without_a_target_is_an_error():
    with pytest.raises(ValueError, match="the dataset is empty"):
        iterate_batches([], 2, 10)
    with pytest.raises(
        ValueError, match="none of the 2 samples has a target within max_seq_length=10"
    ):
        iterate_batches([([1] * 30, 20), [4]], 2, 10)


@pytest.mark.parametrize("bad", [100, -1, 2**40])
def test_token_ids_outside_the_vocabulary(bad):
    with pytest.raises(
        ValueError,
        match=rf"sample 1, position 2: token id {bad} is outside the vocabulary \[0, 100\)",
    ):
        iterate_batches([[1, 2, 3], [4, 5, bad]], 2, 10, vocab_size=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"comm_group": Group(0, 3)}, "multiple of the 3 worker"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        iterate_batches(rows_of([3, 3, 3]), **{"batch_size": 2, "max_seq_length": 10, **options})


def test_records_that_nobody_tokenised():
    with pytest.raises(TypeError, match="record 0: a sample is a list of token ids"):
        iterate_batches([{"text": "a"}], 1, 10)
    with pytest.raises(ValueError, match="record 1: the record has no 'text'; its keys are 'body'"):
        iterate_batches(
            ConcatenatedDataset([TextDataset([{"text": "ab"}, {"body": "b"}], FakeTokenizer())]),
            1,
            10,
        )


def test_order_depends_on_seed_and_epoch_alone():
    data = rows_of(range(2, 40))
    orders = [order_of(iterate_batches(data, 3, 100, seed=s)) for s in (1, 1, 2, None, 0)]
    np.random.seed(5)
    assert orders[0] == orders[1] != orders[2] and orders[3] == orders[4]
    assert orders[0] != sorted(orders[0]) == list(range(38))
    batches = iterate_batches(data, 3, 100, loop=True, seed=1)
    epochs = [order_of(next(batches) for _ in range(batches.batches_per_epoch)) for _ in range(2)]
    assert epochs[0] == orders[0] != epochs[1] and sorted(epochs[1]) == list(range(38))


@pytest.mark.parametrize("done", [0, 1, 12, 13, 14, 30])
def test_resumed_batches_are_the_same_ones(done):
    data = rows_of(range(2, 40))
    whole = iterate_batches(data, 3, 100, loop=True, seed=7)
    for _ in range(done):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = iterate_batches(data, 3, 100, loop=True, seed=99)
    resumed.set_state(state)
    for _ in range(30):
        for a, b in zip(next(whole), next(resumed)):
            np.testing.assert_array_equal(a, b)
    assert whole.state() == resumed.state()


def test_a_state_of_any_size_is_refused_in_few_words():
    batches = BatchIterator(rows_of([3, 4, 5]), 2, 100)
    for key, value in (
        ("tokens", [9] * 50_000),
        ("samples", 10**400),
        ("seed", "x" * 10_000),
        ("epoch", {"a": 1}),
    ):
        with pytest.raises(ValueError, match=key) as error:
            batches.set_state({**batches.state(), key: value})
        assert len(str(error.value)) < 400


def test_a_state_of_other_data_is_refused():
    state = BatchIterator(rows_of([3, 4, 5]), 2, 100).state()
    with pytest.raises(ValueError, match="taken over other data"):
        BatchIterator(rows_of([3, 4, 5]), 1, 100).set_state(state)
    with pytest.raises(ValueError, match="position must be whole numbers"):
        BatchIterator(rows_of([3, 4, 5]), 2, 100).set_state({**state, "position": "x"})
    with pytest.raises(ValueError, match="taken over other data"):
        BatchIterator(rows_of([3, 4, 5]), 2, 100).set_state({**state, "position": 9})


@pytest.mark.parametrize("change", ["another order", "another token"])
def test_a_state_of_as_many_other_tokens_is_refused(change):
    rows = [([7, 8, 9], 1), ([7, 8, 6], 1)]
    state = BatchIterator(rows, 1, 100).state()
    other = rows[::-1] if change == "another order" else [rows[0], ([7, 8, 5], 1)]
    with pytest.raises(ValueError, match="over other data.*checksum"):
        BatchIterator(other, 1, 100).set_state(state)
    del state["checksum"]  # as older versions wrote it
    BatchIterator(other, 1, 100).set_state(state)


@pytest.mark.parametrize("n", [8, 9, 10, 11])
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_the_batches_of_one_worker(n, workers):
    """Also the short batch at the end of the order, in which some have no row."""
    data = rows_of(range(3, n + 3))
    parts = [
        list(iterate_batches(data, 4, 100, seed=3, comm_group=Group(r, workers)))
        for r in range(workers)
    ]
    whole = list(iterate_batches(data, 4, 100, seed=3))
    assert {len(part) for part in parts} == {len(whole)}
    for (batch, _), *shares in zip(whole, *parts):
        assert sorted(order_of([(batch, None)])) == sorted(order_of(shares))
        assert all(rows.shape[0] == lengths.shape[0] for rows, lengths in shares)
        assert all(lengths.shape[1] == 2 for _, lengths in shares)


def test_long_and_short_rows_are_dealt_alike():
    rng = np.random.default_rng(1)
    for workers in (2, 3, 4):
        lengths = rng.integers(5, 200, 8 * workers).tolist()
        parts = dealt(range(len(lengths)), lengths, workers)
        assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
        assert all(part == sorted(part) for part in parts)
        sums = [sum(lengths[row] for row in part) for part in parts]
        assert max(sums) <= 1.1 * min(sums)
    assert dealt([7], [9], 3) == [[7], [], []]
