"""Every handler under requests that are nearly right; `python -m tests.fuzz` is the long run."""

import sys
from pathlib import Path

# the tests' shared helpers lie beside this package, also when no pytest has put them on the path
_TESTS = str(Path(__file__).resolve().parents[1])
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
