"""Ask an OpenAI-compatible server (vLLM, TGI, `transformers serve`, a hosted API) many things.

    server = Server("gpt-4o", cache="runs/cache", max_cost=5)
    for index, reply in server.ask({0: Request([{"role": "user", "content": "Say hello."}])}):
        ...  # as they come; reply.error says why there is no answer

What was answered once is in a cache on disk, keyed by all that was sent, and is not asked again.
429, 5xx, time-outs and broken bodies are tried again after growing waits with jitter, or after as
long as the server asks for. What still fails becomes a reply with an `error`, and is not kept. A
refused key, an unknown model, a spent budget or 20 failures in a row stop everything, after what
is under way. The key comes from OPENAI_API_KEY and goes nowhere but to the server.
"""

import hashlib
import json
import os
import random
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lm import replies
from lm.budget import Budget, Pace, price_of, tokens_of
from lm.records import InputError
from lm.replies import Reply, Request
from lm.threads import Unasked, in_threads

if TYPE_CHECKING:
    import diskcache
    import openai
    import tenacity

    from lm.generation import Response

OPENAI = "https://api.openai.com/v1"
FLAGS = ("concurrency", "requests_per_minute", "timeout", "attempts", "max_requests", "max_cost",
         "price_in", "price_out", "cache")  # of the scripts that ask servers; they change no answer
FAILURES_IN_A_ROW = 20  # then something is wrong with more than a request
LONGEST_WAIT = 300.0  # seconds; a request for which a server asks more has failed
FIRST_ATTEMPTS = 3  # to reach a server that was never heard


class RequestsFailed(InputError):
    """Some requests have failed for good; the others are answered."""


