"""A chat server in the test's process that says what a function makes of a request."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | int | dict[str, Any]


class ChatServer:
    """`POST /v1/chat/completions`.

    Attributes:
        reply: Request body -> what the model says, a whole completion, or an HTTP status.
        bodies: Every request, as they came.
        asked: The path and the headers of every request.
        headers: Sent with every answer.
        url: The base address.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.headers: dict[str, str] = {}
        self.url = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, bytes]:
        self.bodies.append(body)
        said = self.reply(body)
        if isinstance(said, int):
            return said, b"{}"
        if isinstance(said, str):
            said = {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]}
        return 200, json.dumps(said).encode()


@contextmanager
def chat_server(reply: Callable[[dict[str, Any]], Reply], tls: ssl.SSLContext | None = None) -> Iterator[ChatServer]:
    """Serves on a free port."""
    chat = ChatServer(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path.partition("?")[0] == "/v1/chat/completions"
            chat.asked.append((self.path, dict(self.headers)))
            status, content = chat.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            for name, value in chat.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    chat.url = f"http{'s' * (tls is not None)}://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
