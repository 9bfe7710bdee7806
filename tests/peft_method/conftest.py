"""Settings for all tests of the PEFT method."""

import torch

# Tiny tensors: a second thread only waits, and for very long where test processes share the cores.
torch.set_num_threads(1)
