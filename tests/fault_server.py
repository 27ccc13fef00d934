"""An OpenAI-compatible server that misbehaves as it is told: the standard library, one thread each.

    with FaultServer({"Q3": ["429", "half"]}) as server:  # the first two requests that contain Q3
        Server("m", server.url, first_wait=0.01)...

Requests that no plan speaks of, and those after it, get what `answer` says. All are in `asked`.
"""

import email.utils
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG = 30  # seconds, for a client with less patience


class FaultServer:
    """Serves /v1/chat/completions and /v1/completions on a free port of this machine."""

    def __init__(self, plan: Mapping[str, Sequence[str]] | None = None,
                 answer: Callable[[str], str] = lambda text: "perfect", delay: float = 0.0):
        self.plan = {mark: list(faults) for mark, faults in (plan or {}).items()}
        self.answer, self.delay = answer, delay
        self.asked: list[str] = []  # the text of each request, in the order of arrival
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    def next_fault(self, text: str) -> str:
        """What to do to this request; `ok` where nothing is planned."""
        for mark, faults in self.plan.items():
            if mark in text and faults:
                return faults[0] if faults[0].endswith("!") else faults.pop(0)  # `!` is for ever
        return "ok"


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body.get("prompt") or body["messages"][-1]["content"]
            with server.lock:
                server.asked.append(text)
                server.bodies.append(body)
                server.times.append(time.monotonic())
                server.keys.add(self.headers.get("Authorization", ""))
                server.under_way += 1
                server.most_under_way = max(server.most_under_way, server.under_way)
                fault = server.next_fault(text).removesuffix("!")
            time.sleep(server.delay)
            with server.lock:
                server.under_way -= 1
            self._behave(fault, body, text)

        def _behave(self, fault: str, body: dict, text: str) -> None:
            good = _completion(body, server.answer(text))
            if fault == "ok":
                self._send(200, good)
            elif fault == "hang":
                time.sleep(HANG)
            elif fault == "half":  # half a JSON, announced as all there is
                self._send(200, good[:len(good) // 2])
            elif fault == "drop":  # half a JSON, then the line goes dead
                self._send(200, good[:len(good) // 2], length=len(good))
            elif fault == "empty":
                self._send(200, b"")
            elif fault == "html":
                self._send(200, b"<html>Please log in</html>", kind="text/html")
            elif fault == "null":
                self._send(200, _completion(body, None))
            elif fault == "cut":
                self._send(200, _completion(body, "The response is", finish_reason="length"))
            elif fault == "refusal":
                self._send(200, _completion(body, None, refusal="I will not judge this."))
            elif fault == "filter":
                self._send(200, _completion(body, "", finish_reason="content_filter"))
            elif fault.startswith("say:"):
                self._send(200, _completion(body, fault.removeprefix("say:")))
            else:  # "429", or "429 Retry-After: 2"; {date} is 1 to 2 seconds from now
                status, _, header = fault.partition(" ")
                message = f"error of the key {self.headers.get('Authorization')}"
                code = "insufficient_quota" if status == "credit" else None
                self._send(429 if code else int(status), json.dumps(
                    {"error": {"message": message, "code": code}}).encode(), header=header)

        def _send(self, status: int, content: bytes, kind: str = "application/json",
                  length: int | None = None, header: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            if header:
                date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds
                self.send_header(*header.format(date=date).split(": ", 1))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = length is not None

        def log_message(self, *_) -> None:
            """Silence."""

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (BrokenPipeError, ConnectionResetError):  # the client went away
                self.close_connection = True

    return Handler


def _completion(body: dict, text: str | None, finish_reason: str = "stop",
                refusal: str | None = None) -> bytes:
    """10 prompt tokens and 5 new ones, whatever they say."""
    choice = {"index": 0, "finish_reason": finish_reason}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": text, "refusal": refusal}
    else:
        choice["text"] = text
    return json.dumps({"choices": [choice], "usage": {
        "prompt_tokens": 10, "completion_tokens": 5}}).encode()
