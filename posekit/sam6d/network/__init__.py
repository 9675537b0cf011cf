"""The network part by part, from small to large. Parameters are named as in the checkpoint."""
