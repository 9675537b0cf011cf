"""Fast versions of the network for CPU and GPU, with the same weights."""
