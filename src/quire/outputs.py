"""The outputs of a request, where vLLM's users import them from. Owns nothing: they are in `types/outputs.py`."""

from quire.types.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["CompletionOutput", "Logprob", "RequestOutput"]
