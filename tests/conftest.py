"""One thread a process: the suite runs several of them side by side, and starts more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
