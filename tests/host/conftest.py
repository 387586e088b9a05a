"""Torch on one thread, and a folder where firmware is built once for all tests of the host."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("firmware")


@pytest.fixture(scope="session")
def _workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture
def workplace(_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, as a user's: firmware that was built there is there for the next test."""
    monkeypatch.chdir(_workplace)
    return _workplace
