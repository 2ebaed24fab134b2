"""The HTTP front: OpenAI's interface over an engine in another process."""
