"""Pictures, masks and meshes from sources that are not trusted."""
