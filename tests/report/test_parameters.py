from __future__ import annotations

import pytest

from labkit.errors import UserError
from labkit.report.parameters import parse


def test_values_are_yaml() -> None:
    assert parse(["a=true", "b=[1, 2]", "c=x=y", "d=", "e=1.5"]) == {
        "a": True,
        "b": [1, 2],
        "c": "x=y",
        "d": None,
        "e": 1.5,
    }


@pytest.mark.parametrize("pair", ["a", "=1", "1a=2", "a b=1", "a=[1"])
def test_what_is_no_parameter_is_refused(pair: str) -> None:
    with pytest.raises(UserError):
        parse([pair])
