"""Layers: modules with weight slots, built on the meta device; passes shard, quantize and fill them."""
