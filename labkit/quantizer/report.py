"""The account of a quantisation: what each matrix lost, as JSON, as the rows of a table, and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

REPORT, FIGURE = "quantization_report.json", "quantization_report.svg"

_WIDTH, _LEFT, _RIGHT, _TOP, _PANEL, _GAP = 760, 64, 744, 64, 120, 44
_STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #374151 }
text.title { font-weight: 600 }
text.small { font-size: 12px }
line { stroke: #9ca3af; stroke-opacity: 0.35 }
polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round }
circle, text.rtn, text.gptq, text.fallback { fill: currentColor }
.rtn { color: #6b7280 } .gptq { color: #2563eb } .fallback { color: #dc2626 }
@media (prefers-color-scheme: dark) {
  text { fill: #d1d5db }
  .rtn { color: #9ca3af } .gptq { color: #60a5fa } .fallback { color: #f87171 }
}"""


@dataclass(frozen=True)
class Report:
    """``lines``: one for each matrix, in order: layer, matrix, outputs, inputs, tokens (that it saw), rtn_error and
    gptq_error (squared error of its output by that output's square; None where the Hessian says nothing), clip_gain,
    fallback (why it was rounded instead, or None) and seconds."""

    model: str
    bits: int
    group_size: int
    sequences: int
    tokens: int
    damping: float
    random_weights: bool
    machine: dict[str, Any]
    seconds: float
    """Of the sitting that ended it."""
    peak_bytes: int | None
    """Most memory of the GPU that was held."""
    lines: list[dict[str, Any]] = field(repr=False)

    @property
    def fallbacks(self) -> list[str]:
        """The matrices that were rounded to nearest, each with its reason."""
        return [f"layer {row['layer']}, {row['matrix']}: {row['fallback']}" for row in self.lines if row["fallback"]]

    def json(self) -> str:
        """For the file beside the model."""
        return json.dumps(asdict(self), indent=1) + "\n"


COLUMNS = ("layer", "matrix", "size", "tokens", "RTN error", "GPTQ error", "GPTQ / RTN", "clip gain", "s")


def table_rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells under COLUMNS. The experts of a layer are taken together: the mean of their errors, the sum of the rest.

    Errors are shares of the size of the output, not squared: 0.05 is an output that is 5 % off.
    """
    grouped: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        grouped.setdefault((line["layer"], kind_of(line)), []).append(line)
    return [_cells(layer, kind, rows) for (layer, kind), rows in grouped.items()]


def kind_of(line: dict[str, Any]) -> str:
    """The name of a line's matrix, without the number of the expert."""
    return str(line["matrix"]).partition(" of expert")[0] + (" (experts)" if " of expert" in line["matrix"] else "")


def _cells(layer: int, kind: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    rtn, gptq = _mean(rows, "rtn_error"), _mean(rows, "gptq_error")
    fallbacks = sum(row["fallback"] is not None for row in rows)
    name = kind if not fallbacks else f"{kind}: RTN" if len(rows) == 1 else f"{kind}: RTN for {fallbacks}"
    size = f"{rows[0]['outputs']} x {rows[0]['inputs']}" + (f" x {len(rows)}" if len(rows) > 1 else "")
    return (
        str(layer),
        name,
        size,
        f"{sum(row['tokens'] for row in rows):,}",
        _digits(math.sqrt(rtn)),
        _digits(math.sqrt(gptq)),
        _digits(math.sqrt(gptq / rtn)) if rtn else "–",
        "–" if math.isnan(rtn) else f"{_digits(math.sqrt(_mean(rows, 'clip_gain')))}x",
        f"{sum(row['seconds'] for row in rows):.2f}",
    )


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    known = [row[name] for row in rows if row[name] is not None]
    return sum(known) / len(known) if known else math.nan


def _digits(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def figure(report: Report) -> str:
    """SVG: a panel for each kind of matrix, the errors of rounding and of GPTQ over the layers, logarithmic."""
    kinds = list(dict.fromkeys(kind_of(line) for line in report.lines))
    bottom = _TOP + len(kinds) * (_PANEL + _GAP)
    last = max(line["layer"] for line in report.lines)
    group = "no groups" if report.group_size == -1 else f"groups of {report.group_size}"
    title = f"Error of each layer's output, {report.bits} bits, {group}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 16}" role="img">',
        f"<title>{title}</title>",
        f"<style>{_STYLE}</style>",
        _text(_LEFT, 20, f"{title} (share of the output, logarithmic)", "title"),
        _text(_LEFT, 42, "round to nearest", "rtn"),
        _text(_LEFT + 120, 42, "GPTQ", "gptq"),
        _text(_LEFT + 170, 42, "rounded, for want of a Hessian", "fallback") if report.fallbacks else "",
    ]
    for number, kind in enumerate(kinds):
        rows = [line for line in report.lines if kind_of(line) == kind]
        parts += _panel(kind, rows, last, _TOP + number * (_PANEL + _GAP))
    parts.append(_text((_LEFT + _RIGHT) / 2, bottom + 6, "layer", anchor="middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(kind: str, rows: list[dict[str, Any]], last: int, top: float) -> list[str]:
    layers = sorted({row["layer"] for row in rows})
    by_layer = {layer: [row for row in rows if row["layer"] == layer] for layer in layers}
    errors = {
        name: {layer: math.sqrt(_mean(by_layer[layer], f"{name}_error")) for layer in layers}
        for name in ("rtn", "gptq")
    }
    shown = [value for of_layer in errors.values() for value in of_layer.values() if value > 0]
    parts = [_text(_LEFT, top + 14, kind, "small")]
    if not shown:
        return [*parts, _text(_LEFT + 90, top + 14, "nothing measured", "small")]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)) + 1e-9)

    def place(layer: int, value: float) -> tuple[float, float]:
        across = _LEFT + 12 + (_RIGHT - _LEFT - 24) * (layer / last if last else 0.5)
        return across, top + 22 + (_PANEL - 22) * (high - math.log10(value)) / (high - low)

    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4.5, f"{10.0**power:g}", "small", "end"))
    for layer in layers if len(layers) <= 16 else layers[:: -(-len(layers) // 16)]:
        parts.append(_text(place(layer, 1.0)[0], top + _PANEL + 16, str(layer), "small", "middle"))
    for name, of_layer in errors.items():
        points = [(layer, *place(layer, value)) for layer, value in of_layer.items() if value > 0]
        line = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in points)
        parts.append(f'<polyline class="{name}" points="{line}"/>')
        for layer, x, y in points:
            fell = name == "gptq" and any(row["fallback"] for row in by_layer[layer])
            parts.append(f'<circle class="{"fallback" if fell else name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return parts


def _text(x: float, y: float, text: str, name: str = "", anchor: str = "start") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
