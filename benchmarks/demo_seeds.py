"""The demo at several seeds: accuracies and wall time of each, as JSON.

.venv/bin/python benchmarks/demo_seeds.py --seeds 0 1 2 > benchmarks/results/demo_seeds.json
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(seed: int, folder: Path) -> dict[str, object]:
    """Trains the demo's fleet with another seed; returns its summary."""
    text = (ROOT / "examples" / "demo.toml").read_text(encoding="utf-8")
    fleet = folder / f"seed{seed}.toml"
    named = re.sub(r'^name = "demo"$', f'name = "seed{seed}"\nseed = {seed}', text, flags=re.M)
    fleet.write_text(named, encoding="utf-8")
    command = [sys.executable, "-m", "splitee_host.cli", "train", str(fleet), "--runs", str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
    summary: dict[str, object] = json.loads((folder / f"seed{seed}" / "summary.json").read_text())
    return {"seed": seed, **summary}


def main() -> None:
    """Runs every seed in turn and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, Path(folder)) for seed in seeds]
    setup = {"commit": commit, "python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps({"setup": setup, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
