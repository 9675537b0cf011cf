"""This machine: its cores, its processes, free ports, and a server of one's own."""
