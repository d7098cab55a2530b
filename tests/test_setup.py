"""How the project is installed: setup.py against the pinned versions, and what scripts/setup_env.py says and removes."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")
requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = {path.stem: path for path in (ROOT / "constraints").glob("*.txt")}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}


@pytest.fixture(scope="module")
def metadata():
    """The arguments of setup()."""
    caught = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return caught


@pytest.fixture
def setup_env():
    """scripts/setup_env.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(path: Path) -> dict[str, str]:
    """Version of each package in a constraints file; every line must pin one."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line)
            assert match, f"{path.name}: {line!r} is no plain pin"
            found[re.sub(r"[-_.]+", "-", match.group(1)).lower()] = match.group(2)
    return found


def lines_for(lines: list[str], python: str) -> list:
    """Requirements that hold for a version of Python on Linux."""
    parsed = [requirements.Requirement(line) for line in lines]
    return [r for r in parsed if r.marker is None or r.marker.evaluate(LINUX | {"python_version": python})]


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("full-py311", ["full", "xtb", "docs", "dev"]),
        ("modern-py312", ["full", "dev"]),
        ("latest-torch-py311", ["dgl", "chem", "deepchem", "oc20", "cli", "plots", "tensorboard", "xtb", "dev"]),
    ],
)
def test_every_requirement_has_a_pin_within_its_bounds(metadata, file, extras):
    pinned = pins(CONSTRAINTS[file])
    lines = metadata["install_requires"] + [line for extra in extras for line in metadata["extras_require"][extra]]
    for requirement in lines_for(lines, f"3.{file[-2:]}"):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned, f"{requirement} has no pin in {file}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes {pinned[name]} of {file}"


def test_modern_set_has_the_schnetpack_that_needs_it():
    full, modern = (pins(CONSTRAINTS[file]) for file in ("full-py311", "modern-py312"))
    assert (modern["torch"], modern["schnetpack"], full["schnetpack"]) == ("2.15.0", "2.2.0", "2.1.1")
    assert "deepchem" not in modern
    assert modern["pytorch-lightning"] == full["pytorch-lightning"]


def test_the_two_sets_differ_in_torch_and_share_the_rest():
    full, latest = (pins(CONSTRAINTS[file]) for file in ("full-py311", "latest-torch-py311"))
    assert (full["torch"], latest["torch"]) == ("2.4.1", "2.13.0")
    assert "schnetpack" in full
    assert "schnetpack" not in latest
    assert {name for name in full.keys() & latest.keys() if full[name] != latest[name]} == {"torch", "sympy"}


def test_extras_are_flat_and_full_holds_all_of_its_parts(metadata):
    extras = metadata["extras_require"]
    for name, lines in extras.items():
        assert not [line for line in lines if line.startswith("ndem")], f"{name} refers to the package itself"
    for part in ("dgl", "chem", "deepchem", "schnetpack", "oc20", "cli", "plots", "tensorboard"):
        assert set(extras[part]) <= set(extras["full"]), part


def test_no_tests_or_benchmarks_are_installed(metadata):
    tops = {package.split(".")[0] for package in metadata["packages"]}
    assert "ndem_zoo" in tops
    assert tops <= {"ndem_zoo", "hydra_plugins"}
    assert "ndem_zoo.datasets" in metadata["packages"]


REFUSED = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(Failed to establish a new connection)'
ERROR: Could not find a version that satisfies the requirement setuptools>=64 (from versions: none)
ERROR: No matching distribution found for setuptools>=64
"""
CONFLICT = """ERROR: Cannot install a and b because these package versions have conflicting dependencies.

The conflict is caused by:
    a 1.0 depends on c<2
    The user requested (constraint) c==2.0

To fix this you could try to:
ERROR: ResolutionImpossible: for help visit the documentation
"""


