"""One runner an engine, each a process of its own in the virtual environment of its engine. See worker.py."""
