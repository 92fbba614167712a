"""A microservice that implements a task: taskd posts the params as JSON, the JSON of the answer is the result.

    python handler.py --port 8765
    taskd submit --http http://127.0.0.1:8765/execute --params '{"text": "some words"}' --wait

Nothing of taskd is needed on this side. Any status of 200 to 299 is success; anything else makes the attempt fail, with
the error of a body such as {"error": {"type": "…", "message": "…"}}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BODY_BYTES_MAX = 1 << 20


def execute(params: dict[str, Any]) -> Any:
    """The work itself."""
    text = params["text"]
    return {"length": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


class Handler(BaseHTTPRequestHandler):
    """One request is one attempt; X-Taskd-Fence names it, and no other attempt ever has the same."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        if size > BODY_BYTES_MAX:
            return self._answer(413, {"error": {"type": "TooLarge", "message": "the params are too large"}})
        try:
            return self._answer(200, execute(json.loads(self.rfile.read(size))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self._answer(400, {"error": {"type": type(error).__name__, "message": str(error)}})

    def _answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: taskd records every attempt."""


def main() -> None:
    parser = argparse.ArgumentParser(description="An example microservice for taskd.")
    parser.add_argument("--port", type=int, default=8765, help="where to listen on 127.0.0.1; 0 for any free port")
    with ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler) as server:
        print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
