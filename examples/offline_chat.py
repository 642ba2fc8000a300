"""A chat that remembers, one LLM around it: python examples/offline_chat.py [MODEL]"""

import sys

from kubeinfer import LLM, SamplingParams


class ChatBot:
    def __init__(self, model: str, system: str = "You are a helpful assistant."):
        self.llm = LLM(model=model, max_model_len=2048)
        self.params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=256)
        self.messages = [{"role": "system", "content": system}]

    def ask(self, question: str) -> str:
        self.messages.append({"role": "user", "content": question})
        answer = self.llm.chat(self.messages, self.params, use_tqdm=False)[0].outputs[0].text
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def main(model: str) -> None:
    bot = ChatBot(model)
    print("Ask something; an empty line ends.")
    while question := input("> ").strip():
        print(bot.ask(question))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
