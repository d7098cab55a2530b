"""Names, versions and dependencies of the package; tools are configured in pyproject.toml.

The base holds only what every stack has. The extras are flat: each line is written out (by list concatenation), because
an extra that refers to another extra of the same package makes pip download one torch after the other. Bounds on torch
stand in the extras that need them, so that the core runs with any torch >= 2.1. Tested version sets: constraints/.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
VERSION_FILE = HERE / "ndem_zoo" / "_version.py"
VERSION = re.search(r'"([0-9][^"]*)"', VERSION_FILE.read_text(encoding="utf-8")).group(1)

CORE = [
    "torch>=2.1",
    "numpy>=1.23",
    "scipy>=1.9",
    "pandas>=1.5",
    "scikit-learn>=1.3",
    "ase>=3.25",
    "vesin>=0.3",
    "e3nn>=0.5.1",
    "pytorch-lightning>=2.4,<2.6",  # brings lightning_fabric; with 2.6 SchNetPack's spktrain fails after training
    "safetensors>=0.4",
    "pooch>=1.8",
    "jaxtyping>=0.2.30",
]

# DGL has wheels for Linux on x86-64 only. 1.1.3 is the last one that imports beside any torch; Python 3.12 has 2.1.0
# only, which imports with the guard in ndem_zoo/graph.py; 3.13 has none, and there the core works without it.
WHEELS = "sys_platform=='linux' and platform_machine=='x86_64'"
DGL = [
    f"dgl==1.1.3; python_version<'3.12' and {WHEELS}",
    f"dgl==2.1.0; python_version=='3.12' and {WHEELS}",
]
CHEM = ["rdkit>=2023.9"]
DEEPCHEM = ["deepchem>=2.8; python_version<'3.12'"]
# schnetpack 2.1.1 caps sympy at 1.12, which torch >= 2.5 does not accept; 2.2 needs Python 3.12.
SCHNETPACK = [
    "torch>=2.1,<2.5; python_version<'3.12'",
    "sympy<=1.12; python_version<'3.12'",
    "schnetpack>=2.1.1,<2.2; python_version<'3.12'",
    "torch>=2.6; python_version>='3.12'",
    "schnetpack>=2.2,<3; python_version>='3.12'",
]
CLI = ["typer>=0.12", "rich>=13"]
PLOTS = ["matplotlib>=3.7"]
TENSORBOARD = ["tensorboard>=2.12"]
XTB = ["tblite>=0.4"]
GPU = ["nvalchemi-toolkit-ops[torch]>=0.5; python_version>='3.11' and sys_platform=='linux'"]
RAY = ["ray[data,train,tune]>=2.9"]
METATOMIC = ["metatomic-torch>=0.1.19,<0.2", "metatomic-ase>=0.1.1,<0.2"]
DOCS = [
    "sphinx>=7.3",
    "furo>=2024.1",
    "myst-nb>=1.1",
    "jupytext>=1.16",
    "ipykernel>=6",
    "numpydoc>=1.7",
    *PLOTS,
]
DEV = [
    "lmdb>=1.4",  # writes the files that ours reads
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "beartype>=0.18",
    "ruff>=0.9",
    "mypy>=1.10",
]

setup(
    name="ndem_zoo",
    version=VERSION,
    description="Denoising objectives for machine-learned force fields, as interchangeable parts on several backbones",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="the ndem_zoo developers",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["machine learning", "force field", "interatomic potential", "denoising", "molecular dynamics"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Chemistry",
        "Topic :: Scientific/Engineering :: Physics",
    ],
    python_requires=">=3.10,<3.14",
    install_requires=CORE,
    extras_require={
        "full": SCHNETPACK + DGL + CHEM + DEEPCHEM + CLI + PLOTS + TENSORBOARD,
        "dgl": DGL,
        "chem": CHEM,
        "deepchem": DEEPCHEM,
        "schnetpack": SCHNETPACK,
        "oc20": [],  # its files are read without further packages; the name stays for those who ask for it
        "cli": CLI,
        "plots": PLOTS,
        "tensorboard": TENSORBOARD,
        "xtb": XTB,
        "gpu": GPU,
        "ray": RAY,
        "metatomic": METATOMIC,
        "docs": DOCS,
        "dev": DEV,
    },
    # hydra_plugins is a namespace package that Hydra looks up by that top-level name.
    packages=find_namespace_packages(include=["ndem_zoo*", "hydra_plugins*"], exclude=["*__pycache__*"]),
    package_data={
        "ndem_zoo": [
            "py.typed",
            "datasets/sample/*.npz",
            "datasets/sample/*.md",
            "fused/source/*.h",
            "fused/source/*.cpp",
            "schnetpack/configs/**/*.yaml",
        ]
    },
    include_package_data=False,
    entry_points={"console_scripts": ["ndem-zoo = ndem_zoo.cli:main"]},
    zip_safe=False,
)
