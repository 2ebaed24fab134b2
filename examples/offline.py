"""Many prompts in one call, batched continuously; results come back in the order of the prompts."""

from quire import LLM, SamplingParams

prompts = ["The capital of France is", "The capital of Japan is", "The opposite of hot is", "Count from 3 to 9:"]

if __name__ == "__main__":
    llm = LLM("demo")
    for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    stats = llm.llm_engine.stat_logger.stats
    print(f"KV blocks: {stats.blocks_total} in all, {stats.blocks_used} used, {stats.blocks_cached} cached")
