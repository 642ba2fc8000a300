"""A sequence's text as its tokens arrive, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.token_decoder import DecodeStream
from kubeinfer.text.tokenizer import Tokenizer


class StopStrings:
    """Finds the first of several strings in a text that grows.

    Text that may yet become a stop string is held back: what :meth:`push` returns never has to be taken back.
    """

    __slots__ = ("_heads", "_held", "_include", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include: bool):
        self._stops = list(dict.fromkeys(stops))
        self._include = include
        self._longest = max(map(len, self._stops))
        self._heads = {stop[0] for stop in self._stops}
        self._held = ""
        self.matched: str | None = None

    def push(self, new: str, search: bool = True) -> str:
        """Add text; return what may be shown. After a match, ``matched`` is set and the rest is dropped.

        With ``search`` off nothing matches, but what is held back can still become part of a later match.
        """
        text = self._held + new
        if not self._held and self._heads.isdisjoint(text):
            return text
        if search:
            at, stop = self._find(text)
            if stop is not None:
                self.matched = stop
                self._held = ""
                return text[: at + len(stop)] if self._include else text[:at]
        keep = self._tail(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _find(self, text: str) -> tuple[int, str | None]:
        """The match that ends first, as a reader that goes through the text would meet it."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and (best is None or (at + len(stop), at) < best[:2]):
                best = (at + len(stop), at, stop)
        return (-1, None) if best is None else (best[1], best[2])

    def _tail(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            start = len(text) - size
            if text[start] in self._heads and any(
                len(stop) > size and text.startswith(stop[:size], start) for stop in self._stops
            ):
                return size
        return 0

    def finish(self) -> str:
        """What was held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """Text of one sequence. ``stop_string`` is set once one was found: the sequence ends there."""

    __slots__ = ("_include", "_min_tokens", "_seen", "_stops", "_stream", "stop_string")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams):
        self._stream: DecodeStream = tokenizer.stream(
            prompt_token_ids, params.skip_special_tokens, params.spaces_between_special_tokens
        )
        self._include = params.include_stop_str_in_output
        stops = params.stop_strings
        self._stops = StopStrings(stops, self._include) if stops else None
        self._min_tokens = params.min_tokens
        self._seen = 0
        self.stop_string: str | None = None

    def push(self, ids: Sequence[int]) -> tuple[str, int]:
        """Add tokens. Returns the text to show and how many of ``ids`` belong to the sequence.

        The number is less than ``len(ids)`` where a stop string ended the sequence before the last of them.
        """
        stops = self._stops
        if stops is None:
            return self._stream.push(ids), len(ids)
        parts: list[str] = []
        for index, token_id in enumerate(ids):
            self._seen += 1
            parts.append(stops.push(self._stream.push((token_id,)), self._seen > self._min_tokens))
            if stops.matched is not None:
                self.stop_string = stops.matched
                return "".join(parts), index + 1
        return "".join(parts), len(ids)

    def finish(self, ids: Sequence[int], stopped_by_token: bool) -> tuple[str, int]:
        """Add the last tokens. A token that ended the sequence (EOS, a stop token) is not part of its text,
        unless ``include_stop_str_in_output`` asks for it."""
        count = len(ids)
        shown = ids[:-1] if stopped_by_token and not self._include else ids
        text, used = self.push(shown)
        if self.stop_string is not None:
            return text, used
        tail = self._stream.finish()
        if self._stops is None:
            return text + tail, count
        if tail:
            text += self._stops.push(tail, self._seen > self._min_tokens)
            if self._stops.matched is not None:
                self.stop_string = self._stops.matched
                return text, count
        return text + self._stops.finish(), count
