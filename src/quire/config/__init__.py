"""Configuration: defined once (`args`), resolved once (`resolve`), never written (`schema`)."""

from quire.config.pooling import PoolerConfig

__all__ = ["PoolerConfig"]
