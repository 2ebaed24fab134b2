"""A conversation through the model's chat template, each turn knowing the ones before."""

from quire import LLM, SamplingParams

questions = ["What is 17 + 25?", "What is the capital of Italy?", 'Spell the word "garden".']

if __name__ == "__main__":
    llm = LLM("demo")
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=64), use_tqdm=False)
        answer = output.outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}")
