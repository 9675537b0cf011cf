"""The CAD store: the catalogue, what comes in, and its onboarding."""
