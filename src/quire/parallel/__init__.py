"""Several processes as one engine: starting them, and the collectives among them."""
