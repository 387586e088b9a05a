"""A sweep as a picture: accuracy against what the exits answer, and against what is sent."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from splitee.sweep import Point

_NAMED = 12  # clients at most that a legend has room for


def draw(
    points: Mapping[str, Sequence[Point]], cuts: Mapping[str, str], threshold: float, raw: int
) -> bytes:
    """A PNG. threshold: of the run, which is marked. raw: bytes of an image as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (client, mine) in enumerate(points.items()):
        label = f"{client} ({cuts[client]})"
        accuracies = [100 * p.accuracy for p in mine]
        at = min(range(len(mine)), key=lambda k: abs(mine[k].threshold - threshold))
        for axis, values in (
            (left, [100 * p.share_at_exit for p in mine]),
            (right, [p.bytes_sent for p in mine]),
        ):
            axis.plot(values, accuracies, f"C{i}.-", label=label)
            axis.plot(values[at], accuracies[at], "o", ms=9, mfc="none", color=f"C{i}")
    left.plot([], [], "o", ms=9, mfc="none", color="gray", label=f"entropy up to {threshold:g}")
    left.set_title("accuracy of exit and server together, %")
    left.set_xlabel("answered at the exit, % of the samples")
    right.set_title("the same, by what it costs")
    right.set_xlabel("bytes sent a sample")
    right.axvline(raw, color="gray", ls="--", lw=1)
    right.annotate(
        "an image\nas it is", (raw, 0), (4, 6), xycoords=("data", "axes fraction"),
        textcoords="offset points", color="gray", fontsize=8,
    )  # fmt: skip
    for axis in (left, right):
        axis.grid(alpha=0.3)
    if len(points) <= _NAMED:
        left.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    return image.getvalue()
