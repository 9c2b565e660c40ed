"""A data loader's fork server imports this first: it imports our own `workloads`, and ends with its rank.

Its folder is put on the path for that and holds nothing else, so it neither adds another package nor hides one.
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
