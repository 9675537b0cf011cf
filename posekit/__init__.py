"""Estimate poses from RGB-D crops and CAD models. Knows nothing of HTTP or Mosec; importing it is cheap."""
