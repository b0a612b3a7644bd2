"""The figure of points with names: each name is drawn, covers no other and lies in the picture; the front is a line."""

from itertools import combinations
from xml.etree import ElementTree

import pytest

from discrete_lit.evaluation.scatter import scatter


def drawn(names: list[str], **settings) -> ElementTree.Element:
    points = [(name, 10.0 + number / 100, 5.0 - number / 100, 0.01) for number, name in enumerate(names)]
    return ElementTree.fromstring(
        scatter([*points, ("far", 500.0, 80.0, 0.0)], x_name="calls", y_name="FD", logarithmic=True, **settings)
    )


@pytest.mark.parametrize("length", [3, 60])
def test_names_cover_no_other(length: int) -> None:
    names = [f"{'<' * length}{number}" for number in range(8)]
    texts = [text for text in drawn(names).iter("text") if text.text in (*names, "far")]
    assert {text.text for text in texts} == {*names, "far"}
    boxes = [(float(t.get("x", 0)), float(t.get("y", 0)), 5.8 * len(t.text or "")) for t in texts]
    for (x, y, width), (other_x, other_y, other_width) in combinations(boxes, 2):
        assert abs(y - other_y) > 11.8 or x + width <= other_x or other_x + other_width <= x
    assert all(x >= 0 and x + width <= 520.1 and 15 < y < 300 for x, y, width in boxes)


def test_the_front_is_a_line_and_the_others_are_grey() -> None:
    figure = drawn(["a", "b", "c"], front=[2, 0])
    circles = list(figure.iter("circle"))
    assert len({circles[0].get("fill"), circles[2].get("fill")}) == 1
    assert circles[1].get("fill") == circles[3].get("fill") != circles[0].get("fill")
    line = next(figure.iter("polyline")).get("points", "").split()
    assert line == [f"{circles[number].get('cx')},{circles[number].get('cy')}" for number in (0, 2)]
    assert not list(drawn(["a"]).iter("polyline"))
