"""How right the poses are, on sets whose truth is known."""
