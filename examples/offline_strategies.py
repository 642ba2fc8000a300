"""The same prompt under several sampling strategies: python examples/offline_strategies.py [MODEL]"""

import sys
import time

from kubeinfer import LLM, SamplingParams

STRATEGIES = {
    "greedy": SamplingParams(temperature=0, max_tokens=48),
    "creative": SamplingParams(temperature=1.0, top_p=0.95, max_tokens=48, seed=1),
    "focused": SamplingParams(temperature=0.3, top_k=40, repetition_penalty=1.05, max_tokens=48, seed=1),
    "three of them": SamplingParams(n=3, temperature=0.8, max_tokens=48, seed=1),
    "until a full stop": SamplingParams(
        temperature=0, max_tokens=48, stop=["."], include_stop_str_in_output=True
    ),
}


def main(model: str) -> None:
    llm = LLM(model=model, max_model_len=2048)
    tokenizer = llm.get_tokenizer()
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for name, params in STRATEGIES.items():
        start = time.perf_counter()
        outputs = llm.generate([prompt], params, use_tqdm=False)[0].outputs
        tokens = sum(len(output.token_ids) for output in outputs)
        print(f"--- {name}: {tokens} tokens, {tokens / (time.perf_counter() - start):.1f} tokens/s")
        for output in outputs:
            print(output.text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
