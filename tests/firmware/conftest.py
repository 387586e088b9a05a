"""The kernels, built once for all of their tests, and Hypothesis' profile for `make fuzz`."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from firmware.kernels_harness import KERNELS, Kernels, build

settings.register_profile("fuzz", max_examples=20_000, deadline=None)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return build(tmp_path_factory.mktemp("kernels") / "kernels.so", KERNELS.glob("*.c"))


@pytest.fixture
def kernels(library: Kernels, capfd: pytest.CaptureFixture[str]) -> Iterator[Kernels]:
    """The library; the test fails if the sanitizer had something to say."""
    yield library
    assert "runtime error" not in capfd.readouterr().err
