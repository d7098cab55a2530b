"""Sphinx configuration: pages in MyST, tutorials as executed py:percent scripts, API from the docstrings.

What could drift from the code is made from the code when the pages are built (`generated/`): presets with their
sources, options of the objectives, parameter counts, and the benchmark tables that were committed.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
# The kernel that executes the tutorials must see the same package as this process.
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
os.environ.setdefault("DGLBACKEND", "pytorch")
# Threads of one process wait for each other on a busy machine; networks this small are no slower with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tutorials run in a folder of their own.
os.environ.setdefault("NDEM_ZOO_SHARED_DATA", str(ROOT.parent / "shared" / "data"))
SHARED_DATA = Path(os.environ["NDEM_ZOO_SHARED_DATA"])

from ndem_zoo._version import __version__

project = "ndem_zoo"
author = "the ndem_zoo developers"
copyright = "the ndem_zoo developers, MIT license"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
]
exclude_patterns = ["_build", "_templates", "generated", "conf.py", "jupyter_execute", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"ndem_zoo {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
pygments_style = "friendly"

# ------------------------------------------------------------------------------------------------ MyST and tutorials

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
# Choice: always executed. A cache is keyed by the page's text only, so a changed package would keep its old output.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
# Nobody downloads 344 MB to build a page.
nb_execution_excludepatterns = [] if (SHARED_DATA / "oc20").is_dir() else ["tutorials/oc20.py"]

# ------------------------------------------------------------------------------------------------- API from docstrings

autosummary_generate = True
autodoc_mock_imports = ["metatensor", "metatomic"]  # an extra that this environment does not have
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
# Single backticks in docstrings: a link where the name is known, plain type where it is not.
default_role = "py:obj"


def _escape(app, what, name, obj, options, lines: list[str]) -> None:
    """Let |F| in docstrings be an absolute value: reStructuredText takes it for a substitution."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`.*?`)", line)
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"\|(\w+)\|", r"\\|\1\\|", p) for p in parts)


def _skip(app, what, name, obj, skip: bool, options) -> bool | None:
    """Leave out the metadata routing that scikit-learn's base class adds to every estimator."""
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


# ------------------------------------------------------------------------------------------- pages made from the code

RESULTS = ROOT / "benchmarks" / "accuracy" / "results"
SPEED_RESULTS = ROOT / "benchmarks" / "speed" / "results"


def _cell(value: object) -> str:
    """A value in a markdown table."""
    return f"`{value!r}`".replace("|", "\\|")


def preset_tables() -> str:
    """Every preset with the source of each value; of the second and later ones only what differs from the first."""
    from ndem_zoo.presets import DEFAULT_PRESET, PRESETS

    lines = []
    base = PRESETS[DEFAULT_PRESET]
    for name, values in PRESETS.items():
        is_base = name == DEFAULT_PRESET
        lines += [f"## `{name}`" + (" (default)" if is_base else ""), ""]
        shown = values if is_base else {k: v for k, v in values.items() if base.get(k) != v}
        if not is_base:
            lines += [f"As `{DEFAULT_PRESET}`, but for:", ""]
        lines += ["| keyword | value | source |", "|---|---|---|"]
        lines += [
            f"| `{key}` | {_cell(value)} | {source.replace('|', chr(92) + '|')} |"
            for key, (value, source) in shown.items()
        ]
        lines.append("")
    return "\n".join(lines)


def objective_options() -> str:
    """The options of every registered objective, from the docstrings of their dataclasses."""
    from ndem_zoo.registry import OBJECTIVES, lookup

    lines = []
    for name in OBJECTIVES:
        cls = lookup(OBJECTIVES, name, "objective")
        options = f"{cls.Options.__module__}.{cls.Options.__qualname__}"
        lines += [
            f"### Options of `{name}`",
            "",
            "```{eval-rst}",
            f".. autoclass:: {options}",
            "   :no-index:",
            "```",
            "",
        ]
    return "\n".join(lines)


def parameter_counts() -> str:
    """Number of parameters of published settings, counted on the network itself."""
    from ndem_zoo.models.potential import Potential
    from ndem_zoo.models.torchmd_net import TorchMDNet

    settings = {
        "ET of MD17 (default)": {},
        "ET of QM9": {"hidden_channels": 256, "num_layers": 8, "num_rbf": 64},
        "preset `md17_fast`": {"hidden_channels": 64, "num_layers": 3},
    }
    lines = [
        "| setting | options | backbone and energy head | noisy-force head, in training only |",
        "|---|---|---|---|",
    ]
    for name, options in settings.items():
        backbone = TorchMDNet(**options)
        head = sum(p.numel() for p in backbone.vector_head().parameters())
        shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
        lines.append(f"| {name} | `{shown}` | {Potential(backbone).n_parameters:,} | {head:,} |")
    return "\n".join(lines) + "\n"


def property_table() -> str:
    """Targets whose way from atoms to structures is known."""
    from ndem_zoo.properties import PROPERTIES

    subtracted = {True: "sum over elements, fitted", False: "mean"}
    lines = ["| target | unit | readout | subtracted | papers report |", "|---|---|---|---|---|"]
    for name, known in PROPERTIES.items():
        first = "nothing" if known.readout == "dipole" else subtracted[known.has_references]
        readout = known.readout.replace("_", " ")
        lines.append(f"| `{name}` | {known.unit} | {readout} | {first} | {known.report or known.unit} |")
    return "\n".join(lines) + "\n"


def benchmark_tables(folder: Path | None = None) -> str:
    """Include the committed tables of a benchmark (default: of accuracy), or say that there are none."""
    folder = RESULTS if folder is None else folder
    tables = sorted(folder.glob("*.md"))
    if not tables:
        return f"No table has been committed to `benchmarks/{folder.parent.name}/results/` yet, so none is shown.\n"
    blocks = [f"```{{include}} {os.path.relpath(path, HERE)}\n:heading-offset: 2\n```\n" for path in tables]
    return "\n".join(blocks)


GENERATED = {
    "presets.md": preset_tables,
    "objective_options.md": objective_options,
    "parameter_counts.md": parameter_counts,
    "properties.md": property_table,
    "benchmarks.md": benchmark_tables,
    "speed.md": lambda: benchmark_tables(SPEED_RESULTS),
}


def write_generated(app=None) -> None:
    """Write the files of `generated/`; unchanged ones keep their date, so that pages are not built again for nothing."""
    folder = HERE / "generated"
    folder.mkdir(exist_ok=True)
    for name, make in GENERATED.items():
        text, path = make(), folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def remove_stale_pages(app) -> None:
    """Delete API pages of modules that are gone; autosummary leaves them, and they would be warnings."""
    from importlib.util import find_spec

    for page in (HERE / "api" / "generated").glob("*.rst"):
        try:
            exists = find_spec(page.stem) is not None
        except ModuleNotFoundError:
            exists = False
        if not exists:
            page.unlink()


def setup(app) -> None:
    """Connect the functions above."""
    app.connect("builder-inited", remove_stale_pages, priority=100)
    app.connect("builder-inited", write_generated, priority=100)
    app.connect("autodoc-process-docstring", _escape, priority=100)
    app.connect("autodoc-skip-member", _skip)