class Server:
    """One model of one server. 0 is no limit; `cache` is a folder, or empty for none."""

    def __init__(self, model: str, base_url: str = "", *, cache: str = "", concurrency: int = 8,
                 requests_per_minute: float = 0, timeout: float = 120, attempts: int = 8,
                 first_wait: float = 1.0, max_requests: int = 0, max_cost: float = 0.0,
                 price_in: float = -1, price_out: float = -1):
        if concurrency < 1 or attempts < 1 or timeout <= 0:
            raise InputError(f"concurrency {concurrency} and attempts {attempts} must be at least "
                             f"1, and timeout {timeout} more than 0")
        if min(requests_per_minute, max_requests, max_cost) < 0:
            raise InputError("requests_per_minute, max_requests and max_cost must be 0 (no limit) "
                             "or more")
        self.model = model
        self.base_url = address(base_url) or OPENAI
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"{self.base_url}: is no server's address; --base_url (or "
                             "OPENAI_BASE_URL) begins with http:// or https://")
        self.price = price_of(model, self.base_url, price_in, price_out)
        if max_cost and not self.price.known:
            raise InputError(f"--max_cost needs the price of {model}; give --price_in and "
                             "--price_out, in dollars per million tokens")
        self.budget = Budget(max_requests, max_cost)
        self._concurrency, self._attempts, self._first_wait = concurrency, attempts, first_wait
        self._pace = Pace(requests_per_minute)
        self._heard = False  # anything at all from the server
        self._client = self._connect(timeout)
        self._cache = _open_cache(cache) if cache else None

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) as they come; at the end raise what stopped the rest, if anything.

        Equal requests are sent once.
        """
        groups: dict[str, list[int]] = {}
        for index, request in requests.items():
            groups.setdefault(self._key(request), []).append(index)
        for key in list(groups):
            if kept := self._cached(key):
                for index in groups.pop(key):
                    yield index, kept
        left = {key: requests[indices[0]] for key, indices in groups.items()}
        for key, reply in self._send(left):
            first, *others = groups[key]
            yield first, reply
            for index in others:
                yield index, replace(reply, cost=0.0, cached=not reply.error)

    def estimate(self, requests: Mapping[int, Request]) -> str:
        """What `ask` would send and cost, in a sentence."""
        unique = {self._key(request): request for request in requests.values()}
        left = [request for key, request in unique.items() if not self._cached(key)]
        prompt = sum(tokens_of(request.text) for request in left)
        new = sum(request.max_tokens for request in left)
        cost = (f"at most ${self.price.of(prompt, new):.2f}" if self.price.known else
                "at a price that is not known here (give --price_in and --price_out)")
        kept = len(unique) - len(left)
        return (f"{self.model} at {self.base_url}: {len(left)} requests, about {prompt} prompt "
                f"tokens and at most {new} new ones, {cost}"
                + (f"; {kept} more are answered in the cache" if kept else ""))

    def forget(self, request: Request) -> None:
        """Take a reply that turned out useless from the cache, so that it is asked again."""
        if self._cache is not None:
            self._cache.pop(self._key(request))

    def _connect(self, timeout: float) -> "openai.OpenAI":
        import openai

        key = os.environ.get("OPENAI_API_KEY", "").strip()  # .env files may leave a line end on it
        if not re.fullmatch("[!-~]*", key):  # what a header cannot hold, errors would show
            raise InputError("OPENAI_API_KEY has a space, a control character or one outside ASCII "
                             "in it; export the key once more, without it")
        if not key and self.base_url == OPENAI:
            raise InputError("OPENAI_API_KEY is not set; export it, or name another server with "
                             "--base_url")
        return openai.OpenAI(api_key=key or "none", base_url=self.base_url, timeout=timeout,
                             max_retries=0)  # retries are ours, as they count

    def _body(self, request: Request) -> dict:
        chat = not isinstance(request.prompt, str)
        limit = "max_completion_tokens" if chat and self.base_url == OPENAI else "max_tokens"
        body = {"model": self.model, limit: request.max_tokens}
        body |= {"messages": list(request.prompt)} if chat else {"prompt": request.prompt}
        if request.temperature >= 0:
            body |= {"temperature": request.temperature, "top_p": request.top_p}
        body |= {} if request.seed is None else {"seed": request.seed}
        return body | dict(request.extra or {})

    def _key(self, request: Request) -> str:
        sent = json.dumps([self.base_url, self._body(request)], sort_keys=True)
        return hashlib.sha256(sent.encode()).hexdigest()

    def _cached(self, key: str) -> Reply | None:
        kept = None if self._cache is None else self._cache.get(key)
        return Reply(**{**kept, "cost": 0.0, "cached": True}) if kept else None

    def _send(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply]]:
        """Ask from several threads; give up after so many failures in a row."""
        stop, failures, given_up = threading.Event(), 0, ""
        for key, reply in in_threads(lambda request: self._reply(request, stop), requests,
                                     self._concurrency, stop):
            yield key, reply
            failures = failures + 1 if reply.error and not reply.finish_reason else 0
            if failures == FAILURES_IN_A_ROW:
                given_up = reply.error
                stop.set()
        if given_up:
            raise InputError(f"{self.base_url}: {FAILURES_IN_A_ROW} requests in a row failed (the "
                             f"last: {given_up}); the same command goes on when the server does")

    def _reply(self, request: Request, stop: threading.Event) -> Reply:
        """The reply after as many attempts as it takes; in the cache, if it is an answer."""
        import tenacity

        attempts = tenacity.Retrying(
            stop=self._gives_up, wait=self._wait_after, sleep=stop.wait, reraise=True,
            retry=tenacity.retry_if_exception(
                lambda error: replies.may_pass(error, LONGEST_WAIT)))
        try:
            reply = attempts(self._attempt, request, stop)
        except Exception as error:
            if not replies.is_servers(error):
                raise
            self._raise_if_hopeless(error)
            return Reply(error=self._told(error))
        if self._cache is not None and not reply.error:
            self._cache.set(self._key(request), asdict(reply))
        return reply

    def _attempt(self, request: Request, stop: threading.Event) -> Reply:
        """Send a request once, at its turn and within the budget."""
        import openai

        self._pace.wait(stop)
        tokens = tokens_of(request.text)
        most = cost = self.price.of(tokens, request.max_tokens)  # a lost reply may be charged
        self.budget.reserve(most)
        if stop.is_set():  # while it waited for others
            self.budget.settle(most, 0.0, sent=False)
            raise Unasked
        sent = True
        try:
            body = self._body(request)
            kind = self._client.chat.completions if "messages" in body else self._client.completions
            raw = kind.with_raw_response.create(**body)
            self._heard = True
            reply = replies.read_reply(raw.http_response.content)
            cost = self.price.of(reply.prompt_tokens or tokens,
                                 reply.new_tokens or tokens_of(reply.text))
            return replace(reply, cost=cost)
        except openai.APIError as error:
            sent = not replies.nobody_there(error)
            self._heard = self._heard or sent
            if isinstance(error, openai.APIStatusError) or not sent:
                cost = 0.0
            raise
        finally:
            self.budget.settle(most, cost, sent)

    def _gives_up(self, state: "tenacity.RetryCallState") -> bool:
        nobody = replies.nobody_there(state.outcome.exception()) and not self._heard
        return state.attempt_number >= (FIRST_ATTEMPTS if nobody else self._attempts)

    def _wait_after(self, state: "tenacity.RetryCallState") -> float:
        """As long as the server asks, and then all threads; else twice as long each time."""
        jitter = random.uniform(0, self._first_wait)
        asked = replies.asked_wait(state.outcome.exception())
        if asked is None:
            return min(self._first_wait * 2 ** (state.attempt_number - 1), 60) + jitter
        self._pace.pause(asked)
        return asked + jitter

    def _raise_if_hopeless(self, error: Exception) -> None:
        """Stop at what no other request would be spared."""
        status = getattr(error, "status_code", None)
        if status == 401:  # the server's own words could show parts of the key
            raise InputError(f"{self.base_url}: the key is refused (HTTP 401); put the right one "
                             "into OPENAI_API_KEY") from None
        if status == 404:
            raise InputError(f"{self.base_url}: no model {self.model}, or not this kind of request "
                             f"({self._told(error)})") from error
        if replies.out_of_credit(error):
            raise InputError(f"{self.base_url}: the account is out of credit; the same command "
                             "goes on when it is not") from error
        if replies.nobody_there(error) and not self._heard:
            raise InputError(f"{self.base_url}: no server answers there; start it, or correct "
                             "--base_url") from error

    def _told(self, error: Exception) -> str:
        """One line of what happened, without the key should the server repeat it."""
        cause = f" ({error.__cause__})" if type(error).__name__ == "APIConnectionError" else ""
        text = " ".join(f"{error}{cause}".split()) or type(error).__name__
        key = self._client.api_key
        for shown in (key, repr(key)[1:-1]):  # errors hold bodies as Python writes them
            text = text.replace(shown, "[key]")
        return text[:300]  # cut last: no part of a key stays


def address(base_url: str) -> str:
    """The server that is meant; empty is OpenAI's."""
    return (base_url or os.environ.get("OPENAI_BASE_URL") or "").rstrip("/")


