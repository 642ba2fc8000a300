"""The tutorials' Gradio page before ``/generate``, and a visitor who presses its button: URL PROMPT."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import gradio
import requests
from gradio_client import Client


def http_bot(prompt: str) -> Iterator[str]:
    body = {"prompt": prompt, "stream": True, "max_tokens": 24, "temperature": 0}
    response = requests.post(
        sys.argv[1] + "/generate", headers={"User-Agent": "vLLM Client"}, json=body, stream=True
    )
    for chunk in response.iter_lines(chunk_size=8192, decode_unicode=False, delimiter=b"\0"):
        if chunk:
            yield json.loads(chunk.decode("utf-8"))["text"][0]


def page() -> Any:
    with gradio.Blocks() as demo:
        inputs = gradio.Textbox(label="Input")
        outputs = gradio.Textbox(label="Output")
        inputs.submit(http_bot, [inputs], [outputs], api_name="ask")
    return demo


if __name__ == "__main__":
    demo = page()
    _, url, _ = demo.queue().launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    job = Client(url, verbose=False).submit(sys.argv[2], api_name="/ask")
    result = job.result(timeout=60)
    print(json.dumps({"result": result, "steps": len(job.outputs())}))
    demo.close()
