"""Make a virtual environment, install a pinned set of packages into it, and say in one line what went wrong if it did.

Called by the Makefile with the Python that the environment shall have; needs the standard library only, and parses in
any Python 3 so that the wrong one gets a message. A finished environment carries a stamp (`ndem_zoo-installed`) with a
fingerprint of what it was made from: a second call returns at once, a changed setup.py updates it, and whatever was
left unfinished is removed. Two calls at the same time wait for each other.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = "ndem_zoo-environment"  # there from the first moment: this folder is ours, and may be removed
STAMP = "ndem_zoo-installed"  # there when everything is installed; make looks at its date

#: What pip writes when it cannot reach what it installs from.
NETWORK = (
    r"Failed to establish a new connection|Temporary failure in name resolution|Name or service not known"
    r"|Network is unreachable|Connection refused|Connection reset|Read timed out|ConnectTimeout|ReadTimeout"
    r"|ProxyError|RemoteDisconnected|SSLError|CERTIFICATE_VERIFY_FAILED|Max retries exceeded"
)


class Problem(Exception):
    """Something that the user can mend; its text is the one line that is printed."""


def parse_arguments(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a virtual environment with a pinned set of packages.")
    parser.add_argument("venv", type=Path, help="folder of the environment, such as .venv")
    parser.add_argument("constraints", type=Path, help="file with the tested versions")
    parser.add_argument("requirements", nargs="+", help="what to install; a folder with extras becomes editable")
    parser.add_argument("--python", default="3.11", help="the version that the constraints are for (default: 3.11)")
    parser.add_argument("--variable", default="PYTHON", help="of make, that names the Python (default: PYTHON)")
    parser.add_argument("--disk", type=float, default=1.0, help="free space in GB that the installation needs")
    return parser.parse_args(argv)


def main(argv=None):
    """Make, update or accept the environment; return the exit status."""
    options = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_python(options.python, options.variable)
        with one_at_a_time(options.venv):
            set_up(options)
    except Problem as problem:
        print("set-up of {} failed: {}".format(options.venv, problem), file=sys.stderr)
        return 1
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        print("set-up of {} failed: {}".format(options.venv, what), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up of {} was interrupted; the next call starts again".format(options.venv), file=sys.stderr)
        return 130
    return 0


def check_python(wanted, variable="PYTHON"):
    """Refuse a Python that the constraints were not made for."""
    found = "{}.{}.{}".format(*sys.version_info[:3])
    if found.split(".")[:2] != wanted.split("."):
        raise Problem(
            "Python {} is needed, but {} is Python {}; install it, or name it: make {}=/path/to/python{}".format(
                wanted, sys.executable, found, variable, wanted
            )
        )
    if importlib.util.find_spec("venv") is None:
        raise Problem("{} has no venv module (on Debian: apt-get install python{}-venv)".format(sys.executable, wanted))


@contextlib.contextmanager
def one_at_a_time(venv):
    """Hold a lock beside the environment, so that two makes do not build it at once."""
    venv.resolve().parent.mkdir(parents=True, exist_ok=True)
    with open(str(venv) + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(options):
    """Bring the environment to the state that the arguments ask for."""
    venv, fingerprint = options.venv, fingerprint_of(options)
    old = installed_fingerprint(venv)
    if old == fingerprint:
        (venv / STAMP).touch()
        return
    check_disk(venv, options.disk if old is None else 0.2)
    began = time.monotonic()
    print("Setting up {} (log: {}) ...".format(venv, log_of(venv)), flush=True)
    log_of(venv).write_text("")
    if old is None:
        build(options, fingerprint)
    else:
        update(options, fingerprint, old)
    size = sum(file.lstat().st_size for file in venv.rglob("*") if not file.is_dir())
    print("{} is ready: {:.0f} s, {:.1f} GB".format(venv, time.monotonic() - began, size / 1e9), flush=True)


def fingerprint_of(options):
    """Hash everything that the content of the environment depends on, its own place included."""
    parts = [options.venv.absolute(), os.path.realpath(sys.executable), sys.version, *options.requirements]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode())
    for file in (options.constraints, ROOT / "setup.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def installed_fingerprint(venv):
    """Return what a finished environment was made from; None if it has to be made."""
    with contextlib.suppress(OSError):
        # A copied folder, or one whose Python was removed since, has no working interpreter.
        if (venv / "bin" / "python").exists() and recorded_place(venv) == venv.absolute():
            return (venv / STAMP).read_text().strip()
    return None


def recorded_place(venv):
    """Return where the environment was made: its scripts name that place, so that it cannot be moved or copied."""
    return Path((venv / MARKER).read_text().strip())


def check_disk(venv, needed):
    """Refuse to start what would fill the disk; where space is short, keep pip from filling its cache as well."""
    free = shutil.disk_usage(str(venv.absolute().parent)).free / 1e9
    if free < needed:
        text = "the disk is full: {:.1f} GB free in {}, about {:.1f} GB are needed"
        raise Problem(text.format(free, venv.absolute().parent, needed))
    if free < 1.5 * needed:
        os.environ.setdefault("PIP_NO_CACHE_DIR", "1")


def build(options, fingerprint):
    """Make the environment from nothing; leave nothing behind if that fails."""
    venv = options.venv
    remove(venv)
    venv.mkdir(parents=True)
    try:
        (venv / MARKER).write_text("{}\n".format(venv.absolute()))
        create_venv(venv)
        install(options)
        (venv / STAMP).write_text(fingerprint + "\n")
    except BaseException:
        remove(venv)
        raise


def update(options, fingerprint, old):
    """Install what changed; a failure leaves the environment as pip left it, and marked as outdated."""
    stamp = options.venv / STAMP
    stamp.unlink()
    try:
        install(options)
    except Problem:
        stamp.write_text(old + "\n")
        os.utime(str(stamp), (0, 0))
        raise
    stamp.write_text(fingerprint + "\n")


def remove(venv):
    """Delete an environment that this script made, and nothing else."""
    if not venv.exists():
        return
    if not (venv / MARKER).exists():
        raise Problem("{} exists and was not made by make; move it away, or say make VENV=other".format(venv))
    for entry in venv.iterdir():
        if entry.name == MARKER:
            continue  # goes last: killed on the way, the next call still knows that it may remove
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            entry.unlink()
    remove_tree(venv)


def remove_tree(folder):
    """Delete a folder, again if a pip that outlived its parent has just put something there."""
    for pause in (1.0, 3.0):
        try:
            return shutil.rmtree(str(folder))
        except OSError:
            time.sleep(pause)
    return shutil.rmtree(str(folder))


def create_venv(venv):
    """Create the environment with pip in it; Debian's Python without ensurepip lends its own pip."""
    command = [sys.executable, "-m", "venv", str(venv)]
    if importlib.util.find_spec("ensurepip") is not None:
        return run([*command], venv)
    if importlib.util.find_spec("pip") is None:
        raise Problem(
            "{} has neither ensurepip nor pip (on Debian: apt-get install python3-venv)".format(sys.executable)
        )
    run([*command, "--without-pip"], venv)
    return run([sys.executable, "-m", "pip", "--python", str(python_of(venv)), "install", "pip"], venv)


