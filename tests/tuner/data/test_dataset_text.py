"""How datasets are shown."""

from fake import FakeTokenizer

from pyloss.tuner import datasets as ds
from pyloss.tuner.data.dataset_text import shortened

TEXTS = [{"text": "<b>" + "long " * 50}, {"text": "two"}, {"text": "three"}, {"text": "four"}]
CHATS = [{"messages": [{"role": "user", "content": str(i)} for i in range(5)]}] * 1200


def test_counts_and_the_first_record():
    texts = ds.TextDataset(TEXTS, FakeTokenizer())
    cut = ("<b>" + "long " * 50)[:60]
    assert repr(texts) == (f"TextDataset(4 records, train_on='all'; first: {{'text': {cut!r}...}})")
    chats = ds.ChatDataset(CHATS, FakeTokenizer(), mask_prompt=True)
    assert repr(chats) == (
        "ChatDataset(1,200 records, train_on='last'; first: {'messages': ["
        "{'role': 'user', 'content': '0'}, {'role': 'user', 'content': '1'}, ... 3 more]})"
    )
    both = ds.ConcatenatedDataset([texts, chats])
    assert repr(both).startswith(
        "ConcatenatedDataset(1,204 records, 4 of TextDataset, 1,200 of ChatDataset; first: {"
    )


def test_a_cache_tokenizes_nothing_to_be_shown():
    cache = ds.CacheDataset(ds.TextDataset(TEXTS, FakeTokenizer()))
    assert repr(cache).startswith("CacheDataset(4 records, 0 tokenized, of TextDataset; first: {")
    cache._repr_html_()
    cache.sample(1)
    assert "4 records, 1 tokenized" in repr(cache)


def test_html_has_three_records():
    page = ds.TextDataset(TEXTS, FakeTokenizer())._repr_html_()
    assert "4 records" in page and page.count("<tr>") == 4
    assert "<b>" not in page and "&lt;b&gt;" in page


def test_an_empty_dataset():
    empty = ds.CacheDataset([])
    assert repr(empty) == "CacheDataset(0 records, 0 tokenized, of list)"
    assert "<table>" not in empty._repr_html_()
    assert repr(ds.TextDataset(TEXTS[1:2], None)).startswith("TextDataset(1 record, ")


def test_shortened_records():
    assert shortened((1, 2, 3)) == "(1, 2, ... 1 more)"
    assert shortened([[1], "a"]) == "[[1], 'a']"
    assert len(shortened(b"x" * 1000)) < 150
