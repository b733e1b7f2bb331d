"""The ``labkit`` command: a thin face on what is below. Every command imports what it needs when it is called."""

from __future__ import annotations

import sys

import typer

from labkit.errors import UserError

app = typer.Typer(
    name="labkit",
    help="An optimisation lab for LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options() -> None:
    """An optimisation lab for LLM inference."""


def main() -> None:
    """Entry point: a UserError or a failing disk becomes one clear line and exit code 1."""
    try:
        app()
    except UserError as error:
        print(f"labkit: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"labkit: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
