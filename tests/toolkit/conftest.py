"""Torch on one thread: the tests' networks are too small to share, and sums keep one order."""

import torch

torch.set_num_threads(1)
