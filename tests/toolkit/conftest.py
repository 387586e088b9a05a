"""Torch on one thread: the tests' networks are too small to share, and sums keep one order."""

from pathlib import Path

import pytest
import torch

from splitee.runs import Run

torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The folder of a run that has begun."""
    run = Run(tmp_path / "runs" / "one")
    run.begin('name = "one"\n')
    return run
