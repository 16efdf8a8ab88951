"""What the tests share: a Cloud Storage, and small raw ImageNets."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import contract
import pytest
from emulator import Emulator

# Before the first test imports TensorFlow: no GPU, and none of its start-up noise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# The tests import the script by its name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A Cloud Storage of its own, with an empty bucket named `bucket`."""
    with Emulator() as running:
        yield running


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A small raw ImageNet that the test may change: 12 + 4 baseline JPEGs."""
    return contract.make_raw(tmp_path / "raw")


@pytest.fixture(scope="session")
def mixed_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw ImageNet that no test changes: 21 + 8 images, of them 8 to be repaired."""
    kinds = ("baseline", "png", "progressive", "cmyk", "grey", "444", "exif_thumbnail")
    directory = tmp_path_factory.mktemp("mixed") / "raw"
    return contract.make_raw(directory, 7, 3, 8, kinds)
