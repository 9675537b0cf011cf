"""The CAD store: the catalogue, the files that come in, and their onboarding."""
