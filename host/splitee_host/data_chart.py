"""A picture of which client holds what: bars of its classes, or a map where they are many."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from splitee.ops import Array

BARS = (48, 20)  # clients and classes that bars can show: a bar has to be seen, a colour be told


def draw(title: str, clients: Sequence[str], classes: Sequence[str], counts: Array) -> bytes:
    """A PNG. counts: samples, (clients, classes)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = min(max(2.6, 1.5 + 0.32 * len(clients)), 9)  # inches
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    if len(clients) <= BARS[0] and len(classes) <= BARS[1]:
        _bars(axis, clients, classes, counts)
    else:
        _map(figure, axis, clients, classes, counts)
    axis.set_title(title, loc="left", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    return image.getvalue()


def _bars(axis: Any, clients: Sequence[str], classes: Sequence[str], counts: Array) -> None:
    """A bar for each client, from top to bottom in the fleet file's order."""
    import matplotlib

    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"](range(len(classes)))
    rows = np.arange(len(clients))
    left = np.zeros(len(clients))
    for number, name in enumerate(classes):
        axis.barh(rows, counts[:, number], 0.8, left, color=colours[number], label=name,
                  edgecolor="white", linewidth=0.6)  # fmt: skip
        left += counts[:, number]
    for row, total in zip(rows, left, strict=True):
        axis.text(total, row, f" {total:,.0f}", va="center", fontsize=9)
    axis.set_yticks(rows, clients)
    axis.invert_yaxis()
    axis.margins(y=0.02)
    axis.set_xlim(0, 1.09 * left.max())
    axis.set_xlabel("training images")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9,
                ncols=1 + (len(classes) - 1) // max(8, int(1.6 * len(clients))))  # fmt: skip


def _map(
    figure: Any, axis: Any, clients: Sequence[str], classes: Sequence[str], counts: Array
) -> None:
    """A square for each client and class; white: none."""
    from matplotlib.colors import LogNorm

    shown, norm = np.ma.masked_equal(counts, 0), LogNorm(1, max(2, counts.max()))
    image = axis.imshow(shown, norm=norm, aspect="auto", cmap="YlGnBu", interpolation="nearest")
    figure.colorbar(image, ax=axis, label="training images", pad=0.01)
    axis.set_xlabel(f"class, of {len(classes)}")
    axis.set_ylabel(f"client, of {len(clients)}")
    if len(clients) <= BARS[0]:
        axis.set_yticks(range(len(clients)), clients, fontsize=8)
    if len(classes) <= BARS[1]:
        axis.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
