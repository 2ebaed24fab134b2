"""The forms of a prompt, where vLLM's users import them from. Owns nothing: they are in `types/prompts.py`."""

from quire.types.prompts import PromptType, TextPrompt, TokensPrompt

__all__ = ["PromptType", "TextPrompt", "TokensPrompt"]
