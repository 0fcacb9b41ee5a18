"""Components as PyTorch operators: how they are run, and kernels for them."""
