"""The parameters of pooling, where vLLM's users import them from. Owns nothing: they are in `types/pooling.py`."""

from quire.types.pooling import PoolingParams

__all__ = ["PoolingParams"]
