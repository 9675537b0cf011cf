"""What runs inside Mosec, one stage per file. Importing it is cheap: heavy imports wait for a stage's `__init__`."""