def install(options):
    """Install the requirements with pip, check that they fit together, and name the cause if not."""
    command = [str(python_of(options.venv)), "-m", "pip"]
    requirements = []
    for requirement in options.requirements:
        requirements += ["--editable", requirement] if requirement.startswith(".") else [requirement]
    # editable_mode=compat puts the folder itself on the path: packages that are added later need no new installation.
    flags = ["--no-compile", "--progress-bar", "off", "--config-settings", "editable_mode=compat"]
    run([*command, "install", *flags, "--constraint", str(options.constraints.absolute()), *requirements], options.venv)
    run([*command, "check"], options.venv)


def python_of(venv):
    """Return the environment's interpreter."""
    return venv.absolute() / "bin" / "python"


def log_of(venv):
    """Return the file that pip's output goes to; it outlives an environment that could not be made."""
    return Path(str(venv) + ".log")


def run(command, venv):
    """Run a command with its output in the log; raise a `Problem` that says in one line why it failed."""
    temporary = venv.absolute() / "tmp"  # pip unpacks gigabytes: not into a small /tmp
    temporary.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment.update(TMPDIR=str(temporary), PIP_NO_INPUT="1", PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    with open(str(log_of(venv)), "a") as log:
        print("$", *command, file=log, flush=True)
        start = log.tell()
        process = subprocess.Popen(command, cwd=str(ROOT), env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = wait(process)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    shutil.rmtree(str(temporary), ignore_errors=True)
    if status != 0:
        output = log_of(venv).read_bytes()[start:].decode(errors="replace")
        raise Problem("{}; the log is {}".format(explain(output, venv), log_of(venv)))


def wait(process):
    """Wait for a process, with a running clock if somebody is looking."""
    began = time.monotonic()
    while sys.stdout.isatty():
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            print("\r{:4.0f} s ".format(time.monotonic() - began), end="\r", flush=True)
    return process.wait()


def explain(log, venv):
    """Say in one line why pip failed."""
    if re.search(r"No space left on device|Disk quota exceeded", log):
        return "the disk is full"
    missing = re.search(r"No matching distribution found for (\S+)", log)
    conflict = re.search(r"The conflict is caused by:\n(.*?)\n\s*\n", log, flags=re.DOTALL)
    if (re.search(NETWORK, log) and not (missing or conflict)) or not index_answers(venv):
        return "no network: pip cannot reach its package index (see also PIP_INDEX_URL and the proxy settings)"
    if missing:
        return "the package index has no {} for this Python and platform".format(missing.group(1))
    if conflict:
        return "no versions satisfy all of: " + "; ".join(line.strip() for line in conflict.group(1).splitlines())
    errors = [line.strip() for line in log.splitlines() if re.match(r"\s*(ERROR|error)\b", line)]
    lines = errors or [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "pip ended without a word"


def index_answers(venv):
    """Ask pip for a package that every index has: what pip says of a dead one differs from version to version."""
    flags = ["--no-deps", "--no-cache-dir", "--quiet", "--retries", "0", "--timeout", "15"]
    if not python_of(venv).exists():
        return True
    with tempfile.TemporaryDirectory(dir=str(venv.absolute())) as folder:
        command = [str(python_of(venv)), "-m", "pip", "download", *flags, "--dest", folder, "setuptools"]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
