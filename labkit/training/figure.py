"""The figure of a model card: loss and quick probes over the steps of a training, as SVG for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from labkit.training.ledger import BUCKETS

Point = tuple[float, float]

_WIDTH, _LEFT, _RIGHT = 760, 64, 744
_LOSS, _PROBE, _BOTTOM = (44, 236), (282, 402), 424
_LINES_A_POINT = 5
_STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #374151 }
text.title { font-weight: 600 }
line { stroke: #9ca3af; stroke-opacity: 0.35 }
polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round }
circle, text.short, text.medium, text.long { fill: currentColor }
.loss, .short { color: #2563eb } .medium { color: #d97706 } .long { color: #059669 }
@media (prefers-color-scheme: dark) {
  text { fill: #d1d5db }
  .loss, .short { color: #60a5fa } .medium { color: #fbbf24 } .long { color: #34d399 }
}"""


def training_figure(rows: Sequence[dict[str, object]]) -> str:
    """SVG of the curve of a run (``read_curve``): mean loss on a logarithmic axis above, shares of the probes below.

    Raises ValueError if the curve has no line of a loss.
    """
    losses = _smooth(rows)
    if not losses:
        raise ValueError("the curve records no loss")
    probes = [row for row in rows if "probe" in row]
    last = max(losses[-1][0], *(float(str(row["step"])) for row in probes), 1.0)
    low = math.floor(math.log10(min(loss for _, loss in losses)))
    high = math.ceil(math.log10(max(loss for _, loss in losses)))
    across = _Scale(0, last, _LEFT, _RIGHT)
    loss_up, probe_up = _Scale(low, high, _LOSS[1], _LOSS[0]), _Scale(0, 1, _PROBE[1], _PROBE[0])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_BOTTOM + 30}" role="img">',
        "<title>Loss and probes over the steps of the training</title>",
        f"<style>{_STYLE}</style>",
        _text(_LEFT, 24, "training loss (nats a token, logarithmic)", "title"),
    ]
    for power in range(low, high + 1):
        parts += _grid(loss_up(power), f"{10.0**power:g}")
    parts.append(_line([(across(step), loss_up(math.log10(loss))) for step, loss in losses], "loss"))
    if probes:
        parts += _probe_panel(probes, across, probe_up)
    bottom = _PROBE[1] if probes else _LOSS[1]
    for step in _round_steps(last):
        parts.append(_text(across(step), bottom + 20, f"{step:,.0f}", anchor="middle"))
    parts.append(_text((_LEFT + _RIGHT) / 2, bottom + 42, "optimizer steps", anchor="middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _probe_panel(probes: list[dict[str, object]], across: _Scale, up: _Scale) -> list[str]:
    parts = [_text(_LEFT, _PROBE[0] - 16, "unseen problems whose completion has every token right", "title")]
    for share in (0.0, 0.5, 1.0):
        parts += _grid(up(share), f"{share:.0%}")
    for number, bucket in enumerate(BUCKETS):
        points = [(across(float(str(row["step"]))), up(row["probe"][bucket])) for row in probes]  # type: ignore[index]
        parts.append(_line(points, bucket))
        parts += [f'<circle class="{bucket}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
        parts.append(_text(_RIGHT - 160 + 64 * number, _PROBE[0] - 16, bucket, bucket))
    return parts


class _Scale:
    """A linear map from [first, last] to [start, end]."""

    def __init__(self, first: float, last: float, start: float, end: float) -> None:
        self._first, self._start, self._by = first, start, (end - start) / max(last - first, 1e-12)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._first) * self._by


def _smooth(rows: Sequence[dict[str, object]]) -> list[Point]:
    """(step, loss) of every few lines taken together, each line counted as often as it has steps."""
    lines = [(float(str(row["step"])), float(str(row["loss"]))) for row in rows if "loss" in row]
    points, before = [], 0.0
    for start in range(0, len(lines), _LINES_A_POINT):
        group = lines[start : start + _LINES_A_POINT]
        total = 0.0
        began = before
        for step, loss in group:
            total, before = total + loss * (step - before), step
        points.append(((began + before) / 2, total / max(before - began, 1.0)))
    return points


def _round_steps(last: float) -> list[float]:
    unit = 10.0 ** math.floor(math.log10(last))
    by = next(unit * part for part in (0.1, 0.2, 0.5, 1, 2) if last / (unit * part) <= 6)
    return [by * count for count in range(int(last / by) + 1)]


def _grid(y: float, label: str) -> list[str]:
    rule = f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return [rule, _text(_LEFT - 8, y + 4.5, label, anchor="end")]


def _line(points: list[Point], name: str) -> str:
    return f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _text(x: float, y: float, text: str, name: str = "", anchor: str = "start") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
