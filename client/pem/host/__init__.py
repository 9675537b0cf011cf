"""This machine: its cores, its processes, free ports, and starting a server on it."""
