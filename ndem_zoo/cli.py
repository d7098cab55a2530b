"""The entry point ``ndem-zoo``: runs a command, and turns errors into one line and an exit code that a script can rely on.

The commands themselves are in `commands.py`; what they do is in `runs.py`. Nothing heavy is imported here.

====  ==================================================================================================
0     done
1     unexpected: a bug, a full disk, a training that diverged
2     usage or configuration: an unknown option, key, model, preset, device; a folder that must not be overwritten
3     data: a file that is missing or damaged, structures or labels that cannot be used
130   interrupted (Ctrl-C); what the command had is saved
====  ==================================================================================================
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ndem_zoo.errors import ConfigError, DataError, FileFormatError, NotFittedError, TrainingError

OK, UNEXPECTED, USAGE, DATA, INTERRUPTED = 0, 1, 2, 3, 130

#: Exit code of each error that is raised on purpose; the first class that fits counts.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (ConfigError, USAGE),
    (DataError, DATA),
    (FileFormatError, DATA),
    (FileNotFoundError, DATA),
    (FileExistsError, USAGE),
    (IsADirectoryError, USAGE),
    (NotADirectoryError, USAGE),
    (ImportError, USAGE),
    (NotFittedError, UNEXPECTED),
    (TrainingError, UNEXPECTED),
    (OSError, UNEXPECTED),
    (KeyboardInterrupt, INTERRUPTED),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``ndem-zoo``; ends the process with one of the exit codes above.

    Parameters
    ----------
    arguments
        Words of the command line; default: those of the process.
    """
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; ``--debug``, anywhere, shows the traceback of an error."""

    def call() -> Any:
        from ndem_zoo.commands import app

        return app([word for word in arguments if word != "--debug"], prog_name="ndem-zoo", standalone_mode=False)

    rank = os.environ.get("RANK", "0")  # of several processes that train together; all of them write to one terminal
    return guarded(call, "ndem-zoo" if rank == "0" else f"ndem-zoo[{rank}]", debug="--debug" in arguments)


def guarded(call: Callable[[], Any], program: str, debug: bool = False) -> int:
    """Call a function, and turn what it raises into one line on stderr and an exit code; likewise its warnings.

    Parameters
    ----------
    call
        Its result is the exit code, if it is an integer.
    program
        Name at the beginning of the lines.
    debug
        Whether to print the traceback of an error as well.
    """

    def say(message: object) -> None:
        print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        # Only the text: the place in our code says nothing to the user of a command.
        warnings.showwarning = lambda message, *place, **options: say(f"warning: {message}")
        try:
            code = call()
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            if debug:
                traceback.print_exc()
            message, code = explain(error)
            say(message)
    return code if isinstance(code, int) else OK


def explain(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and its exit code."""
    if hasattr(error, "format_message"):  # typer's own: wrong usage
        return error.format_message(), getattr(error, "exit_code", USAGE)
    if type(error).__name__ == "Abort":  # likewise: Ctrl-C, in older versions
        return "interrupted", INTERRUPTED
    for kind, code in _CODES:
        if isinstance(error, kind):
            return str(error) or ("interrupted" if code == INTERRUPTED else kind.__name__), code
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)", UNEXPECTED


if __name__ == "__main__":
    main()
