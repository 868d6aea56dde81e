"""Stands for `server.launch` in tests of its parent: behaves as the first argument says."""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from server.launch import REPORT_FD, Launched, Refused
from server.settings import STATUS_PATH, cut_off_marker, instance_id

KEY = f"key {os.getpid()}"
FOREIGN = "foreign"


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM with trimtab's routes would."""

    instance = instance_id(KEY)

    def do_GET(self) -> None:
        if self.path not in (STATUS_PATH, "/health"):
            return self.send_error(404)
        body = json.dumps({"instance": self.instance, "networks": {}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    behaviour = sys.argv[1]
    print("starting", *sys.argv[1:], flush=True)
    if behaviour == "crash":
        raise RuntimeError("no memory left")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    launched = Launched(
        url=f"http://127.0.0.1:{server.server_port}",
        uds=None,
        key=KEY,
        target="target",
        networks={"qa": "qa@3f2a91c0, residual"},
        chats=True,
        example_model="qa",
        example="Where's Ana?",
        shutdown_timeout=0,
        notes=[],
        run_dir=Path(os.environ["RUN_DIR"]) if "RUN_DIR" in os.environ else None,
    )
    message = Refused(refused="no such flag") if behaviour == "refuse" else launched
    with os.fdopen(int(os.environ[REPORT_FD]), "w") as parent:
        parent.write(message.model_dump_json())
    if behaviour == "refuse":
        raise SystemExit(2)
    if behaviour == "crash-later":
        raise RuntimeError("no memory left")
    if behaviour == "dying":
        print("left behind", subprocess.Popen(["sleep", "1000"]).pid, flush=True)
    if behaviour == "foreign":
        Handler.instance = "another server's"

    def stop(*_: object) -> None:
        if behaviour == "stubborn":
            return
        if behaviour == "cut-off":
            cut_off_marker(KEY).touch()
        os._exit(5 if behaviour == "unclean" else 0)

    signal.signal(signal.SIGTERM, stop)
    server.timeout = 0.1
    started = time.monotonic()
    while behaviour not in ("dying", "foreign") or time.monotonic() - started < 2:
        server.handle_request()


if __name__ == "__main__":
    main()
