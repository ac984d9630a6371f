"""What pictures of one run and of several have in common."""

import math
import textwrap
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from cl_runner.trackers import colours
from cl_runner.trackers.colours import INK

DPI = 160
INK_LUMINANCE = 0.028
KINDS = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}  # and the metadata that varies between drawings


class ColourScale:
    """What a matrix's colours mean: the same in every picture."""

    def __init__(self, colours: Sequence[str], low: float, high: float) -> None:
        self.colours, self.low, self.high = LinearSegmentedColormap.from_list("", colours), low, high

    def colour(self, values: float | np.ndarray) -> np.ndarray:
        """[...] -> [..., 4]: red, green, blue and alpha, of 0 to 1."""
        return np.asarray(self.colours((values - self.low) / (self.high - self.low)))


ACCURACY = ColourScale(colours.ACCURACY, 0.0, 1.0)
FORGETTING = ColourScale(colours.FORGETTING, -1.0, 1.0)


def blank(width: float, height: float) -> Figure:
    """A white figure; width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def drawn(figure: Figure, kind: str = "png") -> bytes:
    """A figure as a file of `kind`, one of KINDS; the same bytes for the same picture."""
    file = BytesIO()
    with rc_context({"svg.hashsalt": "cl_runner"}):
        figure.savefig(file, format=kind, dpi=DPI, metadata={KINDS[kind]: None})
    return file.getvalue()


def readable_on(colour: Sequence[float] | np.ndarray) -> str:
    """White or ink, whichever has the larger WCAG contrast with `colour`: red, green, blue (others are ignored)."""
    linear = [c / 12.92 if c <= 0.04045 else math.pow((c + 0.055) / 1.055, 2.4) for c in colour[:3]]
    luminance = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / (INK_LUMINANCE + 0.05) else INK


def wrapped(title: str, width: int, lines: int = 2) -> str:
    """A title of up to so many lines of `width` characters, without its middle if that is not enough."""
    limit = width * lines
    while len(parts := textwrap.wrap(shortened(title, limit), width)) > lines:
        limit -= 1
    return "\n".join(parts)


def shortened(title: str, limit: int) -> str:
    """A title without its middle if it is too long: its end holds the numbers."""
    return title if len(title) <= limit else f"{title[: limit // 3]} … {title[-(limit * 2 // 3 - 3) :]}"
