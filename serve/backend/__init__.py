"""Mosec's processes: start, watch and call them; and the run folder that they share."""
