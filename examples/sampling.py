"""Ways to draw tokens: several outputs of one prompt, seeds, stop strings, logprobs, beam search."""

from quire import LLM, BeamSearchParams, SamplingParams

if __name__ == "__main__":
    llm = LLM("demo")
    prompt = "Tell me a short story about a fox."

    (output,) = llm.generate(prompt, SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=16), use_tqdm=False)
    for candidate in output.outputs:
        print(f"sample {candidate.index}: {candidate.text!r}")

    (output,) = llm.generate(prompt, SamplingParams(temperature=0.0, stop=["."], max_tokens=64), use_tqdm=False)
    print(f"up to the first stop: {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")

    (output,) = llm.generate("The capital of France is", SamplingParams(temperature=0.0, logprobs=3, max_tokens=1))
    for token, found in (output.outputs[0].logprobs or [{}])[0].items():
        print(f"token {token}: {found.decoded_token!r} {found.logprob:.3f} (rank {found.rank})")

    (beams,) = llm.beam_search([{"prompt": prompt}], BeamSearchParams(beam_width=3, max_tokens=12))
    for beam in beams.sequences:
        print(f"beam {beam.cum_logprob:.3f}: {beam.text!r}")