def connect(model: str, base_url: str, flags: Mapping, **more: object) -> Server:
    """The server that a script's flags speak of."""
    return Server(model, base_url, **{name: flags[name] for name in FLAGS if name in flags} | more)


def check_judge(model: str, base_url: str, flags: Mapping) -> None:
    """Stop where a judge's key, price or address is missing or wrong; nothing is asked."""
    server = connect(model, base_url, flags)
    print(f"judge: {server.model} at {server.base_url} (not asked yet)")


def generate_on(server: Server, prompts: Mapping[int, str | Sequence[Mapping[str, str]]], *,
                max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
                seed: int | str = 0) -> Iterator[tuple[int, "Response"]]:
    """`lm.generation.generate` with a server: (index, response) as they come, without token ids.

    Texts are completed, messages answered. Failed requests yield nothing; they are an error at the
    end, when all others are done. A sample's seed follows from `seed` and the prompt's index;
    whether the server makes the same sample of it again is the server's matter.
    """
    from lm.generation import Response

    requests = requests_of(prompts, max_new_tokens, temperature, top_p, seed)
    failed = []
    for index, reply in server.ask(requests):
        if reply.error:
            failed.append(reply.error)
        else:
            yield index, Response(reply.text, (), reply.finish_reason)
    if failed:
        raise RequestsFailed(f"{len(failed)} of {len(requests)} requests failed (the last: "
                             f"{failed[-1]}); the same command asks only for those")


def requests_of(prompts: Mapping[int, str | Sequence[Mapping[str, str]]], max_new_tokens: int,
                temperature: float = 0.0, top_p: float = 1.0,
                seed: int | str = 0) -> dict[int, Request]:
    """What `generate_on` sends, by index."""
    return {index: Request(prompt, max_new_tokens, temperature, top_p,
                           sample_seed(seed, index) if temperature else None)
            for index, prompt in prompts.items()}


def sample_seed(seed: int | str, index: int) -> int:
    """A 31-bit number of its own for each sample."""
    return int(hashlib.sha256(f"{seed} {index}".encode()).hexdigest()[:8], 16) >> 1


def paid(cache: Path) -> tuple[int, float]:
    """How many replies are in a cache, and what they cost; lost and unreadable ones are not."""
    if not cache.is_dir():
        return 0, 0.0
    with _open_cache(str(cache)) as kept:
        return len(kept), sum(kept[key]["cost"] for key in kept)


def _open_cache(folder: str) -> "diskcache.Cache":
    import diskcache

    try:
        # JSON, as the default would unpickle what it finds; and nothing is ever thrown out
        return diskcache.Cache(folder, disk=diskcache.JSONDisk, eviction_policy="none")
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"{folder}: cannot keep replies there ({error}); delete it, or name "
                         "another folder") from error
