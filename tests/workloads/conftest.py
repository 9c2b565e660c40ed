"""The tests' own process computes on one thread: more of them would only wait for each other on busy cores."""

import torch

torch.set_num_threads(1)
