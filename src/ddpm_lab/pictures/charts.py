"""Curves for web pages: SVG that says what a point is when one points at it, and reads as well without."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ddpm_lab.pictures.drawing import escape_mathtext

if TYPE_CHECKING:
    from matplotlib.axis import Axis

SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Series:
    """Points in a line.

    Attributes:
        name: in the legend; '' for none.
        colour: of matplotlib.
        points: (x, y, low, high, what to say of it); low and high None where no interval is known.
        style: of the line: '-', '--', ':' or '' for none.
        marker: of the points, matplotlib's.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float, float | None, float | None, str]]
    style: str = "-"
    marker: str = "o"


def line_chart(
    name: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """A chart as an <svg> element.

    Args:
        name: unique on the page; an identifier.
        x_ticks: where to put them; none: matplotlib's choice.
        level: a horizontal line and what it is, such as the floor; where it lies far below, a number in the legend.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name}):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        axes = figure.add_subplot()
        said: dict[str, str] = {}
        for line in (line for line in series if line.points):
            x, y = [point[0] for point in line.points], [point[1] for point in line.points]
            marker: dict[str, Any] = {} if line.style else {"marker": line.marker, "markersize": 5}  # for the legend
            axes.plot(
                x,
                y,
                color=line.colour,
                linestyle=line.style or "none",
                label=escape_mathtext(line.name) or None,
                **marker,
            )
            for index, (x_i, y_i, low, high, text) in enumerate(line.points):
                key = f"{name}-{len(said)}-{index}"
                said[key] = text
                if low is not None and high is not None:
                    axes.plot([x_i, x_i], [low, high], color=line.colour, linewidth=1, alpha=0.6)
                axes.plot([x_i], [y_i], line.marker, color=line.colour, markersize=5, gid=key)
        if level is not None:
            least = min((point[1] for line in series for point in line.points), default=level[0])
            if log_y and 3 * level[0] < least:  # most of the chart would be the way down to it
                axes.plot([], [], " ", label=escape_mathtext(f"{level[1]}, {level[0]:.2g}"))
            else:
                axes.axhline(
                    level[0], color="#666666", linewidth=1, linestyle=(0, (1, 2)), label=escape_mathtext(level[1])
                )
        if log_x:
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis)
        if log_y:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        if x_ticks:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
            axes.minorticks_off()
        axes.set_xlabel(escape_mathtext(x_label))
        axes.set_ylabel(escape_mathtext(y_label))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        if any(line.name and line.points for line in series) or level is not None:
            names = [line.name for line in series if line.points] + ([] if level is None else [f"{level[1]}, 0.0000"])
            fitting = int(72 * figure.get_figwidth() / (46 + 4 * max(map(len, names))))  # points, of 8 point letters
            columns = min(3, max(1, fitting))
            figure.legend(loc="outside upper left", ncols=columns, fontsize=8, frameon=False)  # inside it covers points
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _with_titles(written.getvalue(), said, f"{y_label} over {x_label}")


def _plain_numbers(axis: "Axis") -> None:
    """20, not 2 x 10^1, at every tick of a logarithmic axis that has room for it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    few = high / low > 30
    axis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _with_titles(svg: str, said: dict[str, str], label: str) -> str:
    """Give each point its words, and let the page choose the width."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        text = said.get(element.get("id", ""))
        if text is not None:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = text
            element.insert(0, title)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")
