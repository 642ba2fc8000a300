"""What is sent: requests of random tokens, or of a ShareGPT file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kubeinfer.errors import OptionError

# Words that are one token in most vocabularies.
_WORDS = [
    "time",
    "people",
    "way",
    "water",
    "day",
    "man",
    "work",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "government",
    "number",
    "night",
    "point",
    "home",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "community",
    "name",
    "president",
    "team",
    "minute",
    "idea",
    "kid",
    "body",
    "information",
    "back",
    "parent",
    "face",
    "others",
    "level",
    "office",
    "door",
    "health",
    "person",
    "art",
    "war",
    "history",
]
_FIRST_ID = 10  # ids below are special tokens in many vocabularies


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: a prompt as token ids or as text, its length where that is known, and how much to generate."""

    prompt: list[int] | str
    prompt_len: int | None
    output_len: int


def _check(condition: bool, option: str, message: str) -> None:
    if not condition:
        raise OptionError(f"{option}: {message}", option)


def random_requests(
    count: int,
    input_len: int,
    output_len: int,
    *,
    vocab_size: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    as_text: bool = False,
    seed: int = 0,
) -> list[BenchRequest]:
    """``count`` requests of random tokens.

    Lengths are uniform in ``length * (1 - range_ratio)`` to ``length * (1 + range_ratio)``. All prompts begin with the
    same ``prefix_len`` tokens, which come on top. ``as_text`` makes prompts of common words, about a token each.
    """
    _check(count >= 1, "num_prompts", "at least 1 is needed.")
    _check(input_len >= 1 and output_len >= 1, "random_input_len", "lengths must be at least 1.")
    _check(0 <= range_ratio < 1, "random_range_ratio", f"must be from 0 to below 1, got {range_ratio}.")
    _check(vocab_size > _FIRST_ID, "vocab_size", f"must be more than {_FIRST_ID}, got {vocab_size}.")
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, rng.randint(round(mean * (1 - range_ratio)), round(mean * (1 + range_ratio))))

    def tokens(number: int) -> list[int]:
        return [rng.randrange(_FIRST_ID, vocab_size) for _ in range(number)]

    def words(number: int) -> list[str]:
        return [rng.choice(_WORDS) for _ in range(number)]

    found = []
    if as_text:
        start = words(prefix_len)
        for _ in range(count):
            text = " ".join([*start, *words(length(input_len))])
            found.append(BenchRequest(text, None, length(output_len)))
        return found
    prefix = tokens(prefix_len)
    for _ in range(count):
        prompt = prefix + tokens(length(input_len))
        found.append(BenchRequest(prompt, len(prompt), length(output_len)))
    return found


def sharegpt_requests(
    path: str,
    count: int,
    *,
    output_len: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    seed: int = 0,
) -> list[BenchRequest]:
    """``count`` conversations' first turns from a ShareGPT file (JSON: a list of ``{"conversations": [...]}``).

    The output length is ``output_len``, or else that of the file's answer as ``count_tokens`` measures it. Very short
    and very long conversations are left out.
    """
    _check(
        output_len is not None or count_tokens is not None,
        "sharegpt_output_len",
        "is needed where there is no tokenizer to measure the file's answers with; set it or --tokenizer.",
    )
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise OptionError(f"dataset_path: cannot read {path!r}: {exc.strerror}.", "dataset_path") from None
    except ValueError as exc:
        raise OptionError(f"dataset_path: {path!r} is not JSON ({exc}).", "dataset_path") from None
    turns = [
        (str(talk[0].get("value", "")), str(talk[1].get("value", "")))
        for item in data
        if isinstance(item, dict)
        and len(talk := item.get("conversations") or item.get("conversation") or []) >= 2
    ]
    random.Random(seed).shuffle(turns)
    found: list[BenchRequest] = []
    for question, answer in turns:
        if len(found) == count:
            break
        prompt_len = count_tokens(question) if count_tokens else None
        wanted = output_len if output_len is not None else count_tokens(answer) if count_tokens else 0
        if prompt_len is not None and (prompt_len < 4 or prompt_len > 1024 or prompt_len + wanted > 2048):
            continue
        if not question or wanted < 4:
            continue
        found.append(BenchRequest(question, prompt_len, wanted))
    if len(found) < count:
        raise OptionError(
            f"dataset_path: {path!r} has only {len(found)} usable conversations; lower --num-prompts.",
            "dataset_path",
        )
    return found
