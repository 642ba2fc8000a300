"""A steady load of streams, run inside the cluster by the client's pod: `python load.py --url URL --model NAME ...`.

Standard library only. Runs until standard input closes (or for --seconds), then lets the streams in flight finish and prints
one JSON line: requests, failures with their reasons, truncated streams, latencies in seconds.
A stream is whole where it ended with a finish_reason and `data: [DONE]`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import threading
import time
import urllib.parse
from typing import Any


def stream(
    url: str, body: dict[str, Any], timeout: float = 300.0, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """One streamed chat completion. Never raises: `error` tells what went wrong, empty where nothing did."""
    parts = urllib.parse.urlsplit(url)
    started = time.monotonic()
    result: dict[str, Any] = {
        "status": 0,
        "error": "",
        "tokens": 0,
        "first": None,
        "keepalives": 0,
        "text": "",
        "headers": {},
    }
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body | {"stream": True}),
            {"Content-Type": "application/json", **(headers or {})},
        )
        response = connection.getresponse()
        result["status"] = response.status
        result["headers"] = {name.lower(): value for name, value in response.getheaders()}
        if response.status != 200:
            result["error"] = f"HTTP {response.status}: {response.read(2000).decode(errors='replace')}"
            return result
        finish, done = None, False
        while line := response.readline():
            if line.startswith(b":"):
                result["keepalives"] += 1
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                result["error"] = f"error in the stream: {chunk['error']}"
                return result
            for choice in chunk.get("choices", []):
                finish = choice.get("finish_reason") or finish
                if text := choice.get("delta", {}).get("content"):
                    if result["first"] is None:
                        result["first"] = time.monotonic() - started
                    result["tokens"] += 1
                    result["text"] += text
        if not done or finish is None:
            result["error"] = (
                f"truncated after {result['tokens']} pieces of text (finish_reason {finish}, [DONE] {done})"
            )
    except (OSError, http.client.HTTPException, ValueError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        result["seconds"] = time.monotonic() - started
        connection.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--once", action="store_true", help="each stream sends one request")
    parser.add_argument(
        "--stop-file", default="", help="runs until this file is there, whatever standard input does"
    )
    parser.add_argument("--patient", action="store_true", help="ask again, in silence, until it is answered")
    parser.add_argument("--pause", type=float, default=0.0, help="between two requests of a stream")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE")
    arguments = parser.parse_args()
    headers = dict(header.split(":", 1) for header in arguments.header)
    stop = threading.Event()
    results: list[dict[str, Any]] = []

    def work(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            prompt = f"Stream {number}, turn {turn}: tell a short story about a river."
            body = {
                "model": arguments.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": arguments.tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            result = stream(arguments.url, body, headers=headers)
            if arguments.patient and result["error"]:
                stop.wait(0.1)
                continue
            results.append(result | {"at": time.time()})
            if arguments.once:
                return
            if result["error"]:
                stop.wait(0.5)  # a server that refuses is not hammered
            stop.wait(arguments.pause)

    def watch_input() -> None:
        sys.stdin.buffer.read()
        stop.set()

    def watch_file() -> None:
        while not os.path.exists(arguments.stop_file):
            time.sleep(0.2)
        stop.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(arguments.streams)]
    if not arguments.once:
        threading.Thread(target=watch_file if arguments.stop_file else watch_input, daemon=True).start()
    if not arguments.once or arguments.patient:
        timer = threading.Timer(arguments.seconds, stop.set)
        timer.daemon = True
        timer.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    firsts = sorted(result["first"] for result in results if result["first"] is not None)
    report = json.dumps(
        {
            "requests": len(results),
            "failures": [f"{result['at']:.1f} {result['error']}" for result in results if result["error"]],
            "tokens": sum(result["tokens"] for result in results),
            "first_p50": firsts[len(firsts) // 2] if firsts else None,
            "first_max": firsts[-1] if firsts else None,
            "keepalives": sum(result["keepalives"] for result in results),
            "results": [
                {
                    key: result[key]
                    for key in ("status", "error", "seconds", "first", "headers", "text", "keepalives")
                }
                for result in results
            ]
            if arguments.once
            else [],
        }
    )
    print(report, flush=True)


if __name__ == "__main__":
    main()
