"""Mosec's processes: started, watched, called; and the run folder that they share."""
