"""Read pictures, masks and meshes from untrusted sources."""
