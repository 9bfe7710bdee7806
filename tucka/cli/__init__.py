"""The command line ``tucka``; the only package that prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from tucka import __version__
from tucka.errors import TuckaError
from tucka.extras import needs

with needs("cli", "tucka.cli"):
    import typer

    from tucka.cli.count import count_adapters

__all__ = ["app", "run"]

app = typer.Typer(
    name="tucka",
    help="Tucker-structured expert adapters.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("count")(count_adapters)

_INTERRUPTED = 130


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a wrong argument, 130 after Ctrl-C."""
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="tucka", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except TuckaError as error:
        return _failed(str(error), 2)
    except Exception as error:
        # Usage errors. Their class lives in click or in typer, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        return _failed(error.format_message(), 2)
    # Some versions of typer return this code after Ctrl-C, and others raise.
    return _failed("interrupted", code) if code == _INTERRUPTED else code or 0


def _failed(message: str, code: int) -> int:
    typer.echo(f"tucka: {' '.join(message.split())}", err=True)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tucka {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
