"""The table, the JSON and the figure of a quantisation."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from labkit.quantizer.report import COLUMNS, Report, figure, table_rows


def line(layer: int, matrix: str, rtn: float | None, gptq: float | None, **more: Any) -> dict[str, Any]:
    found = {"layer": layer, "matrix": matrix, "outputs": 64, "inputs": 32, "tokens": 1000, "rtn_error": rtn}
    return found | {"gptq_error": gptq, "clip_gain": 1.44, "fallback": None, "seconds": 0.5} | more


LINES = [
    line(0, "attention.qkv", 0.0004, 0.0001),
    line(0, "mlp.gate_up of expert 0", 0.01, 0.0025),
    line(0, "mlp.gate_up of expert 1", 0.03, 0.0075),
    line(
        0, "mlp.gate_up of expert 2", None, None, clip_gain=None, tokens=0, fallback="no calibration token reached it"
    ),
    line(1, "attention.qkv", 0.09, 0.09, fallback="its Hessian could not be factorised"),
]


def report(lines: list[dict[str, Any]], **more: Any) -> Report:
    facts: dict[str, Any] = {
        "model": "there",
        "bits": 4,
        "group_size": 128,
        "sequences": 2,
        "tokens": 1000,
        "damping": 0.01,
        "random_weights": False,
        "machine": {},
        "seconds": 3.0,
        "peak_bytes": None,
    }
    return Report(**(facts | more), lines=lines)


def test_the_table_has_errors_as_shares_of_the_output_and_experts_together() -> None:
    assert [dict(zip(COLUMNS, row, strict=True)) for row in table_rows(LINES)] == [
        {"layer": "0", "matrix": "attention.qkv", "size": "64 x 32", "tokens": "1,000", "RTN error": "0.02",
         "GPTQ error": "0.01", "GPTQ / RTN": "0.5", "clip gain": "1.2x", "s": "0.50"},
        {"layer": "0", "matrix": "mlp.gate_up (experts): RTN for 1", "size": "64 x 32 x 3", "tokens": "2,000",
         "RTN error": "0.141", "GPTQ error": "0.0707", "GPTQ / RTN": "0.5", "clip gain": "1.2x", "s": "1.50"},
        {"layer": "1", "matrix": "attention.qkv: RTN", "size": "64 x 32", "tokens": "1,000", "RTN error": "0.3",
         "GPTQ error": "0.3", "GPTQ / RTN": "1", "clip gain": "1.2x", "s": "0.50"},
    ]  # fmt: skip
    unknown = table_rows([LINES[3]])[0]
    assert unknown[4:8] == ("–", "–", "–", "–")


def test_json_holds_everything() -> None:
    told = json.loads(report(LINES).json())
    assert told["lines"] == LINES and told["bits"] == 4 and told["peak_bytes"] is None


def test_fallbacks_are_named() -> None:
    assert report(LINES).fallbacks == [
        "layer 0, mlp.gate_up of expert 2: no calibration token reached it",
        "layer 1, attention.qkv: its Hessian could not be factorised",
    ]


@pytest.mark.parametrize(
    "lines",
    [
        LINES,
        LINES[:1],
        [LINES[3]],
        [line(i, "mlp.down", 0.0, 0.0) for i in range(3)],
        [line(i, "mlp.down", 0.1, 0.01) for i in range(61)],
    ],
)
def test_the_figure_is_svg_with_every_point_inside(lines: list[dict[str, Any]]) -> None:
    root = ElementTree.fromstring(figure(report(lines, group_size=-1)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 64 <= float(circle.attrib["cx"]) <= width and 0 <= float(circle.attrib["cy"]) <= height
    texts = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("no groups" in text for text in texts) and "layer" in texts
    circles = [each.attrib["class"] for each in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 2 * sum(1 for each in {(e["layer"], e["matrix"][:12]) for e in lines if e["rtn_error"]})
    assert ("fallback" in circles) == any(each["fallback"] and each["rtn_error"] for each in lines) or lines is LINES
