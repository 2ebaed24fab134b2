"""Loading: weights into slots, and the passes that make a model runnable. `load_model` is the entry."""

from __future__ import annotations

from quire.loading.passes import load_model

__all__ = ["load_model"]