@pytest.mark.parametrize(
    ("log", "online", "said"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            True,
            "disk is full",
        ),
        (REFUSED, False, "no network"),
        ("ReadTimeoutError: Read timed out.\n", True, "no network"),
        (CONFLICT, False, "no network"),
        (CONFLICT, True, "no versions satisfy all of: a 1.0 depends on c<2; The user requested (constraint) c==2.0"),
        ("ERROR: No matching distribution found for torch==99\n", True, "has no torch==99"),
        ("hm\nerror: command 'gcc' failed\n[end of output]\n", True, "error: command 'gcc' failed"),
        ("", True, "pip ended without a word"),
    ],
)
def test_failures_are_explained_in_one_line(setup_env, monkeypatch, tmp_path, log, online, said):
    monkeypatch.setattr(setup_env, "index_answers", lambda venv: online)
    line = setup_env.explain(log, tmp_path)
    assert said in line
    assert "\n" not in line


def test_wrong_python_is_named(setup_env, capsys, tmp_path):
    assert setup_env.main([str(tmp_path / "venv"), "constraints.txt", "x", "--python", "3.99"]) == 1
    line = capsys.readouterr().err
    assert "Python 3.99 is needed" in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


@pytest.fixture
def environment(setup_env, monkeypatch, tmp_path):
    """A stand-in for the environment: pip does nothing, or fails when told to; returns how to call it."""
    state = {"calls": 0, "fails": False}

    def run(command, venv):
        state["calls"] += 1
        (venv / "bin").mkdir(exist_ok=True)
        (venv / "bin" / "python").touch()
        if state["fails"]:
            raise setup_env.Problem("planned")

    constraints = tmp_path / "constraints.txt"
    constraints.write_text("a==1\n")
    monkeypatch.setattr(setup_env, "run", run)
    monkeypatch.setattr(setup_env, "check_python", lambda wanted, variable: None)

    def call(*, fails: bool = False, disk: str = "0") -> int:
        state.update(calls=0, fails=fails)
        status = setup_env.main([str(tmp_path / "venv"), str(constraints), "a", "--disk", disk])
        return state["calls"] if status == 0 else -1

    call.venv, call.constraints = tmp_path / "venv", constraints
    return call


def test_second_call_does_nothing_and_a_new_pin_updates(environment):
    assert environment() > 0
    (environment.venv / "mine").touch()
    assert environment() == 0
    environment.constraints.write_text("a==2\n")
    assert environment() > 0
    assert (environment.venv / "mine").exists(), "an update keeps what is there"
    assert environment() == 0


def test_failed_installation_leaves_nothing(environment):
    assert environment(fails=True) == -1
    assert not environment.venv.exists()
    assert environment() > 0


def test_failed_update_keeps_the_environment_and_is_tried_again(environment):
    environment()
    environment.constraints.write_text("a==2\n")
    assert environment(fails=True) == -1
    stamp = environment.venv / "ndem_zoo-installed"
    assert stamp.stat().st_mtime < environment.constraints.stat().st_mtime, "make must see that it is outdated"
    assert environment() > 0


def test_unfinished_or_moved_environment_is_made_again(environment, setup_env):
    environment()
    (environment.venv / "ndem_zoo-installed").unlink()
    (environment.venv / "rest").touch()
    assert environment() > 0
    assert not (environment.venv / "rest").exists()
    (environment.venv / setup_env.MARKER).write_text(os.fspath(environment.venv) + "-elsewhere\n")
    assert environment() > 0


def test_somebody_elses_folder_is_not_touched(environment, capsys):
    environment.venv.mkdir()
    (environment.venv / "precious").touch()
    assert environment() == -1
    assert (environment.venv / "precious").exists()
    assert "was not made by make" in capsys.readouterr().err


def test_too_little_space_is_said_before_anything_is_made(environment, capsys):
    assert environment(disk="1e9") == -1
    assert "the disk is full" in capsys.readouterr().err
    assert not environment.venv.exists()
