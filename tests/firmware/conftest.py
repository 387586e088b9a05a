"""The kernels, built once for all of their tests."""

from collections.abc import Iterator

import pytest

from firmware.kernels_harness import KERNELS, Kernels, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return build(tmp_path_factory.mktemp("kernels") / "kernels.so", KERNELS.glob("*.c"))


@pytest.fixture
def kernels(library: Kernels, capfd: pytest.CaptureFixture[str]) -> Iterator[Kernels]:
    """The library; the test fails if the sanitizer had something to say."""
    yield library
    assert "runtime error" not in capfd.readouterr().err
