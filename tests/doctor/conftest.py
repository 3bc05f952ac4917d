"""Sound checkpoints of every scheme, made once."""

from pathlib import Path

import pytest
from doctor.broken_checkpoints import write_good


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name."""
    return write_good(tmp_path_factory.mktemp("good"))
