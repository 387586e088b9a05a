"""What 8 bits cost in accuracy: less than a point, at every exit and behind every cut."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from splitee import data, zoo

ROOT = Path(__file__).parents[2]
ARCHIVE = "SPLITEE_CIFAR10"  # where cifar10-jpeg.tar.xz is
POINT = 1.0


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/int8_accuracy.py."""
    name = "int8_accuracy"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def losses(row: dict[str, Any]) -> dict[str, float]:
    """Points that exit and server lose by 8 bits."""
    return {who: row[f"{who}_float"] - row[f"{who}_int8"] for who in ("exit", "server")}


@pytest.mark.parametrize("norm", zoo.NORMS)
def test_digits_lose_less_than_a_point(benchmark: ModuleType, norm: str) -> None:
    found = benchmark.rows(data.load("digits"), benchmark.Plan(8, 3, 0.05, 256), norm, seed=1)
    assert [row["cut"] for row in found] == ["layer1", "layer2", "layer3"]
    for row in found:
        assert row["server_float"] > 90
        assert max(losses(row).values()) <= POINT, row


@pytest.mark.skipif(ARCHIVE not in os.environ, reason=f"{ARCHIVE} does not say where it is")
@pytest.mark.parametrize("norm", zoo.NORMS)
def test_cifar10_loses_less_than_a_point(benchmark: ModuleType, norm: str) -> None:
    images = benchmark.cifar(Path(os.environ[ARCHIVE]), 3000, 1000)
    for row in benchmark.rows(images, benchmark.Plan(8, 4, 0.02, 256), norm, seed=1):
        assert row["server_float"] > 20  # it has learnt: chance is 10, processors differ
        assert max(losses(row).values()) <= POINT, row


def test_what_was_measured_is_less_than_a_point() -> None:
    told = json.loads((ROOT / "benchmarks" / "results" / "int8_accuracy.json").read_text())
    assert [(result["data"], result["norm"]) for result in told["results"]] == [
        (name, norm) for name in ("digits", "cifar10-jpeg") for norm in zoo.NORMS
    ]
    for result in told["results"]:
        for row in result["cuts"]:
            assert max(losses(row).values()) <= POINT, (result["data"], row)
