"""Ctrl-C becomes one line and exit code 130, whatever a library makes of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import typer

from labkit.interrupt import told_on_interrupt


@pytest.fixture(autouse=True)
def a_process_that_hears() -> Iterator[None]:
    """A job in the background ignores Ctrl-C; these tests are about one that does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def made_into_another_error() -> None:
    try:
        press()
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize("work", [press, made_into_another_error])
def test_the_user_reads_one_line(work: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, told_on_interrupt("all is kept"):
        work()  # type: ignore[operator]
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "labkit: interrupted; all is kept\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_errors_pass_and_the_handler_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a real one"), told_on_interrupt("all is kept"):
        raise ValueError("a real one")
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_it_goes_on_ignoring_it(capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with told_on_interrupt("all is kept"):
        press()
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
