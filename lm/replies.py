"""What is sent to a server and what comes back, and what to make of its failures."""

import contextlib
import email.utils
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

TRANSIENT = (408, 409, 425, 429)  # and every 5xx


@dataclass(frozen=True)
class Request:
    """A text to complete or messages to answer, and how."""

    prompt: str | Sequence[Mapping[str, str]]
    max_tokens: int = 512
    temperature: float = 0.0  # below 0: left to the server, for models that take none
    top_p: float = 1.0
    seed: int | None = None  # sent if given; servers differ in what they make of it
    extra: Mapping[str, object] | None = None  # sent as it is, such as {"logprobs": True}

    @property
    def text(self) -> str:
        """All that is to be read, to estimate its tokens."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}\n{message['content']}" for message in self.prompt)


@dataclass(frozen=True)
class Reply:
    """What came back. Where there is an `error`, the text is no answer."""

    text: str = ""
    finish_reason: str = ""  # "stop"; "length" where max_tokens ended it; empty without a reply
    prompt_tokens: int = 0
    new_tokens: int = 0
    cost: float = 0.0  # dollars
    error: str = ""
    cached: bool = False
    logprobs: Mapping[str, object] | None = None  # as the server gave them, if asked for


class BrokenReply(Exception):
    """A success by its status, but not by its body."""


def read_reply(content: bytes) -> Reply:
    """The reply in a body of /chat/completions or /completions.

    >>> read_reply(b'{"choices": [{"text": "Hi.", "finish_reason": "stop"}]}').text
    'Hi.'
    """
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        text, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        reply = Reply(text or "", choice.get("finish_reason") or "",
                      usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0,
                      logprobs=choice.get("logprobs"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        start = content[:1000].decode(errors="replace")  # cut to size once a key in it is hidden
        raise BrokenReply(f"broken reply {start!r}" if start else "empty reply") from error
    if not isinstance(reply.text, str):
        raise BrokenReply(f"broken reply: its content is no text but {str(reply.text)[:1000]}")
    if refusal:
        return replace(reply, finish_reason="refusal", error=f"refused: {refusal}")
    if reply.finish_reason == "content_filter":
        return replace(reply, error="stopped by the server's content filter")
    return reply


def is_servers(error: Exception) -> bool:
    """Whether the server or the way to it is to blame, and not this program."""
    import openai

    return isinstance(error, BrokenReply | openai.APIError)


def may_pass(error: Exception, longest_wait: float) -> bool:
    """Whether the same request may succeed a little later."""
    import openai

    if isinstance(error, openai.APIStatusError):
        passing = error.status_code in TRANSIENT or error.status_code >= 500
        return passing and not out_of_credit(error) and (asked_wait(error) or 0) <= longest_wait
    return isinstance(error, BrokenReply | openai.APIConnectionError)  # time-outs are of its kind


def asked_wait(error: Exception) -> float | None:
    """Seconds that the server asks to wait (Retry-After: seconds or a date), if it does."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        return None
    headers = error.response.headers
    with contextlib.suppress(KeyError, ValueError):
        return max(float(headers["retry-after-ms"]) / 1000, 0.0)
    with contextlib.suppress(KeyError, ValueError):
        return max(float(headers["retry-after"]), 0.0)
    with contextlib.suppress(KeyError, ValueError):
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(date.timestamp() - time.time(), 0.0)
    return None


def out_of_credit(error: Exception) -> bool:
    """A 429 that no waiting helps against."""
    return getattr(error, "code", None) == "insufficient_quota"


def nobody_there(error: Exception) -> bool:
    """Whether no connection was made, so that nothing can have been charged."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
