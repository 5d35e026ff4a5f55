"""The command line. A command's file is loaded when the command is asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from .errors import UserError, escaped, nearest

COMMANDS = {  # command -> its file in `commands/`
    "predict": "predict",
    "compare": "compare",
    "estimate": "estimate",
    "explain": "explain",
    "advise": "advise",
    "sweep": "sweep",
    "plan": "plan",
    "report": "report",
    "app": "app",
    "record": "record",
    "models": "lists",
    "methods": "lists",
    "devices": "lists",
    "nodes": "lists",
    "calibrate": "calibrate",
    "validate": "validate",
    "completion": "completion",
}

LONGEST = 600  # characters of a complaint


class Unwritten(SystemExit):
    """The end of a command whose answer could not be written, which has been said."""


class Main(click.Group):
    """Loads commands on demand, and turns a user's mistake into one line and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            raise UserError(f"no such command {cmd_name!r}: {nearest(cmd_name, COMMANDS)}")
        found: click.Command = getattr(import_module(f".commands.{COMMANDS[cmd_name]}", __package__), cmd_name)
        return found

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            result = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except (UserError, click.ClickException) as error:
            click.echo(f"perfmodel: {_line(_message(error))}", err=True)
            sys.exit(2)
        except OSError as error:  # what was answered could not be written: a full disk behind a pipe or a redirection
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"perfmodel: {where}{error.strerror or error}", err=True)
            raise Unwritten(1) from error
        except click.Abort:
            sys.exit(130)
        sys.exit(result if isinstance(result, int) else 0)


def _message(error: Exception) -> str:
    """What is wrong; of an option that is missing, what it takes as well."""
    if not isinstance(error, click.ClickException):
        return str(error)
    about = getattr(error.param, "help", None) if isinstance(error, click.MissingParameter) else None
    return f"{error.format_message()} {about}" if about else error.format_message()


def _line(message: str) -> str:
    """A complaint as one line; the middle of a very long one is left out."""
    line = escaped(" ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="perfmodel")
def main() -> None:
    """Will LoRA make my training step faster, by how much, why, and what should I run instead?"""
