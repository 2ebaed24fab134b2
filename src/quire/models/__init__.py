"""Models: their arithmetic only, in the registry by architecture name."""
