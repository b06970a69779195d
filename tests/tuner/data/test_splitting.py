"""Cutting validation and test data: reproducible, and never through a prompt or conversation."""

import pytest

from pyloss.tuner.data.splitting import cut, split_keys

KEYS = [[f"prompt {i % 400}"] for i in range(1000)]


def sides(keys, *shares):
    """The split of each record, by its keys."""
    return {keys[i][0]: side for side, part in enumerate(cut(keys, *shares)) for i in part}


def test_shares_are_about_what_is_asked_for_and_each_record_is_in_one_split():
    train, valid, test = cut(KEYS, 0.1, 0.2)
    assert sorted(train + valid + test) == list(range(1000))
    assert 50 < len(valid) < 150 and 130 < len(test) < 270
    assert train == sorted(train)


def test_equal_prompts_are_on_one_side():
    parts = [{KEYS[i][0] for i in part} for part in cut(KEYS, 0.1, 0.2)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_a_record_keeps_its_side_when_others_are_added_moved_or_the_other_share_changes():
    before, more = sides(KEYS[:200], 0.1, 0.2), sides(KEYS[::-1], 0.1, 0.2)
    assert all(more[key] == side for key, side in before.items())
    alone = sides(KEYS, 0.1, 0.0)
    assert {key for key, side in alone.items() if side == 1} == {
        key for key, side in more.items() if side == 1
    }


def test_records_joined_by_others_are_on_one_side():
    keys = [[f"prompt {i}", f"conversation_id {i // 2}"] for i in range(200)]
    keys += [["prompt 0", "conversation_id 50"]]
    for part in cut(keys, 0.3, 0.3):
        assert all(i ^ 1 in part for i in part if i < 200)
        assert len({0, 1, 100, 101, 200} & set(part)) in (0, 5)


def test_small_sets_get_a_record_each_and_none_without_need():
    assert [len(part) for part in cut([["a"], ["b"], ["c"]], 0.01, 0.01)] == [1, 1, 1]
    assert [len(part) for part in cut([["a"], ["b"]], 0.0, 0.0)] == [2, 0, 0]
    assert [len(part) for part in cut([["a"], ["a"]], 0.9, 0.0)] == [2, 0, 0]
    assert [len(part) for part in cut([["a"], ["b"]], 0.9999, 0.00005)] == [1, 1, 0]
    assert cut([], 0.1, 0.1) == ([], [], [])


@pytest.mark.parametrize(
    ("keys", "shares", "message"),
    [
        ([["a"]] * 3, (1.0, 0), "valid_split is 1.0, and must be a share"),
        ([["a"]] * 3, (0, "half"), "test_split is 'half', and must be a share"),
        (KEYS, (0.5, 0.5), "leave nothing to train on"),
    ],
)
def test_what_cannot_be_cut(keys, shares, message):
    with pytest.raises(ValueError, match=message):
        cut(keys, *shares)


def test_keys_of_records():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": " a\n b"}]},
        {"role": "assistant", "content": "c"},
    ]
    given = {"conversation_id": 7}
    assert split_keys({"messages": turns}, given) == ["conversation_id 7", "prompt a b"]
    assert split_keys({"prompt": "a b"}, {}) == split_keys({"text": "a  b"}, {}) == ["prompt a b"]
    image = [{"role": "assistant", "content": [{"type": "image"}]}]
    assert split_keys({"messages": image}, {}) == ['prompt [{"type": "image"}]']
