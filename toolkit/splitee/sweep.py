"""What an entropy threshold decides: who answers how well, what is sent, and how long it takes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from splitee.certainty import entropy, unsure
from splitee.train import Answers

_SMALL = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04)
THRESHOLDS = (*_SMALL, *(round(0.05 * i, 2) for i in range(1, 21)))
"""Of normalised entropy: from where the server answers (nearly) all to where the exit does.

Closer where exits that have learnt much are: most of their entropies are small.
"""


@dataclass(frozen=True)
class Cost:
    """What a client's answers take."""

    sent_bytes: float  # that it sends, frames included, for a sample that the server answers
    rate: float | None = None  # bits per second of its link to the server; None: is not counted


@dataclass(frozen=True)
class Point:
    """A client at one threshold. Shares and accuracies are 0..1, None of no samples."""

    threshold: float
    share_at_exit: float
    accuracy_at_exit: float | None  # of those that the exit answers
    accuracy_at_server: float | None  # of the others
    accuracy: float
    bytes_sent: float  # mean over all samples
    ms: float  # the same: both halves as measured where they were tested, and the link by its rate


def sweep(
    answers: Answers,
    cost: Cost,
    thresholds: Sequence[float] = THRESHOLDS,
    temperature: float = 1.0,
) -> list[Point]:
    """A point for each threshold. temperature: of the exit."""
    entropies = entropy(answers.exit_logits, temperature)
    exit_right = answers.exit_logits.argmax(1) == answers.labels
    server_right = answers.server_logits.argmax(1) == answers.labels
    samples = len(answers.labels)
    client_ms = 1000 * answers.client_seconds / samples
    sent_ms = 1000 * answers.server_seconds / samples  # of a sample that is sent
    if cost.rate:
        sent_ms += 1000 * 8 * cost.sent_bytes / cost.rate
    points = []
    for threshold in thresholds:
        asked = unsure(entropies, threshold)
        here, there = exit_right[~asked], server_right[asked]
        share = len(there) / samples
        points.append(
            Point(
                threshold,
                len(here) / samples,
                float(here.mean()) if len(here) else None,
                float(there.mean()) if len(there) else None,
                float(here.sum() + there.sum()) / samples,
                share * cost.sent_bytes,
                client_ms + share * sent_ms,
            )
        )
    return points


def best(points: Sequence[Point]) -> Point:
    """The most accurate; of equal ones that which sends least."""
    return max(points, key=lambda p: (p.accuracy, -p.bytes_sent))


def telling(points: Sequence[Point], rows: int = 6) -> list[Point]:
    """Those of a client's points that say most, in their order.

    The first and the last, the best, and those between whose shares at the exit are spread most
    evenly.
    """
    shares = [i / (rows - 1) for i in range(1, rows - 1)]
    near = [min(points, key=lambda p: abs(p.share_at_exit - share)) for share in shares]
    chosen = {id(p) for p in (points[0], points[-1], best(points), *near)}
    return [p for p in points if id(p) in chosen]


def table(points: Mapping[str, Sequence[Point]]) -> str:
    """CSV: a line for each client and threshold."""
    text = io.StringIO()
    names = ["client", *(f.name for f in fields(Point))]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for client, mine in points.items():
        for point in mine:
            writer.writerow({"client": client} | asdict(point))
    return text.getvalue()
