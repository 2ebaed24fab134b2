"""A server under load, and for a long time."""
