"""The commands. As a package, for tests and benchmarks, it lets them find `_root` as a command's own folder does."""

import os
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
