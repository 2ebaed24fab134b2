"""What a model's text means: reasoning, content, tool calls. Text in, parts out; no tokens, no HTTP."""
