"""Curves and bars: what is drawn, where, and what is left out."""

import math
import re
from xml.etree import ElementTree

import pytest

from pyloss.reports.charts import bars, curves


def svg(figure):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.DOTALL)[0])


def test_points_lie_where_their_numbers_say():
    drawn = svg(curves("Loss", {"training": [(0, 4.0), (5, 2.0), (10, 0.0)], "validation": []}))
    circles = [node for node in drawn if node.tag == "circle"]
    x, y = ([float(node.get(name)) for node in circles] for name in ("cx", "cy"))
    assert x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.2)
    assert y[1] == pytest.approx((y[0] + y[2]) / 2, abs=0.2) and y[0] < y[2]
    assert [node[0].text for node in circles] == [
        f"training, iteration {i}: {value}" for i, value in ((0, 4), (5, 2), (10, 0))
    ]
    assert "Loss over the iterations: training from 4 to 0" in drawn.get("aria-label")


def test_all_is_inside_of_the_picture_and_the_scale_begins_at_0():
    for values in ([1e-5] * 3, [3.0], [-2.0, 5.0], [1e9, 2e9], [0.0, 0.0]):
        drawn = svg(curves("x", {"a": list(enumerate(values))}))
        _, _, width, height = map(float, drawn.get("viewBox").split())
        for node in drawn:
            if node.tag == "circle":
                assert 0 <= float(node.get("cx")) <= width and 0 <= float(node.get("cy")) <= height
        labels = [node.text for node in drawn if node.tag == "text"]
        assert "0" in labels, values


def test_many_points_are_averaged():
    points = [(i, float(i % 2)) for i in range(1, 1001)]
    drawn = svg(curves("x", {"a": points}))
    titles = [node[0].text for node in drawn if node.tag == "circle"]
    assert len(titles) == 200 and titles[-1].startswith("a, iteration 1,000: 0.")


def test_nothing_to_draw():
    assert curves("x", {"a": []}) == ""
    assert curves("x", {"a": [(1, math.nan), (2, math.inf)]}) == ""


def test_bars_are_relative_to_the_largest():
    drawn = ElementTree.fromstring(bars([("a<b", 0.02), ("c", 0.01), ("d", math.inf)]))
    assert [item[0].text for item in drawn] == ["a<b", "c", "d"]
    assert [item[1][0].get("style") for item in drawn] == [
        "width:100.0%",
        "width:50.0%",
        "width:100.0%",
    ]
    assert [item[2].text for item in drawn] == ["2.000%", "1.000%", "from 0"]
