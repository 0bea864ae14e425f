"""The tests of all that is not the tutorial's core (that is test_common.py)."""

import common  # noqa: F401  sets how threads wait, which has to come before torch is imported
