"""`AsyncLLM`: two requests stream side by side; a third is ended in the middle."""

import asyncio

from quire import AsyncLLM, EngineArgs, SamplingParams


async def show(engine: AsyncLLM, name: str, prompt: str) -> None:
    """Print each new piece of text as it comes."""
    seen = 0
    async for output in engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=32), request_id=name):
        text = output.outputs[0].text
        print(f"[{name}] {text[seen:]!r}")
        seen = len(text)


async def main() -> None:
    engine = AsyncLLM.from_engine_args(EngineArgs(model="demo"))
    try:
        await asyncio.gather(
            show(engine, "a", "The capital of France is"),
            show(engine, "b", "The opposite of hot is"),
        )
        async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=200), request_id="c"):
            if len(output.outputs[0].token_ids) >= 5:
                break  # leaving the loop aborts the request
        print("[c] ended after", len(output.outputs[0].token_ids), "tokens")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
