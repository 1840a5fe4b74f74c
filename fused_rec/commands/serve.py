"""Serves a finished run over HTTP: recommendations, explanations, similar items, health and metrics.

    python -m experiments.serve --workdir=runs/mine
    python -m experiments.serve --workdir=runs/mine --tables=DIR_OF_TODAY --rules=rules.json --port=8080

Needs the extra: pip install -e ".[serve]". It listens on this computer alone unless --host says otherwise, and asks
nobody who they are: docs/DAILY.md describes requests, limits and what to put in front of it.

SIGHUP loads run, tables and rules anew, and then serves these; if they cannot be loaded, it keeps what it has. SIGTERM
and Ctrl-C end it when the requests it has begun are answered; a second one ends it at once.
"""

import math
import os
import signal
import socket
import sys
from types import FrameType

from absl import app, flags

from fused_rec.commands.places import DEFINE_language, DEFINE_rules, DEFINE_run, DEFINE_served
from fused_rec.http.requests import Limits

WORKDIR, DATA_PATH, CACHE = DEFINE_run()
HISTORY, TABLES = DEFINE_served()
RULES = DEFINE_rules()
LANGUAGE = DEFINE_language()
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of this computer.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 for any that is free.", 0, 65_535)
SERVER_NAMES = flags.DEFINE_list(
    "server_names", None, "Names in the header Host that are answered; * for any. By default the loopback's, or any."
)
MAX_USERS = flags.DEFINE_integer("max_users", Limits.max_users, "Users of a request.", lower_bound=1)
MAX_K = flags.DEFINE_integer("max_k", Limits.max_k, "Items per user.", lower_bound=1)
MAX_BODY = flags.DEFINE_integer("max_body", Limits.max_body, "Bytes of a request's body.", lower_bound=1)
MAX_PENDING = flags.DEFINE_integer(
    "max_pending", Limits.max_pending, "Requests that compute or wait; more get status 503.", lower_bound=1
)
TIMEOUT = flags.DEFINE_float("timeout", Limits.timeout, "Seconds to receive a body, and to compute.", lower_bound=0.1)
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def main(argv: list[str]) -> None:
    """Loads the run, listens, and answers until a signal ends it."""
    from fused_rec.http.served import Source, load_served

    try:
        import uvicorn

        from fused_rec.http.app import Service, create_app
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; serve needs: pip install -e ".[serve]"') from error

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it would end the process while the first model is loaded
    listener = _bound(HOST.value, PORT.value)
    given = (WORKDIR, HISTORY, TABLES, RULES, DATA_PATH, CACHE, LANGUAGE)
    source = Source(*(flag.value for flag in given))
    limits = Limits(MAX_USERS.value, MAX_K.value, MAX_BODY.value, MAX_PENDING.value, TIMEOUT.value)
    service = Service(lambda: load_served(source), limits, _server_names())

    class Server(uvicorn.Server):
        """Server that does not raise the signal again once it has stopped: stopping was the success."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.stopping = self.should_exit = True

    config = uvicorn.Config(
        create_app(service),
        loop="asyncio",  # whatever else is installed, the same parts answer
        http="h11",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,  # addresses of requests hold ids of users
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(2 * limits.timeout) + 1,
    )
    signal.signal(signal.SIGHUP, lambda number, frame: service.reload())
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {WORKDIR.value} at http://{shown}:{port} (model {service.model.model[:12]})", flush=True)
    Server(config).run(sockets=[listener])
    if service.close():  # Python would wait for the thread
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _bound(host: str, port: int) -> socket.socket:
    """Returns a bound socket: a port that is taken is found before the model is loaded, and refuses until it is."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        raise app.UsageError(f"cannot listen at --host={host} --port={port}: {error}; give others") from error
    return listener


def _server_names() -> list[str] | None:
    """Returns the accepted names: on a loopback a page of another site could ask in the name of its own (rebinding)."""
    if SERVER_NAMES.value is not None:
        return None if "*" in SERVER_NAMES.value else [name.lower() for name in SERVER_NAMES.value]
    return list(LOOPBACK) if HOST.value.startswith("127.") or HOST.value in ("localhost", "::1") else None
