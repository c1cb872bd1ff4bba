from pathlib import Path

import pytest

from distill.data.index import ImageIndex
from tests.support.scored_run import write_run, write_splits


@pytest.fixture(scope="session")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, ImageIndex]:
    """Three classes of 16 px noise that differ in colour only, 8 training and 4 held-out images."""
    return write_splits(tmp_path_factory.mktemp("tiles"), (8, 4))


@pytest.fixture
def run_folder(tmp_path: Path, splits: tuple[ImageIndex, ImageIndex]) -> Path:
    """A run as the launcher leaves it, with networks that learned nothing."""
    return write_run(tmp_path, splits)
