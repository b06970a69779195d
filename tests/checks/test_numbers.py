"""The reader of numbers: what it accepts, and one clear sentence for everything it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyloss.checks.numbers import real, whole


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)], ids=repr)
def test_whole_numbers_of_any_integer_type_are_ints(value: object) -> None:
    number = whole(value, "rank")
    assert type(number) is int and number == 3


def test_the_bounds_of_whole_belong_to_the_range() -> None:
    assert whole(1, "n", 1, 4) == 1 and whole(4, "n", 1, 4) == 4
    assert whole((1 << 63) - 1, "n") == (1 << 63) - 1 and whole(-(1 << 63), "n") == -(1 << 63)


@pytest.mark.parametrize(
    "value", [True, np.True_, 3.0, np.float32(3), "3", None, [3], np.array([3])], ids=repr
)
def test_what_is_not_an_integer_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=r"^rank is .*; it must be a whole number of at least 1$"):
        whole(value, "rank", 1)


@pytest.mark.parametrize(
    ("value", "low", "high", "message"),
    [
        (0, 1, None, "n is 0; it must be a whole number of at least 1"),
        (5, None, 4, "n is 5; it must be a whole number of at most 4"),
        (5, 1, 4, "n is 5; it must be a whole number from 1 to 4"),
        (
            1 << 63,
            1,
            None,
            "n is 9223372036854775808; it must be a whole number from 1 to 9223372036854775807",
        ),
        (
            1 << 63,
            None,
            None,
            "n is 9223372036854775808; it must be a whole number of at most 9223372036854775807",
        ),
        (
            -(1 << 63) - 1,
            None,
            None,
            "n is -9223372036854775809; it must be a whole number of at least -9223372036854775808",
        ),
        (
            -(10**100),
            1,
            None,
            "n is -10000000000000000000000000000000000000…; it must be a whole number of at least 1",
        ),
        (10**5000, 0, 7, "n is an integer of 16610 bits; it must be a whole number from 0 to 7"),
    ],
    ids=[
        "below",
        "above",
        "outside",
        "2^63 with a bound",
        "2^63",
        "-2^63 - 1",
        "-10^100",
        "10^5000",
    ],
)
def test_whole_numbers_out_of_range_are_named_with_it(
    value: int, low: int | None, high: int | None, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        whole(value, "n", low, high)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float32(2), np.float16(2), np.int32(2), np.array(2.0), np.longdouble(2)],
    ids=repr,
)
def test_numbers_of_any_real_type_are_floats(value: object) -> None:
    number = real(value, "scale")
    assert type(number) is float and number == 2.0


def test_bfloat16_scalars_are_numbers() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert real(ml_dtypes.bfloat16(1.5), "scale") == 1.5


def test_low_and_high_belong_to_the_range_and_above_and_below_do_not() -> None:
    assert real(0, "p", 0, 1) == 0.0 and real(1, "p", 0, 1) == 1.0
    for value in (0, 1):
        with pytest.raises(
            ValueError, match=r"^p is [01]; it must be a finite number above 0 and below 1$"
        ):
            real(value, "p", above=0, below=1)


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, np.float32("inf"), 10**400, -(10**5000)],
    ids=["inf", "-inf", "nan", "float32 inf", "10^400", "-10^5000"],
)
def test_infinite_and_too_large_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"^rate is .{1,60}; it must be a finite number$"):
        real(value, "rate")


@pytest.mark.parametrize(
    "value", [True, np.False_, "1e-5", None, 1j, [1.0], np.array([1.0])], ids=repr
)
def test_what_is_no_number_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match=r"^rate is .*; it must be a finite number of at least 0$"):
        real(value, "rate", 0)
