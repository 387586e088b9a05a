"""What thresholds decide, worked by hand."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest

from splitee.sweep import THRESHOLDS, Cost, Point, best, sweep, table, telling
from splitee.sweep_plot import draw
from splitee.train import Answers

# Of two classes, the entropies of p = 1/2, 3/4 and 9/10 are 1, 0.811 and 0.469 bits. The exit is
# right where it is surest, and at one of the others.
ANSWERS = Answers(
    labels=np.array([0, 0, 1, 1], np.uint8),
    exit_logits=np.log(np.array([[9, 1], [1, 3], [1, 1], [1, 3]], np.float64)),
    server_logits=np.array([[0, 1], [1, 0], [0, 1], [1, 0]], np.float64),
    client_seconds=0.008,
    server_seconds=0.004,
)
COST = Cost(sent_bytes=100)


@pytest.mark.parametrize(
    ("threshold", "share", "at_exit", "at_server", "together", "sent", "ms"),
    [
        (0.4, 0.0, None, 2 / 4, 2 / 4, 100, 2 + 1),
        (0.5, 1 / 4, 1.0, 2 / 3, 3 / 4, 75, 2 + 0.75),
        (0.9, 3 / 4, 2 / 3, 1.0, 3 / 4, 25, 2 + 0.25),
        (1.0, 1.0, 2 / 4, None, 2 / 4, 0, 2),
    ],
)
def test_a_point_is(
    threshold: float,
    share: float,
    at_exit: float | None,
    at_server: float | None,
    together: float,
    sent: float,
    ms: float,
) -> None:
    (point,) = sweep(ANSWERS, COST, [threshold])
    assert (point.threshold, point.share_at_exit) == (threshold, share)
    assert (point.accuracy_at_exit, point.accuracy_at_server) == (at_exit, at_server)
    assert (point.accuracy, point.bytes_sent) == (together, sent)
    assert point.ms == pytest.approx(ms)


def test_a_temperature_moves_who_answers() -> None:
    # at 2, p = 3/4 of what was 9/10, and 0.634 of what was 3/4
    entropies = [0.811, 0.948]
    for threshold, share in ((entropies[0] - 0.01, 0.0), (entropies[0] + 0.01, 1 / 4)):
        (point,) = sweep(ANSWERS, COST, [threshold], temperature=2.0)
        assert point.share_at_exit == share
    (point,) = sweep(ANSWERS, COST, [entropies[1] + 0.01], temperature=2.0)
    assert point.share_at_exit == 3 / 4


def test_the_time_of_a_link_is_that_of_its_rate() -> None:
    (slow,) = sweep(ANSWERS, Cost(100, rate=8000), [0.5])  # 1000 bytes per second
    (fast,) = sweep(ANSWERS, COST, [0.5])
    assert slow.ms - fast.ms == pytest.approx(3 / 4 * 100)


def test_thresholds_go_from_one_end_to_the_other() -> None:
    assert THRESHOLDS[0] == 0
    assert THRESHOLDS[-1] == 1
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS))
    shares = [p.share_at_exit for p in sweep(ANSWERS, COST)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)


def point(threshold: float, share: float, accuracy: float) -> Point:
    return Point(threshold, share, None, None, accuracy, 100 * (1 - share), 1.0)


def test_the_rows_that_say_most_are_the_ends_the_best_and_some_between() -> None:
    shares = (0, 0.1, 0.19, 0.2, 0.41, 0.6, 0.61, 0.9, 0.99, 1)
    points = [point(i / 10, share, 0.9) for i, share in enumerate(shares)]
    points[8] = replace(points[8], accuracy=0.95)
    found = [p.share_at_exit for p in telling(points)]
    assert found == [0, 0.2, 0.41, 0.6, 0.9, 0.99, 1]
    assert best(points) is points[8]
    assert best(points[:8]) is points[7]  # of equal ones that which sends least
    assert telling(points[:1]) == points[:1]


def test_the_table_has_a_line_for_each_client_and_threshold() -> None:
    points = {"a": sweep(ANSWERS, COST, [0.4, 1.0]), "b": sweep(ANSWERS, COST, [0.5])}
    lines = list(csv.DictReader(io.StringIO(table(points))))
    assert [(r["client"], float(r["threshold"])) for r in lines] == [
        ("a", 0.4), ("a", 1.0), ("b", 0.5)
    ]  # fmt: skip
    assert lines[0]["accuracy_at_exit"] == ""
    assert float(lines[2]["accuracy_at_server"]) == pytest.approx(2 / 3)
    assert math.isclose(float(lines[2]["ms"]), 2.75)


def test_the_picture_is_a_png() -> None:
    image = draw({"a": sweep(ANSWERS, COST)}, {"a": "stem"}, 0.5, 64)
    assert image.startswith(b"\x89PNG")
