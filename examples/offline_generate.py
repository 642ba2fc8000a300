"""Complete a batch of prompts: python examples/offline_generate.py [MODEL]"""

import sys

from kubeinfer import LLM, SamplingParams


def main(model: str) -> None:
    llm = LLM(model=model, max_model_len=2048)
    prompts = ["Hello, my name is", "The capital of France is", "法国的首都在哪里？"]
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64)
    for output in llm.generate(prompts, params):
        print(f"Prompt: {output.prompt!r}\nText:   {output.outputs[0].text!r}\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
