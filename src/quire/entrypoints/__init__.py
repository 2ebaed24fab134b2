"""The module paths that vLLM's users type."""
