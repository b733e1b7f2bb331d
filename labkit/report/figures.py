"""Figures in one house style: labelled in place, units on the axes, intervals drawn, readable without hovering."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from labkit.report.tables import digits, quantity

# Okabe and Ito's palette without its yellow: apart from each other for every kind of colour vision, on white and on dark.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#7a828c"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def latency_by_users(
    table: pd.DataFrame,
    quantity_name: str = "P95 latency",
    limit_s: float | None = None,
    title: str = "",
    note: str = "",
) -> go.Figure:
    """Lines over users, one a deployment. Columns: users, deployment, value, low, high (seconds).

    ``limit_s`` draws the article's limit. Both axes are logarithmic: a straight rise is a queue that grows with the users.
    """
    figure = go.Figure()
    for colour, (name, part) in zip(
        _colours(table["deployment"].nunique()), table.groupby("deployment", sort=False), strict=True
    ):
        part = part.sort_values("users")
        figure.add_scatter(
            x=part["users"], y=part["value"], mode="lines+markers+text", name=str(name), line_color=colour,
            error_y=_errors(part), textposition="top center", cliponaxis=False,
            text=[quantity(value, "s") if position in (0, len(part) - 1) else "" for position, value in enumerate(part["value"])],
        )  # fmt: skip
        last = part.iloc[-1]
        _label(figure, last["users"], last["value"], str(name), colour, log=True)
    if limit_s is not None:
        figure.add_hline(
            y=limit_s, line_dash="dot", line_color=GREY, annotation_text=f"limit {quantity(limit_s, 's')}",
            annotation_position="top left",
        )  # fmt: skip
    figure.update_xaxes(title="concurrent users", type="log", tickvals=sorted(table["users"].unique()), tickformat="d")
    figure.update_yaxes(title=f"{quantity_name} (s)", type="log", dtick=1)
    return _styled(figure, title, note, right=150)


def lines(
    table: pd.DataFrame, x: str, x_title: str, y_title: str, title: str = "", note: str = "", log_x: bool = False
) -> go.Figure:
    """Any number over any other, one line a name. Columns: ``x``, name, value, and low and high where there are intervals."""
    figure = go.Figure()
    for colour, (name, part) in zip(_colours(table["name"].nunique()), table.groupby("name", sort=False), strict=True):
        part = part.sort_values(x)
        figure.add_scatter(
            x=part[x], y=part["value"], mode="lines+markers", name=str(name), line_color=colour, error_y=_errors(part)
        )
        _label(
            figure,
            math.log10(part[x].iloc[-1]) if log_x else part[x].iloc[-1],
            part["value"].iloc[-1],
            str(name),
            colour,
        )
    figure.update_xaxes(title=x_title, type="log" if log_x else "linear")
    if log_x:
        figure.update_xaxes(tickvals=sorted(table[x].unique()), tickformat="d")
    figure.update_yaxes(title=y_title, rangemode="tozero")
    return _styled(figure, title, note, right=150)


def timeline(
    samples: pd.DataFrame,
    rows: Sequence[tuple[str, str, str]],
    title: str = "",
    note: str = "",
    window: tuple[float, float] | None = None,
) -> go.Figure:
    """Samples over the time of the run, one row each. ``rows``: (probe, name, axis title with unit).

    Columns: t_s, probe, name, value (``labkit.probes.sampler``). ``window`` shades what was measured. A row whose probe
    read nothing says so in its place.
    """
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.25 / (len(rows) + 2))
    for position, (probe, name, axis) in enumerate(rows, start=1):
        part = samples[(samples["probe"] == probe) & (samples["name"] == name)]
        colour = PALETTE[(position - 1) % len(PALETTE)]
        figure.add_scatter(
            x=part["t_s"], y=part["value"], mode="lines", line={"color": colour, "width": 1.5}, row=position, col=1, name=axis,
        )  # fmt: skip
        if part.empty:
            figure.add_annotation(
                text=f"{probe}: not read here", x=0.5, y=0.5, xref="x domain", yref="y domain", showarrow=False,
                font_color=GREY, row=position, col=1,
            )  # fmt: skip
        figure.update_yaxes(title=axis, rangemode="tozero", row=position, col=1)
    if window is not None:
        figure.add_vrect(x0=window[0], x1=window[1], fillcolor=GREY, opacity=0.12, line_width=0, layer="below")
    figure.update_xaxes(title="time of the run (s)", row=len(rows), col=1)
    return _styled(figure, title, note, height=130 * len(rows) + 120)


def ladder(
    table: pd.DataFrame, axis: str, title: str = "", note: str = "", reference: float | None = None
) -> go.Figure:
    """One bar a rung, the first on top, with intervals and the number beside it. Columns: rung, value, low, high, unit.

    ``reference`` draws a line (the article's figure, or what the hardware can do at most).
    """
    colours = [GREY] + [PALETTE[0]] * (len(table) - 1)
    figure = go.Figure(
        go.Bar(
            x=table["value"],
            y=table["rung"],
            orientation="h",
            marker_color=colours,
            error_x=_errors(table),
            cliponaxis=False,
            width=0.6,
        )  # fmt: skip
    )
    for rung, value, high, unit in table[["rung", "value", "high", "unit"]].itertuples(index=False):
        end = high if math.isfinite(high) else value
        figure.add_annotation(
            x=end, y=rung, text=f" {quantity(value, unit)}", showarrow=False, xanchor="left", font_size=13
        )  # fmt: skip
    if reference is not None:
        figure.add_vline(x=reference, line_dash="dot", line_color=GREY, annotation_text=f"article {digits(reference)}")
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(title=axis, rangemode="tozero")
    return _styled(figure, title, note, height=52 * len(table) + 150, right=90)


def gains(table: pd.DataFrame, title: str = "", note: str = "") -> go.Figure:
    """How many times better each metric got, beside the article's claim. Columns: metric, value, low, high, claimed."""
    figure = go.Figure()
    figure.add_scatter(
        x=table["value"], y=table["metric"], mode="markers", marker={"size": 12, "color": PALETTE[0]}, name="measured",
        error_x=_errors(table),
    )  # fmt: skip
    figure.add_scatter(
        x=table["claimed"], y=table["metric"], mode="markers", name="article", marker={"size": 12, "color": PALETTE[1], "symbol": "diamond-open"},
    )  # fmt: skip
    for metric, value, claimed in table[["metric", "value", "claimed"]].itertuples(index=False):
        for number, colour, shift in ((value, PALETTE[0], 20), (claimed, PALETTE[1], -20)):
            if pd.notna(number) and 0 < number < math.inf:
                figure.add_annotation(
                    x=math.log10(number), y=metric, text=f"{digits(number)}×", showarrow=False, yshift=shift, font={"color": colour, "size": 13}
                )  # fmt: skip
    figure.add_vline(
        x=1, line_color=GREY, line_dash="dot", annotation_text="no change", annotation_position="bottom right"
    )
    figure.update_xaxes(title="times better (above 1 is better, logarithmic)", type="log", dtick="D2")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure = _styled(figure, title, note, height=72 * len(table) + 170)
    return figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"}
    )


