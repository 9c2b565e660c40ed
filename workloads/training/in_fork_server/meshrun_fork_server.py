"""The first import of a data loader's fork server: our own `workloads`, whatever the path holds, and an end in time.

Its folder is put on the path for it and holds nothing else: no other package can come in, or be hidden, by that.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
"""What holds `workloads`: the checkout, or site-packages."""

sys.path.insert(0, str(ROOT))
try:
    import workloads  # noqa: F401
finally:
    sys.path.remove(str(ROOT))

from workloads.training import data_workers  # noqa: E402

data_workers.end_with_rank()
