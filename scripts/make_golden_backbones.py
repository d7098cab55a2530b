"""Write tests/data/backbones_golden.json: a few numbers for every backbone of the registry, from weights by a formula.

    python scripts/make_golden_backbones.py

Run it when a backbone is added. When the number of an existing one changes, saved models of it change their predictions:
that is a new version of the backbone, not a reason to run this.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ndem_zoo.registry import BACKBONES  # noqa: E402
from ndem_zoo.testing import BackboneCase, golden_numbers  # noqa: E402

GOLDEN_FILE = ROOT / "tests" / "data" / "backbones_golden.json"


def main() -> None:
    """Compute the numbers of all backbones and write the file."""
    numbers = {name: golden_numbers(BackboneCase.of(name)) for name in sorted(BACKBONES)}
    temporary = GOLDEN_FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, GOLDEN_FILE)
    print(f"wrote {GOLDEN_FILE}: {', '.join(numbers)}")


if __name__ == "__main__":
    main()
