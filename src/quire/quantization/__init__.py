"""Quantization of weights when they are loaded: `SCHEMES` by name, and the pass that marks the layers."""

from __future__ import annotations

from quire.quantization.schemes import SCHEMES, Scheme, mark_layers

__all__ = ["SCHEMES", "Scheme", "mark_layers"]
