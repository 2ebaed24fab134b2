"""`python -m` this: `quire serve`. The endpoints are the same, `/generate` among them."""

from __future__ import annotations

from quire.cli.serve import command

if __name__ == "__main__":
    command(prog_name=f"python -m {__spec__.name}")
