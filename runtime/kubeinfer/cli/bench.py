"""``kubeinfer bench throughput | latency | serve``."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from kubeinfer.cli.flags import Parser, add_config_flag, add_option_flags, options_from
from kubeinfer.errors import KubeinferError, OptionError
from kubeinfer.options import EngineOptions, read_options

_SERVE_METRICS = ("ttft", "tpot", "itl", "e2el")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench", help="Measure throughput and latency.", description="Measure throughput and latency."
    )
    kinds = parser.add_subparsers(dest="bench_command", metavar="KIND", parser_class=Parser, required=True)
    throughput = kinds.add_parser(
        "throughput", help="Many requests at once, offline.", description="Many requests at once, offline."
    )
    _add_dataset_flags(throughput, num_prompts=1000)
    throughput.add_argument("--input-len", type=int, metavar="TOKENS", help="Same as --random-input-len.")
    throughput.add_argument("--output-len", type=int, metavar="TOKENS", help="Same as --random-output-len.")
    _add_engine_flags(throughput)
    latency = kinds.add_parser(
        "latency", help="One batch, again and again, offline.", description="Time of one batch, offline."
    )
    latency.add_argument(
        "--input-len", type=int, default=32, metavar="TOKENS", help="Prompt length. Default: 32."
    )
    latency.add_argument(
        "--output-len", type=int, default=128, metavar="TOKENS", help="Output length. Default: 128."
    )
    latency.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="Requests in the batch. Default: 8."
    )
    latency.add_argument(
        "--num-iters-warmup", type=int, default=10, metavar="N", help="Runs before. Default: 10."
    )
    latency.add_argument("--num-iters", type=int, default=30, metavar="N", help="Runs measured. Default: 30.")
    _add_engine_flags(latency)
    serve = kinds.add_parser(
        "serve",
        help="Streams at a running server.",
        description="Streaming requests at a running OpenAI-compatible server.",
    )
    _add_serve_flags(serve)


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=1, metavar="N", help="Outputs a request. Default: 1.")
    parser.add_argument("--output-json", metavar="FILE", help="Write the result there.")
    add_config_flag(parser)
    add_option_flags(parser, EngineOptions)


def _add_dataset_flags(parser: argparse.ArgumentParser, num_prompts: int) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--dataset-name", choices=["random", "sharegpt"], default="random", help="Default: random."
    )
    group.add_argument("--dataset-path", metavar="FILE", help="ShareGPT's JSON file.")
    group.add_argument(
        "--num-prompts", type=int, default=num_prompts, metavar="N", help=f"Requests. Default: {num_prompts}."
    )
    group.add_argument(
        "--random-input-len",
        type=int,
        default=1024,
        metavar="TOKENS",
        help="Mean prompt length. Default: 1024.",
    )
    group.add_argument(
        "--random-output-len",
        type=int,
        default=128,
        metavar="TOKENS",
        help="Mean output length. Default: 128.",
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="Lengths vary by this share. Default: 0.",
    )
    group.add_argument(
        "--random-prefix-len",
        type=int,
        default=0,
        metavar="TOKENS",
        help="Tokens all prompts begin with. Default: 0.",
    )
    group.add_argument(
        "--sharegpt-output-len", type=int, metavar="TOKENS", help="Instead of the file's answers'."
    )


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=["openai", "vllm", "openai-chat"],
        default="openai",
        help="openai and vllm send prompts to /v1/completions, openai-chat messages to /v1/chat/completions.",
    )
    parser.add_argument("--base-url", metavar="URL", help="The server; instead of --host and --port.")
    parser.add_argument("--host", default="127.0.0.1", help="Default: 127.0.0.1.")
    parser.add_argument("--port", type=int, default=8000, help="Default: 8000.")
    parser.add_argument("--endpoint", metavar="PATH", help="Instead of the backend's own.")
    parser.add_argument(
        "--model", metavar="NAME", help="Model to ask for; the server's first when not given."
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="Same, where --model names the tokenizer."
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="Measures a ShareGPT file's texts.")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=8192,
        metavar="N",
        help="Random token ids are below this. Default: 8192.",
    )
    _add_dataset_flags(parser, num_prompts=1000)
    parser.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="X",
        help="Arrivals a second; inf: all at once.",
    )
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="1: Poisson arrivals; less: burstier. Default: 1.",
    )
    parser.add_argument("--max-concurrency", type=int, metavar="N", help="Most requests in flight.")
    parser.add_argument("--num-warmups", type=int, default=0, metavar="N", help="Requests before measuring.")
    parser.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="On by default."
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Of prompts and arrivals.")
    parser.add_argument("--extra-body", metavar="JSON", help="More fields of each request's body.")
    parser.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="More HTTP headers."
    )
    parser.add_argument("--api-key", metavar="KEY", help="Default: OPENAI_API_KEY or KUBEINFER_API_KEY.")
    parser.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl",
        metavar="LIST",
        help=f"Of {', '.join(_SERVE_METRICS)}. Default: ttft,tpot,itl.",
    )
    parser.add_argument("--metric-percentiles", default="50,90,99", metavar="LIST", help="Default: 50,90,99.")
    parser.add_argument(
        "--goodput",
        nargs="+",
        metavar="METRIC:MS",
        help="Bounds a request must meet to count, e.g. ttft:200 tpot:50.",
    )
    parser.add_argument("--save-result", action="store_true", help="Write the result as JSON.")
    parser.add_argument("--result-dir", metavar="FOLDER", default=".", help="Where. Default: here.")
    parser.add_argument("--result-filename", metavar="FILE", help="Under which name.")
    parser.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")


def run(arguments: argparse.Namespace) -> int:
    kinds = {"throughput": _throughput, "latency": _latency, "serve": _serve}
    return kinds[arguments.bench_command](arguments)


def _throughput(arguments: argparse.Namespace) -> int:
    options = _engine_options(arguments)
    from kubeinfer.bench.figures import save_json
    from kubeinfer.bench.offline import make_llm, measure_throughput, print_throughput
    from kubeinfer.bench.workload import random_requests, sharegpt_requests

    _check_dataset(arguments)
    with make_llm(options) as llm:
        if arguments.dataset_name == "sharegpt":
            tokenizer = llm.get_tokenizer()
            requests = sharegpt_requests(
                arguments.dataset_path,
                arguments.num_prompts,
                output_len=arguments.sharegpt_output_len or arguments.output_len,
                count_tokens=lambda text: len(tokenizer.encode(text)),
                seed=options.seed,
            )
        else:
            requests = random_requests(
                arguments.num_prompts,
                arguments.input_len or arguments.random_input_len,
                arguments.output_len or arguments.random_output_len,
                vocab_size=llm.model_config.vocab_size,
                range_ratio=arguments.random_range_ratio,
                prefix_len=arguments.random_prefix_len,
                seed=options.seed,
            )
        result = measure_throughput(llm, requests, arguments.n)
    print_throughput(result)
    if arguments.output_json:
        save_json(arguments.output_json, result)
    return 0


def _latency(arguments: argparse.Namespace) -> int:
    options = _engine_options(arguments)
    from kubeinfer.bench.figures import save_json
    from kubeinfer.bench.offline import make_llm, measure_latency, print_latency
    from kubeinfer.bench.workload import random_requests

    if arguments.num_iters < 1:
        raise OptionError("num_iters: at least 1 is needed.", "num_iters")
    with make_llm(options) as llm:
        requests = random_requests(
            arguments.batch_size,
            arguments.input_len,
            arguments.output_len,
            vocab_size=llm.model_config.vocab_size,
            seed=options.seed,
        )
        result = measure_latency(llm, requests, arguments.num_iters_warmup, arguments.num_iters, arguments.n)
    print_latency(result)
    if arguments.output_json:
        save_json(arguments.output_json, result)
    return 0


def _engine_options(arguments: argparse.Namespace) -> EngineOptions:
    options = options_from(arguments, EngineOptions)
    if not options.model:
        raise OptionError("no model is given; say --model MODEL.", "model")
    return options


def _check_dataset(arguments: argparse.Namespace) -> None:
    if arguments.dataset_name == "sharegpt" and not arguments.dataset_path:
        raise OptionError("dataset_path: give ShareGPT's JSON file.", "dataset_path")


def _serve(arguments: argparse.Namespace) -> int:
    import asyncio

    try:
        from kubeinfer.bench import serving
    except ModuleNotFoundError as exc:
        if exc.name != "aiohttp":
            raise
        raise KubeinferError("bench serve needs aiohttp: pip install 'kubeinfer[bench]'.") from None
    from kubeinfer.bench.figures import save_json

    _check_dataset(arguments)
    metrics = _names(arguments.percentile_metrics, "percentile_metrics")
    percents = _numbers(arguments.metric_percentiles)
    goodput = _goodput(arguments.goodput)
    chat = arguments.backend == "openai-chat"
    base = (arguments.base_url or f"http://{arguments.host}:{arguments.port}").rstrip("/")
    endpoint = arguments.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    headers, extra_body = _headers(arguments), _extra_body(arguments.extra_body)
    model = arguments.served_model_name or arguments.model or asyncio.run(serving.find_model(base, headers))
    target = serving.Target(f"{base}{endpoint}", model, chat, headers, extra_body, arguments.ignore_eos)
    requests = _serve_requests(arguments, chat)
    from tqdm import tqdm

    bar = tqdm(total=len(requests), disable=arguments.disable_tqdm)
    try:
        outcomes, duration = asyncio.run(
            serving.drive(
                target,
                requests,
                request_rate=arguments.request_rate,
                burstiness=arguments.burstiness,
                max_concurrency=arguments.max_concurrency,
                warmups=arguments.num_warmups,
                seed=arguments.seed,
                on_done=lambda _: bar.update(1),
            )
        )
    finally:
        bar.close()
    result = serving.report(outcomes, duration, percents, goodput)
    serving.print_report(result, metrics, percents)
    if arguments.save_result:
        about = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "backend": arguments.backend,
            "model_id": model,
            "num_prompts": len(requests),
            "request_rate": "inf" if arguments.request_rate == float("inf") else arguments.request_rate,
            "max_concurrency": arguments.max_concurrency,
        }
        name = (
            arguments.result_filename
            or f"{arguments.backend}-{about['request_rate']}qps-{about['date']}.json"
        )
        save_json(Path(arguments.result_dir) / name, about | result)
    return 0 if result["completed"] else 1


def _serve_requests(arguments: argparse.Namespace, chat: bool) -> list[Any]:
    from kubeinfer.bench.workload import random_requests, sharegpt_requests

    if arguments.dataset_name == "random":
        return random_requests(
            arguments.num_prompts,
            arguments.random_input_len,
            arguments.random_output_len,
            vocab_size=arguments.vocab_size,
            range_ratio=arguments.random_range_ratio,
            prefix_len=arguments.random_prefix_len,
            as_text=chat,
            seed=arguments.seed,
        )
    count_tokens = None
    if arguments.tokenizer:
        from kubeinfer.text.tokenizer import load_tokenizer

        source = Path(arguments.tokenizer)
        options = read_options(
            EngineOptions, {"model": arguments.tokenizer, "tokenizer": arguments.tokenizer}
        )
        tokenizer = load_tokenizer(options, source)
        count_tokens = lambda text: len(tokenizer.encode(text))  # noqa: E731
    return sharegpt_requests(
        arguments.dataset_path,
        arguments.num_prompts,
        output_len=arguments.sharegpt_output_len,
        count_tokens=count_tokens,
        seed=arguments.seed,
    )


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _SERVE_METRICS:
            raise OptionError(f"{option}: {name!r} is not one of {', '.join(_SERVE_METRICS)}.", option)
    return names


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1.0]
    if not all(0 <= value <= 100 for value in found):
        raise OptionError(
            f"metric_percentiles: {text!r} is not a list of numbers from 0 to 100.", "metric_percentiles"
        )
    return found


def _goodput(pairs: list[str] | None) -> dict[str, float]:
    found = {}
    for pair in pairs or []:
        name, _, value = pair.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not value.replace(".", "", 1).isdigit():
            raise OptionError(f"goodput: {pair!r} is not ttft:MS, tpot:MS or e2el:MS.", "goodput")
        found[name] = float(value)
    return found


def _headers(arguments: argparse.Namespace) -> dict[str, str]:
    headers = {}
    key = arguments.api_key or os.environ.get("OPENAI_API_KEY") or os.environ.get("KUBEINFER_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    for pair in arguments.header:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"header: {pair!r} is not NAME=VALUE.", "header")
        headers[name] = value
    return headers


def _extra_body(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    import json

    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise OptionError(f"extra_body: {text!r} is not a JSON object.", "extra_body")
    return value
