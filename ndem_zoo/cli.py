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

import sys
import traceback
import warnings
from collections.abc import Sequence
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
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            from ndem_zoo.commands import app

            code = app([word for word in arguments if word != "--debug"], prog_name="ndem-zoo", standalone_mode=False)
            return code if isinstance(code, int) else OK
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else OK
        except BaseException as error:
            if debug:
                traceback.print_exc()
            return _report(error)


def _report(error: BaseException) -> int:
    """Say what went wrong, in one line on stderr, and return the exit code."""
    if hasattr(error, "format_message"):  # typer's own: wrong usage
        return _say(error.format_message(), getattr(error, "exit_code", USAGE))
    if type(error).__name__ == "Abort":
        return _say("interrupted", INTERRUPTED)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return _say(str(error) or ("interrupted" if code == INTERRUPTED else kind.__name__), code)
    return _say(f"unexpected {type(error).__name__}: {error} (--debug shows where)", UNEXPECTED)


def _say(message: str, code: int) -> int:
    print(f"ndem-zoo: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
    """One line, without the place in our code: it says nothing to the user of a command."""
    print(f"ndem-zoo: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
