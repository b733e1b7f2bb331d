"""Figures in one house style: labelled in place, units on the axes, intervals drawn, readable without hovering."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from labkit.experiments.intervals import digits
from labkit.report.tables import quantity

# Okabe and Ito's palette without its yellow: told apart by every kind of colour vision, on white and on dark.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#1a1a1a", "#8c564b")
GREY = "#7a828c"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right", "traceorder": "normal"}
MOST_TICKS = 9
"""So many measured places are labelled each by itself; more would run into each other."""
STATIC = {"showarrow": False, "xanchor": "left"}


def latency_by_users(
    table: pd.DataFrame, measure: str = "P95 latency", limit_s: float | None = None, title: str = "", note: str = ""
) -> go.Figure:
    """Lines over users, one a deployment. Columns: users, deployment, value, low, high (seconds).

    ``limit_s`` draws the article's limit. Both axes are logarithmic: a straight rise is a queue growing with the users.
    """
    figure, labels = go.Figure(), []
    for colour, name, part in _named(table, "deployment", "users"):
        numbers = [quantity(part["value"].iloc[0], "s")] + [""] * (len(part) - 1)
        figure.add_scatter(
            x=part["users"], y=part["value"], mode="lines+markers+text", name=name, error_y=_errors(part)
        )
        figure.data[-1].update(line_color=colour, text=numbers, textposition="bottom right", cliponaxis=False)
        last = part.iloc[-1]
        text = f"{name}, {quantity(last['value'], 's')}"
        labels.append((math.log10(last["users"]), math.log10(last["value"]), text, colour))
    _label_ends(figure, labels, math.log10(table["value"].min()), math.log10(table["value"].max()))
    if limit_s is not None:
        figure.add_hline(y=limit_s, line_dash="dot", line_color=GREY)
        # On a logarithmic axis an annotation, unlike a shape, is placed by the logarithm.
        limit = {"text": f"limit {quantity(limit_s, 's')}", "yanchor": "bottom", "font_color": GREY}
        # At the right end: latencies under the limit are found on the left, where the users are few.
        figure.add_annotation(x=1, xref="paper", y=math.log10(limit_s), **limit, **{**STATIC, "xanchor": "right"})
    figure.update_xaxes(title="concurrent users", type="log", tickvals=sorted(table["users"].unique()), tickformat="d")
    figure.update_yaxes(title=f"{measure} (s)", type="log", tickvals=_ticks(), tickformat="~g")
    return _styled(figure, title, note)


def lines(
    table: pd.DataFrame,
    x: str,
    x_title: str,
    y_title: str,
    title: str = "",
    note: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> go.Figure:
    """Any number over any other, one line a name. Columns: ``x``, name, value, and low and high where there are any."""
    figure, labels = go.Figure(), []
    for colour, name, part in _named(table, "name", x):
        figure.add_scatter(x=part[x], y=part["value"], mode="lines+markers", name=name, error_y=_errors(part))
        figure.data[-1].update(line_color=colour)
        end, height = part[x].iloc[-1], part["value"].iloc[-1]
        labels.append((math.log10(end) if log_x else end, math.log10(height) if log_y else height, name, colour))
    least, most = table["value"].min(), table["value"].max()
    _label_ends(figure, labels, math.log10(least) if log_y else 0.0, math.log10(most) if log_y else most)
    figure.update_xaxes(title=x_title, type="log" if log_x else "linear")
    if log_x:
        measured = sorted(table[x].unique())
        figure.update_xaxes(tickvals=measured if len(measured) < MOST_TICKS else _ticks(), tickformat="~g")
    figure.update_yaxes(title=y_title, type="log" if log_y else "linear")
    if log_y:
        figure.update_yaxes(tickvals=_ticks(), tickformat="~g")
    else:
        figure.update_yaxes(rangemode="tozero")
    return _styled(figure, title, note)


def timeline(
    samples: pd.DataFrame,
    rows: Sequence[tuple[str, str, str]],
    title: str = "",
    note: str = "",
    window: tuple[float, float] | None = None,
) -> go.Figure:
    """Samples over the time of the run, one row each. ``rows``: (probe, name, axis title with unit).

    Columns: t_s, probe, name, value (as ``labkit.probes.sampler`` gives them). ``window`` shades what was measured. A
    row whose probe read nothing says so in its place.
    """
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.25 / (len(rows) + 2))
    for position, (probe, name, axis) in enumerate(rows, start=1):
        part, place = samples[(samples["probe"] == probe) & (samples["name"] == name)], {"row": position, "col": 1}
        figure.add_scatter(x=part["t_s"], y=part["value"], mode="lines", name=axis, **place)
        figure.data[-1].update(line_color=PALETTE[(position - 1) % len(PALETTE)], line_width=1.5)
        figure.update_yaxes(title=axis, rangemode="tozero", **place)
        if part.empty:
            middle = {"x": 0.5, "y": 0.5, "xref": "x domain", "yref": "y domain", "showarrow": False}
            figure.add_annotation(text=f"{probe}: not read here", font_color=GREY, **middle, **place)
            figure.update_yaxes(showticklabels=False, **place)
    if window is not None:
        figure.add_vrect(x0=window[0], x1=window[1], fillcolor=GREY, opacity=0.12, line_width=0, layer="below")
    figure.update_xaxes(title="time of the run (s)", row=len(rows), col=1)
    return _styled(figure, title, note, height=130 * len(rows) + 120)


def ladder(
    table: pd.DataFrame, axis: str, title: str = "", note: str = "", reference: tuple[str, float] | None = None
) -> go.Figure:
    """One bar a rung, the first on top, with intervals and the number beside it. Columns: rung, value, low, high, unit.

    ``reference`` (name, value) draws a line: the article's figure, or what the hardware can do at most.
    """
    colours = [GREY] + [PALETTE[0]] * (len(table) - 1)
    figure = go.Figure(go.Bar(x=table["value"], y=table["rung"], orientation="h", marker_color=colours, width=0.6))
    figure.data[0].update(error_x=_errors(table), cliponaxis=False)
    for rung, value, high, unit in table[["rung", "value", "high", "unit"]].itertuples(index=False):
        end = high if math.isfinite(high) else value
        figure.add_annotation(x=end, y=rung, text=f" {quantity(value, unit)}", font_size=13, **STATIC)
    if reference is not None:
        figure.add_vline(x=reference[1], line_dash="dot", line_color=GREY)
        beside = {"text": f" {reference[0]} {digits(reference[1])}", "yanchor": "bottom", "font_color": GREY}
        figure.add_annotation(x=reference[1], y=1, yref="paper", **beside, **STATIC)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(title=axis, rangemode="tozero")
    return _styled(figure, title, note, height=52 * len(table) + 150, right=100)


def gains(table: pd.DataFrame, title: str = "", note: str = "") -> go.Figure:
    """How many times better each metric got, beside the article's claim. Columns: metric, value, low, high, claimed.

    An unbounded gain (nothing failed afterwards) has no place on the axis: its lower end is drawn, as "at least".
    """
    figure, shown = go.Figure(), table.copy()
    open_end = ~shown["value"].map(math.isfinite)
    shown.loc[open_end, "value"] = shown.loc[open_end, "low"]
    figure.add_scatter(x=shown["value"], y=shown["metric"], mode="markers", name="measured", error_x=_errors(shown))
    figure.data[-1].update(marker_size=12, marker_color=PALETTE[0])
    figure.add_scatter(x=shown["claimed"], y=shown["metric"], mode="markers", name="article")
    figure.data[-1].update(marker_size=12, marker_color=PALETTE[1], marker_symbol="diamond-open")
    for metric, value, claimed, unbounded in zip(
        *(shown[c] for c in ("metric", "value", "claimed")), open_end, strict=True
    ):
        word = "at least " if unbounded else ""
        for number, text, colour, shift in ((value, word, PALETTE[0], 20), (claimed, "", PALETTE[1], -20)):
            if pd.notna(number) and 0 < number < math.inf:
                font = {"color": colour, "size": 13}
                place = {"x": math.log10(number), "y": metric, "yshift": shift, "showarrow": False}
                figure.add_annotation(text=f"{text}{digits(number)}×", font=font, **place)
    figure.add_vline(x=1, line_color=GREY, line_dash="dot")
    unchanged = {"text": " no change", "yanchor": "bottom", "font_color": GREY}
    figure.add_annotation(x=0, y=0, yref="paper", **unchanged, **STATIC)
    figure.update_xaxes(title="times better (logarithmic)", type="log", tickvals=_ticks(), tickformat="~g")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _styled(figure, title, note, height=72 * len(table) + 170).update_layout(showlegend=True, legend=LEGEND)


def time_breakdown(table: pd.DataFrame, title: str = "", note: str = "") -> go.Figure:
    """Where the time of a request goes, one stacked bar a deployment. Columns: deployment, part, seconds."""
    figure, parts = go.Figure(), list(dict.fromkeys(table["part"]))
    for index, part in enumerate(parts):
        chosen = table[table["part"] == part]
        figure.add_bar(x=chosen["seconds"], y=chosen["deployment"], orientation="h", name=part)
        numbers = [f"{part}<br>{quantity(value, 's')}" for value in chosen["seconds"]]
        figure.data[-1].update(text=numbers, textposition="inside", insidetextanchor="middle", textangle=0)
        figure.data[-1].update(marker_color=PALETTE[index % len(PALETTE)])
    # A part too thin for its label goes without one; the legend names it.
    figure.update_layout(barmode="stack", uniformtext={"minsize": 11, "mode": "hide"})
    figure.update_xaxes(title="mean time (s)", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    height = 80 * table["deployment"].nunique() + 170
    return _styled(figure, title, note, height=height).update_layout(showlegend=True, legend=LEGEND)


def _styled(figure: go.Figure, title: str, note: str, height: int = 420, right: int = 40) -> go.Figure:
    axis = {"gridcolor": "rgba(128,136,148,0.25)", "zeroline": False, "linecolor": GREY, "tickcolor": GREY}
    figure.update_xaxes(ticks="outside", title_font_size=14, **axis)
    figure.update_yaxes(ticks="outside", title_font_size=13, **axis)
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0, "xref": "container", "pad": {"l": 4}, "xanchor": "left", "font_size": 17},
        font={"family": FONT, "size": 13, "color": "#24292f"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height + (30 if note else 0),
        margin={"l": 70, "r": right, "t": 64 if title else 24, "b": 92 if note else 56},
        showlegend=False,
        hoverlabel_font_family=FONT,
    )
    if note:
        below = {"x": 0, "y": 0, "xref": "paper", "yref": "paper", "yshift": -66, "yanchor": "top", "align": "left"}
        figure.add_annotation(text=note, font={"size": 11.5, "color": GREY}, **below, **STATIC)
    return figure


def _named(table: pd.DataFrame, column: str, order: str) -> list[tuple[str, str, pd.DataFrame]]:
    groups = table.groupby(column, sort=False)
    return [
        (PALETTE[index % len(PALETTE)], str(name), part.sort_values(order)) for index, (name, part) in enumerate(groups)
    ]


def _errors(part: pd.DataFrame) -> dict[str, object] | None:
    """Error bars from low and high; an end that the data leave open is not drawn."""
    if "low" not in part or "high" not in part:
        return None
    up, down = (
        difference.where(difference.abs() < math.inf, 0.0).fillna(0.0).clip(lower=0.0).tolist()
        for difference in (part["high"] - part["value"], part["value"] - part["low"])
    )
    style = {"thickness": 1.5, "width": 4, "color": GREY}
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, **style}


def _label_ends(figure: go.Figure, labels: Sequence[tuple[float, float, str, str]], low: float, high: float) -> None:
    """Names at the ends of lines (x, y, text, colour), moved apart where they would cover each other.

    ``low`` and ``high`` are about the ends of the y axis, in its own (perhaps logarithmic) units.
    """
    least, height = 17.0, 280.0
    taken = -math.inf
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        at = (y - low) / (high - low) * height if high > low else 0.0
        taken = max(at, taken + least)
        font = {"color": colour, "size": 13}
        figure.add_annotation(x=x, y=y, text=text, xshift=12, yshift=taken - at, font=font, **STATIC)


def _ticks() -> list[float]:
    return [round(scale * 10.0**power, 6) for power in range(-4, 6) for scale in (1, 2, 5)]
