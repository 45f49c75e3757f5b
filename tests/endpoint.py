"""An OpenAI-compatible endpoint for tests: a real HTTP server that does to each request what the test says."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        found = re.search(r"^BEGIN\n(.*)\nEND$", asked, re.MULTILINE)
        prompt = json.loads(found[1]) if found else "control"
        with self.server.lock:
            self.server.asked[prompt] += 1
            number = self.server.asked[prompt]
            self.server.times.append(time.monotonic())
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            self.server.flying += 1
            self.flies = True
            self.server.most = max(self.server.most, self.server.flying)
        try:
            self.server.act(self, prompt, number)
        except (BrokenPipeError, ConnectionResetError):  # it did not wait for us
            pass
        finally:
            self.landed()

    def landed(self) -> None:
        """Before the last that the other side waits for: once it has that, or has given up, it may ask the next."""
        with self.server.lock:
            self.server.flying -= self.flies
            self.flies = False

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.landed()
        self.send_response(status)
        for name, value in ({"Content-Length": str(length or len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def say(self, content: Any, ended: str = "stop") -> None:
        answer = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": ended}]}
        self.send(200, json.dumps(answer).encode())

    def good(self, clarity: int = 8, specificity: int = 7) -> None:
        self.say(json.dumps({"clarity": clarity, "specificity": specificity}))

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.seen: list[tuple[str, str | None, dict[str, Any]]] = []
        self.flying = self.most = 0
        self.act: Callable[[Handler, str, int], None] = lambda handler, prompt, number: handler.good()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass
