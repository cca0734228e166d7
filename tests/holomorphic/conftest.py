"""Many small operations, which more threads only slow down."""

import torch

torch.set_num_threads(1)
