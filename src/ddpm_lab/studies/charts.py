"""Line charts for web pages, as SVG that scales with the page and shows the text of a point that one points at."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ddpm_lab.pictures.drawing import escape_mathtext

if TYPE_CHECKING:
    from matplotlib.axis import Axis

SVG = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT = 4.2, 3.5  # inches: small, so that text is readable on a phone, where the chart is about 340 px wide
LETTER, LEGEND_LETTER = 9, 8.5  # points


@dataclass(frozen=True)
class Series:
    """Points, and the line between them.

    Attributes:
        name: in the legend; '' for none. Of several series with one name the first is in the legend.
        colour: of matplotlib.
        points: (x, y, low, high, text to show); low and high None where no interval is known.
        style: of the line: '-', '--', ':' or '' for none.
        marker: of the points, matplotlib's.
    """

    name: str
    colour: str
    points: list[tuple[float, float, float | None, float | None, str]]
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
    """A chart as an <svg> element without width and height, which the page chooses.

    Args:
        name: unique on the page; an identifier.
        series: those without points are left out.
        x_ticks: positions of the ticks; empty: matplotlib's choice.
        level: a horizontal line and its name, such as the floor; far below the points it is a number in the legend.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [line for line in series if line.points]
    legend = list(dict.fromkeys(line.name for line in shown if line.name))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name, "font.size": LETTER}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for index, line in enumerate(shown):
            x, y = [point[0] for point in line.points], [point[1] for point in line.points]
            first = line.name not in [other.name for other in shown[:index]]
            axes.plot(
                x, y, color=line.colour, linestyle=line.style or "none", marker=line.marker, markersize=4.5,
                label=_legend_text(line.name) if first and line.name else None, gid=f"{name}-series{index}",
            )  # fmt: skip
            ends = [(x, low, high) for x, _, low, high, _ in line.points if low is not None and high is not None]
            if ends:
                axes.vlines(*zip(*ends, strict=True), color=line.colour, linewidth=1, alpha=0.6)
        if level is not None:
            value, text = level
            lowest = min((point[1] for line in shown for point in line.points), default=value)
            if log_y and 3 * value < lowest:  # a line would leave most of the chart empty
                text = f"{text}, {value:.2g}"
                axes.plot([], [], " ", label=_legend_text(text))
            else:
                axes.axhline(value, color="#666666", linewidth=1, linestyle=(0, (1, 2)), label=_legend_text(text))
            legend.append(text)
        if log_x:
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis)
        else:
            axes.locator_params("x", nbins=5)
        if log_y:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        if x_ticks:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
            axes.minorticks_off()
        axes.set_xlabel(escape_mathtext(x_label))
        axes.set_title(escape_mathtext(y_label), loc="left", fontsize=LETTER)  # rotated text is hard to read
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        if legend:
            column = 44 + 0.5 * LEGEND_LETTER * max(map(len, legend))  # points
            columns = min(3, max(1, int(72 * WIDTH / column)))
            figure.legend(  # inside the axes it would cover points
                loc="outside upper left", ncols=columns, fontsize=LEGEND_LETTER, frameon=False, handlelength=2.4
            )
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    texts = {f"{name}-series{index}": [point[4] for point in line.points] for index, line in enumerate(shown)}
    return _with_titles(svg.getvalue(), texts, f"{y_label} over {x_label}")


def _legend_text(name: str) -> str:
    return escape_mathtext("\n".join(textwrap.wrap(name, 56, drop_whitespace=False)))


def _plain_numbers(axis: "Axis") -> None:
    """Write 20, not 2 x 10^1, at every tick of a logarithmic axis that has room for it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _with_titles(svg: str, texts: dict[str, list[str]], label: str) -> str:
    """Attach a text to each marker of each series, and leave the width to the page."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for group in root.iter(f"{{{SVG}}}g"):
        for marker, text in zip(group.iter(f"{{{SVG}}}use"), texts.get(group.get("id", ""), []), strict=False):
            ElementTree.SubElement(marker, f"{{{SVG}}}title").text = text
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")
