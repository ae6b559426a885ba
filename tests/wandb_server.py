"""A server that takes what wandb sends, as far as wandb needs to go on, and can be ended on the way."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self._answer(json.loads(body)) if self.path == "/graphql" else {"exitcode": None, "limits": {}}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            project = {"id": "p", "name": "adamerge", "entity": {"id": "e", "name": "me"}}
            bucket = {
                "id": "x",
                "name": variables.get("name"),
                "displayName": "d",
                "project": project,
                "historyLineCount": 0,
            }
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": self.server.url} for name in variables.get("files", [])]  # type: ignore[attr-defined]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        return {"data": {"model": None}}

    def log_message(self, *words: Any) -> None:
        """Nothing: the tests read what we print."""


class WandbServer(ThreadingHTTPServer):
    """The server, at ``url``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()
