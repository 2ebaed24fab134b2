"""The parameters of a request, where vLLM's users import them from. Owns nothing: they are in `types/params.py`."""

from quire.types.params import BeamSearchParams, RequestOutputKind, SamplingParams, StructuredOutputsParams

__all__ = ["BeamSearchParams", "RequestOutputKind", "SamplingParams", "StructuredOutputsParams"]
