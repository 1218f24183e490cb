"""The radar of the paper's Figure 1 and a plot of differences with their intervals, as SVG to put into a page.

Text and lines take the page's colours: matplotlib draws in the stand-ins of INK and PALETTE, which become CSS
variables with the same role. So one drawing serves a light and a dark page. Text stays text.
"""

import io
import math
import re
import textwrap
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart; markers and dashes differ as well.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")
INK = {"#010203": "var(--ink)", "#040506": "var(--faint)", "#070809": "var(--rule)"}
TEXT, FAINT, RULE = INK
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may have dollars in it
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.edgecolor": RULE,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": TEXT,
    "grid.color": RULE,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
WIDTH = 4.9  # inches; a page shows an inch as 96 pixels


@dataclass(frozen=True)
class Point:
    """A difference with its interval (None where there is none)."""

    mean: float
    low: float | None
    high: float | None


def style_of(index: int) -> dict[str, str]:
    """The look of the column at `index`; the first is the base, in the colour of text."""
    color = TEXT if index == 0 else PALETTE[(index - 1) % len(PALETTE)]
    dash = DASHES[0 if index == 0 else (1 + index // len(PALETTE)) % len(DASHES) if index > len(PALETTE) else 0]
    return {"color": color, "marker": MARKERS[index % len(MARKERS)], "linestyle": dash}


def radar(axes: list[str], columns: dict[str, tuple[int, list[float | None]]]) -> str | None:
    """One polygon a column. Each axis is 0 in the centre and ends at the largest value of any column.

    axes:    the axes' names; those without a value above 0 are left out
    columns: by the column's name its place among all columns, which gives its look, and its values; None is a gap

    None where fewer than three axes are left.
    """
    tops = [max((values[index] or 0 for _, values in columns.values()), default=0) for index in range(len(axes))]
    kept = [index for index, top in enumerate(tops) if top > 0]
    if len(kept) < 3:
        return None
    angles = [2 * math.pi * place / len(kept) for place in range(len(kept))]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "radar"}):
        figure = Figure(figsize=(WIDTH, 5.2))
        plot = figure.add_axes((0.23, 0.22, 0.54, 0.58), projection="polar")
        plot.set_theta_offset(math.pi / 2)
        plot.set_theta_direction(-1)
        plot.set_ylim(0, 1.03)
        plot.set_yticks([0.25, 0.5, 0.75, 1.0], [""] * 4)
        plot.set_xticks(angles, [""] * len(angles))
        plot.spines["polar"].set_visible(False)
        for name, (number, values) in columns.items():
            scaled = [math.nan if values[index] is None else values[index] / tops[index] for index in kept]
            look = style_of(number)
            plot.plot([*angles, angles[0]], [*scaled, scaled[0]], label=name, markersize=4, **look)
            if not any(map(math.isnan, scaled)):
                plot.fill(angles, scaled, color=look["color"], alpha=0.05)
        for angle, index in zip(angles, kept):
            side = round(math.sin(angle), 6)
            label = "\n".join(textwrap.wrap(axes[index], 15))
            plot.text(
                angle,
                1.1,
                f"{label}\n{tops[index]:.3f}",
                ha="center" if side == 0 else "left" if side > 0 else "right",
                va="bottom" if math.cos(angle) > 0.7 else "top" if math.cos(angle) < -0.7 else "center",
                fontsize=8.5,
                linespacing=1.15,
            )
        figure.legend(loc="lower center", ncols=min(4, len(columns)), fontsize=9, handlelength=2.6)
        return svg(figure, "radar", f"Radar of {len(kept)} measures for {', '.join(columns)}")


def differences(panels: dict[str, dict[str, dict[str, Point]]], order: list[str]) -> str | None:
    """A dot and an interval for each difference, one panel above the other, each with its own scale.

    panels: title -> row -> column -> the difference from the base
    order:  all columns, the base first, so that colours are those of the radar

    None where there is no difference to show.
    """
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        return None
    shown = [name for name in order if any(name in points for rows in panels.values() for points in rows.values())]
    most = max(len(points) for rows in panels.values() for points in rows.values())
    step = 0.16 + 0.13 * max(most, 2)  # inches; a label may take two lines
    heights = [step * len(rows) for rows in panels.values()]
    legend = 0.2 + 0.2 * math.ceil(len(shown) / 4)
    height = sum(heights) + 0.75 * len(panels) + legend
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "differences"}):
        figure = Figure(figsize=(WIDTH, height))
        top = height
        for (title, rows), panel_height in zip(panels.items(), heights):
            top -= 0.3 + panel_height
            plot = figure.add_axes((0.36, top / height, 0.61, panel_height / height))
            top -= 0.45
            plot.set_title(title, loc="left", fontsize=9, fontweight="bold", x=-0.57)
            plot.axvline(0, color=FAINT, linewidth=1)
            for place, points in enumerate(rows.values()):
                for rank, (name, point) in enumerate(points.items()):
                    y = place + (rank - (len(points) - 1) / 2) * 0.13 / step
                    _dot(plot, point, y, style_of(order.index(name)))
            plot.set_yticks(range(len(rows)), ["\n".join(textwrap.wrap(label, 26)) for label in rows])
            plot.set_ylim(len(rows) - 0.5, -0.5)
            plot.tick_params(left=False)
            plot.grid(axis="x", linewidth=0.6)
            plot.set_axisbelow(True)
            plot.locator_params(axis="x", nbins=6)
            for spine in plot.spines.values():
                spine.set_visible(False)
        handles = [
            matplotlib.lines.Line2D([], [], label=name, markersize=5, **style_of(order.index(name))) for name in shown
        ]
        figure.legend(handles=handles, loc="lower center", ncols=min(4, len(shown)), fontsize=9)
        return svg(figure, "differences", f"Differences from {order[0]} with 95 % intervals")


def _dot(plot, point: Point, y: float, look: dict[str, str]) -> None:
    if point.low is not None:
        plot.plot([point.low, point.high], [y, y], color=look["color"], linewidth=1.6, solid_capstyle="butt")
    plot.plot([point.mean], [y], color=look["color"], marker=look["marker"], markersize=5)


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element whose ids begin with `name`, and whose colours are the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for stand_in, variable in INK.items():
        text = text.replace(stand_in, variable)
    for number, color in enumerate(PALETTE):
        text = text.replace(color, f"var(--series-{number})")
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
