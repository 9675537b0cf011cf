"""The stages that run inside Mosec, one per file."""
