"""A real HTTP server that speaks the chat completions protocol, for replies that no model gives on request.

Errors, cut and empty texts, connections that break: `vllm serve` does none of these when asked to. What users run it
for is tested on `vllm serve` itself, in test_gsm8k_engine.py.
"""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COUNT = 12  # questions of a test


def write_questions(path, count, first=0):
    """Made-up questions in GSM8K's format: number n asks for 3 n + 2."""
    lines = []
    for n in range(first, first + count):
        answer = (
            f"Three boxes hold 3*{n}=<<3*{n}={3 * n}>>{3 * n}.\nWith two more that is {3 * n + 2}.\n#### {3 * n + 2:,}"
        )
        lines.append(json.dumps({"question": f"Case {n}: three boxes of {n} pens and two pens?", "answer": answer}))
    path.write_text("\n".join(lines) + "\n")
    return path


def case(body):
    """Number of the made-up question that a request asks."""
    return int(body["messages"][-1]["content"].split("Case ")[1].split(":")[0])


def right(n):
    return f"3 * {n} + 2 = {3 * n + 2}\n#### {3 * n + 2}"


def completion(content, finish_reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def mixed(n, attempt):
    """One of each kind of reply."""
    kinds = {
        1: completion(f"#### {3 * n + 3}"),
        2: completion(f"It is {3 * n + 2}."),
        3: completion("It goes on and", "length"),
        4: completion(""),
        5: completion(None),
        6: (400, {"error": {"message": "prompt too\nlong", "code": 400}}),
        7: completion(right(n), "length"),
        8: {**completion(""), "choices": []},
        9: "<html>",
    }
    return kinds.get(n, completion(right(n)))


class Chat:
    """What the server says: `reply(n, attempt)` gives a body, or a status and a body, or raises ConnectionError."""

    def __init__(self, reply=lambda n, attempt: completion(right(n)), seconds=0.0, models=("pen-counter",)):
        self.reply, self.seconds, self.models = reply, seconds, models
        self.bodies, self.attempts = [], Counter()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def answer(self, body):
        n = case(body)
        with self.lock:
            self.bodies.append(body)
            self.attempts[n] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            attempt = self.attempts[n]
        time.sleep(self.seconds)
        try:
            found = self.reply(n, attempt)
        finally:
            with self.lock:
                self.in_flight -= 1
        return found if isinstance(found, tuple) else (200, found)


@contextmanager
def serving(chat, port=0):
    """The URL of a server on a free port, or on `port`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in chat.models]
            self.send(200, {"object": "list", "data": models} if self.path == "/v1/models" else "<html>")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.send(*chat.answer(body))
            except ConnectionError:
                self.close_connection = True

        def send(self, status, body):
            content = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_):
            """A client that was killed has left: nothing to print."""

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
