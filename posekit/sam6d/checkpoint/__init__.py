"""The network's weights: their source, their version, and how to read them."""
