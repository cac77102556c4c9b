"""The application: its commands, the flags they share, and the one place where errors become exit codes.

A command is a typed function in a file of its name, with an `EPILOG`: one runnable example for its help page. Its file
imports nothing heavy at the top, so that `pixtral -h` answers at once. To add one, list it in `COMMANDS`, and its name
in `GROUPS`.

Every command takes -v, -q, --debug and -V without declaring them: `with_flags` adds them and hands them to `output`.
"""

from __future__ import annotations

import errno
import functools
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pixtral_cli import output
from pixtral_cli.commands import (
    ask,
    bench,
    build,
    check,
    compare,
    doctor,
    export,
    inspect,
    merge,
    plan,
    run,
    serve,
    sign,
    tune,
    verify,
)
from pixtral_cli.commands import eval as evaluate
from pixtral_runtime.errors import DISK_HINT, FAILING, FULL, UNWRITABLE, InputError, MachineError, PixtralError
from pixtral_runtime.version import __version__

COMMANDS = (
    (export.export, export.EPILOG),
    (build.build, build.EPILOG),
    (run.run, run.EPILOG),
    (bench.bench, bench.EPILOG),
    (evaluate.eval, evaluate.EPILOG),
    (tune.tune, tune.EPILOG),
    (merge.merge, merge.EPILOG),
    (ask.ask, ask.EPILOG),
    (serve.serve, serve.EPILOG),
    (check.check, check.EPILOG),
    (compare.compare, compare.EPILOG),
    (verify.verify, verify.EPILOG),
    (sign.sign, sign.EPILOG),
    (plan.plan, plan.EPILOG),
    (inspect.inspect, inspect.EPILOG),
    (doctor.doctor, doctor.EPILOG),
)
GROUPS = {
    "Make": ("export", "build", "sign"),
    "Run": ("run", "ask", "serve", "merge"),
    "Measure": ("bench", "eval", "compare", "tune"),
    "Look": ("plan", "check", "verify", "inspect", "doctor"),
}
"""Under which heading of `pixtral -h` a command stands."""
BUG, INTERRUPTED = 1, 130
UNUSABLE_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENODEV, errno.ENXIO)
"""What the system says of names alone: whatever the command wanted there, nothing of the kind can be."""
SHOWN_CHARACTERS = 200  # of such a name
READER_LEFT = 141  # as a shell says of programs that end when the reader of their output does, such as `head`


class ErrorsToExitCodes(TyperGroup):
    """Runs a command and turns what it raises into a message on stderr and an exit code, in a terminal as in tests."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise  # typer's own: wrong usage, a wanted exit
        except BrokenPipeError as error:
            output.discard(sys.stdout)
            raise typer.Exit(READER_LEFT) from error
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(report(error)) from error

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands under the headings of `GROUPS`, each with the whole first sentence of its help."""
        names = self.list_commands(ctx)
        grouped = {name for members in GROUPS.values() for name in members}
        for heading, members in {**GROUPS, "Commands": [name for name in names if name not in grouped]}.items():
            rows = [(name.ljust(max(map(len, names))), self._first_sentence(name)) for name in members if name in names]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def _first_sentence(self, name: str) -> str:
        return self.commands[name].get_short_help_str(limit=sys.maxsize)  # what is too long for a line is wrapped


def report(error: BaseException) -> int:
    """Tell the user on stderr. Returns the exit code (the table in CONTRIBUTING.md)."""
    if output.flags.debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        output.error_line(": ".join(("interrupted", *map(str, error.args))))
        return INTERRUPTED
    known = _as_pixtral_error(error)
    if known is None:
        output.error_line(f"bug in pixtral {__version__}: {type(error).__name__}: {error}", "--debug shows where")
        return BUG
    output.error_line(str(known), output.hint_of(known))
    return known.exit_code


def _as_pixtral_error(error: BaseException) -> PixtralError | None:
    """The error itself, or what the system's refusals mean to the user."""
    if isinstance(error, PixtralError):
        return error
    if isinstance(error, MemoryError):
        return MachineError(f"not enough memory: {error}", "pixtral doctor")
    if isinstance(error, OSError) and error.errno in FULL:
        return MachineError(f"the disk is full: {error.filename or error.strerror}", "df -h .")
    if isinstance(error, OSError) and error.errno in (*FAILING, *UNWRITABLE):
        return MachineError(f"{str(error.filename or 'a file')[:SHOWN_CHARACTERS]}: {error.strerror}", DISK_HINT)
    if isinstance(error, PermissionError):
        return InputError(f"{error.filename}: permission denied", f"ls -ld '{error.filename}'")
    if isinstance(error, OSError) and error.filename and error.errno in UNUSABLE_NAMES:
        return InputError(f"{str(error.filename)[:SHOWN_CHARACTERS]}: {error.strerror}", "check the path")
    return None


def _show_version(wanted: bool) -> None:
    if wanted:
        output.print_line(f"pixtral {__version__}")
        raise typer.Exit()


def shared_flags(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say only warnings and errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("-V", "--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Export Pixtral to portable ONNX, and run it over images without torch."""
    output.set_flags(output.Flags(verbose, quiet, debug))


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """The command with the shared flags after its own; given before the command's name, they hold as well."""
    own = signature(function, eval_str=True)
    shared = signature(shared_flags, eval_str=True).parameters

    @functools.wraps(function)
    def command(*, verbose: bool, quiet: bool, debug: bool, version: bool, **arguments: Any) -> None:
        before = output.flags
        output.set_flags(output.Flags(before.verbose or verbose, before.quiet or quiet, before.debug or debug))
        output.show_library_warnings()
        function(**arguments)

    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own.parameters.values(), *shared.values())]
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
    return command


def application(commands: Sequence[tuple[Callable[..., None], str]]) -> typer.Typer:
    """The commands, each with its epilog, behind one name."""
    app = typer.Typer(
        cls=ErrorsToExitCodes,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # plain help pages: they come sooner and copy cleanly into a shell
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog="Example: pixtral doctor")(shared_flags)
    for function, epilog in commands:
        settings = {"auto_envvar_prefix": "PIXTRAL"} if function is serve.serve else None  # for containers and units
        command = app.command(epilog=f"\b\n{epilog}", context_settings=settings)  # \b: never wrapped, to be copied
        command(with_flags(function))
    return app


app = application(COMMANDS)


def main() -> None:
    output.prepare_streams()
    with output.on_signals(signal.default_int_handler):  # process 1 of a container would ignore SIGTERM
        app(prog_name="pixtral")
