"""Log-probabilities in the shapes of OpenAI's two endpoints and of vLLM's ``prompt_logprobs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kubeinfer.outputs import Logprob

Position = dict[int, Logprob]


def token_text(token_id: int, logprob: Logprob | None, as_ids: bool) -> str:
    if as_ids:
        return f"token_id:{token_id}"
    return (logprob.decoded_token if logprob is not None else None) or ""


def _value(logprob: Logprob | None) -> float:
    """JSON knows no infinity: -9999 stands for a token that cannot be drawn, as in OpenAI's answers."""
    return max(logprob.logprob, -9999.0) if logprob is not None else -9999.0


def _top(position: Position, count: int) -> list[tuple[int, Logprob]]:
    ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
    return ranked if count < 0 else ranked[:count]


def chat_logprobs(
    token_ids: list[int],
    logprobs: list[Position],
    top: int,
    as_ids: bool,
    piece_bytes: Callable[[int], bytes],
) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion. ``top``: alternatives a position, -1 for all.

    ``piece_bytes`` gives a token's own bytes, as a token may be a part of a character.
    """

    def entry(token_id: int, logprob: Logprob | None) -> dict[str, Any]:
        text = token_text(token_id, logprob, as_ids)
        return {"token": text, "logprob": _value(logprob), "bytes": list(piece_bytes(token_id))}

    content = []
    for token_id, position in zip(token_ids, logprobs):
        item = entry(token_id, position.get(token_id))
        item["top_logprobs"] = [entry(other, logprob) for other, logprob in _top(position, top)]
        content.append(item)
    return {"content": content}


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion, whose text offsets run on over a stream.

    ``piece`` gives a token's text: of a prompt's first, nothing else is known.
    """

    def __init__(self, top: int, as_ids: bool, piece: Callable[[int], str]):
        self.top = top
        self.as_ids = as_ids
        self.piece = piece
        self.offset = 0

    def _alternatives(self, token_id: int, position: Position) -> list[tuple[int, Logprob]]:
        """The most likely tokens, and the one that stands there even if it is not among them."""
        found = _top(position, self.top)
        if token_id in position and all(other != token_id for other, _ in found):
            found.append((token_id, position[token_id]))
        return found

    def render(self, token_ids: list[int], logprobs: list[Position | None]) -> dict[str, Any]:
        offsets: list[int] = []
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, position in zip(token_ids, logprobs):
            own = position.get(token_id) if position is not None else None
            text = token_text(token_id, own, self.as_ids)
            if position is None and not self.as_ids:
                text = self.piece(token_id)
            offsets.append(self.offset)
            self.offset += len(text)
            tokens.append(text)
            values.append(None if position is None else _value(own))
            tops.append(
                None
                if position is None
                else {
                    token_text(t, lp, self.as_ids): _value(lp)
                    for t, lp in self._alternatives(token_id, position)
                }
            )
        return {"text_offset": offsets, "tokens": tokens, "token_logprobs": values, "top_logprobs": tops}


def prompt_logprobs(positions: list[Position | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's ``prompt_logprobs``: a position's map of token id to its log-probability; null for the first."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": _value(lp), "rank": lp.rank, "decoded_token": lp.decoded_token}
            for token_id, lp in position.items()
        }
        for position in positions
    ]
