"""How gazelle's figures look."""

import io
from collections.abc import Sequence
from typing import Any

INK = "#334155"
COLOURS = ("#c2681f", "#1f6fc2", "#2f855a", "#7c3aed", "#b83280")


def new_figure(title: str, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure with one set of axes, drawn on without a display."""
    figure, (axes,) = new_figures([title], size)
    return figure, axes


def new_figures(titles: Sequence[str], size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """The same with several sets of axes side by side."""
    # The object interface, not pyplot: no global state, safe in any thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    every = [figure.add_subplot(1, len(titles), number) for number in range(1, len(titles) + 1)]
    for axes, title in zip(every, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    return figure, every


def svg_of(figure: Any) -> str:
    """A figure as a stand-alone `<svg>` element, for pasting into HTML."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gazelle"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg"):]  # without the XML prologue
