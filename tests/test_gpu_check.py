"""The GPU check runs, in its reduced form and on the CPU: so it does not rot where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_reduced_form_runs(tmp_path):
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert {row["network"] for row in record["agreement"]} >= {"ET tiny", "EquiformerV2 tiny"}
    assert all(row["ok"] for row in record["agreement"])
    assert record["edges"]["ok"]
    assert {row["precision"] for row in record["step_times"]} == {"32-true", "bf16-mixed"}
