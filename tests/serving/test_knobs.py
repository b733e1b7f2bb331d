from __future__ import annotations

from pathlib import Path

import pytest

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.serving.knobs import deployment_from


def test_knobs_change_the_starting_point(tmp_path: Path) -> None:
    assert deployment_from("m") == Deployment(model="m")
    assert deployment_from(None) == Deployment()
    assert deployment_from("m", as_first_deployed=True) == Deployment.as_first_deployed("m")
    assert deployment_from("m", at_full_speed=True) == Deployment.at_full_speed("m")
    assert deployment_from(None, '{"model": "n", "max_batch": 3}') == Deployment(model="n", max_batch=3)
    file = tmp_path / "d.json"
    file.write_text(Deployment(model="o", dtype="bfloat16").to_json())
    assert deployment_from(None, str(file)) == Deployment(model="o", dtype="bfloat16")
    knobs = ["dtype=float32", "max_queue=7", "chunked_prefill=false", "kv_blocks=null", "batch_window_ms=2.5"]
    expected = Deployment(model="p", max_queue=7, chunked_prefill=False, batch_window_ms=2.5)
    assert deployment_from("p", str(file), knobs=knobs) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"knobs": ["speed=11"]}, "no knob 'speed'"),
        ({"knobs": ["max_batch"]}, "knob=value"),
        ({"knobs": ["max_batch=0"]}, "at least 1"),
        ({"knobs": ["tensor_parallel=0"]}, "at least 1"),
        ({"knobs": ["max_batch=many"]}, "max_batch"),
        ({"knobs": ["dtype=int3"]}, "float32, bfloat16"),
        ({"given": "/nowhere/d.json"}, "cannot read"),
        ({"given": "{"}, "JSON object"),
        ({"given": '{"speed": 11}'}, "speed"),
        ({"given": "{}", "as_first_deployed": True}, "give one"),
        ({"at_full_speed": True, "as_first_deployed": True}, "give one"),
        ({"as_first_deployed": True, "knobs": ["batching=continuous"]}, "static"),
        ({"as_first_deployed": True, "knobs": ["tensor_parallel=2"]}, "labkit engine"),
    ],
)
def test_mistakes_are_named(arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        deployment_from("m", **arguments)
