"""The task `pose`: RGB-D, camera, masks and CAD in; a pose for each mask out."""
