"""The code that runs inside Mosec, one stage per file. Importing it is cheap: a stage's `__init__` imports the rest."""
