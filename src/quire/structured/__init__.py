"""Constraints on what is generated: grammars over a tokenizer's tokens, through llguidance (docs/decisions/0007)."""
