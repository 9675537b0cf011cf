"""Pose estimation from RGB-D crops and CAD models: knows nothing of HTTP or Mosec. Importing it is cheap."""
