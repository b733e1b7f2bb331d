"""For the engineer at a notebook: a dashboard drawn while an experiment runs, and knobs. Headless there is neither."""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd

from labkit.probes.sampler import Probe, Sampler, series
from labkit.report.figures import PALETTE, timeline
from labkit.report.tables import quantity

REDRAW_HZ = 4.0
SPARK_POINTS = 120


@dataclass(frozen=True)
class Tile:
    """One number of the dashboard and its recent course. ``unit`` as in ``tables.quantity``."""

    label: str
    probe: str
    name: str
    unit: str = ""


@contextmanager
def live(probes: Sequence[Probe], tiles: Sequence[Tile], interactive: bool, hz: float = REDRAW_HZ) -> Iterator[None]:
    """Shows the tiles while the body runs, then one ordinary figure in their place. Nothing unless ``interactive``.

    HTML and inline SVG through a display handle: no widget state is stored, and every front end can draw it.
    """
    if not interactive:
        yield
        return
    from IPython.display import HTML, display

    done = threading.Event()
    sampler = Sampler(probes, hz=min(hz, REDRAW_HZ)).start()
    handle = display(HTML(dashboard(sampler.frame(), tiles)), display_id=True)

    def redraw() -> None:
        while not done.wait(1 / min(hz, REDRAW_HZ)):
            handle.update(HTML(dashboard(sampler.frame(), tiles)))

    painter = threading.Thread(target=redraw, daemon=True)
    painter.start()
    try:
        yield
    finally:
        done.set()
        painter.join()
        samples = sampler.stop()
        samples["t_s"] -= samples["t_s"].min()
        handle.update(timeline(samples, [(tile.probe, tile.name, tile.label) for tile in tiles]))


def dashboard(samples: pd.DataFrame, tiles: Sequence[Tile]) -> str:
    """The tiles as HTML with inline SVG. ``samples``: as a Sampler gives them."""
    boxes = []
    for position, tile in enumerate(tiles):
        values = series(samples, tile.probe, tile.name)["value"].tolist()[-SPARK_POINTS:]
        number = quantity(values[-1], tile.unit) if values else "–"
        boxes.append(
            '<div style="border:1px solid #9aa3ad;border-radius:6px;padding:.4em .8em;min-width:9em">'
            f'<div style="font-size:.85em;opacity:.75">{html.escape(tile.label)}</div>'
            f'<div style="font-size:1.5em;font-variant-numeric:tabular-nums">{html.escape(number)}</div>'
            f"{_spark(values, PALETTE[position % len(PALETTE)])}</div>"
        )
    return f'<div style="display:flex;flex-wrap:wrap;gap:.6em;font-family:system-ui,sans-serif">{"".join(boxes)}</div>'


@dataclass(frozen=True)
class Fixed:
    """What a knob is when nobody is there to turn it."""

    value: Any


def knob(label: str, options: Sequence[Any], value: Any, interactive: bool) -> Any:
    """Something with a ``.value``: a drop-down, shown, when ``interactive``, else just ``value``.

    Raises ValueError for a value that is no option.
    """
    if value not in options:
        raise ValueError(f"{label} must be one of {', '.join(map(str, options))}; got {value!r}")
    if not interactive:
        return Fixed(value)
    import ipywidgets
    from IPython.display import display

    control = ipywidgets.Dropdown(
        options=list(options), value=value, description=label, style={"description_width": "initial"}
    )
    display(control)
    return control


def _spark(values: Sequence[float], colour: str, width: int = 140, height: int = 34) -> str:
    if len(values) < 2:
        return f'<svg width="{width}" height="{height}"></svg>'
    top, bottom = max(values), min(0.0, *values)
    span = (top - bottom) or 1.0
    points = " ".join(
        f"{index * width / (len(values) - 1):.1f},{height - 2 - (value - bottom) / span * (height - 4):.1f}"
        for index, value in enumerate(values)
    )
    line = f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>'
    return f'<svg width="{width}" height="{height}">{line}</svg>'
