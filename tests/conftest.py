"""One thread a process: the suite runs several of them side by side, and starts more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

SLOW = ("test_commands.py", "test_visrl_commands.py")  # they start the real commands


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in SLOW:
            item.add_marker("slow")
