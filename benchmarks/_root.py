"""Importing this module lets a benchmark import the project's packages and `support`, from whatever folder it runs."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
