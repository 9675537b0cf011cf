"""The same network for speed: on a CPU and on a GPU."""
