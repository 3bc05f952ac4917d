"""Shared fixtures. Folders beside the repository are used when they are there; no test needs them to pass."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