def time_breakdown(table: pd.DataFrame, title: str = "", note: str = "") -> go.Figure:
    """Where the time of a request goes, one stacked bar a deployment. Columns: deployment, part, seconds."""
    figure = go.Figure()
    parts = list(dict.fromkeys(table["part"]))
    for colour, part in zip(_colours(len(parts)), parts, strict=True):
        chosen = table[table["part"] == part]
        figure.add_bar(
            x=chosen["seconds"], y=chosen["deployment"], orientation="h", name=part, marker_color=colour,
            text=[f"{part}<br>{quantity(value, 's')}" for value in chosen["seconds"]], textposition="inside", insidetextanchor="middle",
            textangle=0, constraintext="inside",
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="mean time (s)", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure = _styled(figure, title, note, height=80 * table["deployment"].nunique() + 170)
    return figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"}
    )


def _styled(figure: go.Figure, title: str, note: str, height: int = 420, right: int = 40) -> go.Figure:
    axis = {
        "gridcolor": "rgba(128,136,148,0.25)",
        "zeroline": False,
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0, "xref": "paper", "xanchor": "left", "font_size": 17},
        font={"family": FONT, "size": 13, "color": "#24292f"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height + (24 if note else 0),
        margin={"l": 70, "r": right, "t": 64 if title else 24, "b": 84 if note else 56},
        showlegend=False,
        hoverlabel_font_family=FONT,
    )
    if note:
        figure.add_annotation(
            text=note, x=0, y=0, xref="paper", yref="paper", yshift=-58, xanchor="left", yanchor="top", showarrow=False,
            font={"size": 11.5, "color": GREY}, align="left",
        )  # fmt: skip
    return figure


def _errors(part: pd.DataFrame) -> dict[str, object] | None:
    """Error bars from low and high; an end that the data leave open is not drawn."""
    if "low" not in part or "high" not in part:
        return None
    up, down = (part["high"] - part["value"]), (part["value"] - part["low"])
    finite = [series.where(series.abs() < math.inf, 0.0).fillna(0.0).tolist() for series in (up, down)]
    return {
        "type": "data",
        "symmetric": False,
        "array": finite[0],
        "arrayminus": finite[1],
        "thickness": 1.5,
        "width": 4,
        "color": GREY,
    }


def _label(figure: go.Figure, x: float, y: float, text: str, colour: str, log: bool = False) -> None:
    place = (math.log10(x), math.log10(y)) if log else (x, y)
    figure.add_annotation(
        x=place[0], y=place[1], text=text, showarrow=False, xanchor="left", xshift=12, font={"color": colour, "size": 13}
    )  # fmt: skip


def _colours(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]
