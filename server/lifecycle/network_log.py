"""The line that the log has for each state that a value network comes into."""

import json
import logging
import re

from server.lifecycle.catalog import Network

log = logging.getLogger("trimtab")


def log_network(network: Network, state: str, **fields: object) -> None:
    """Log the state of one version."""
    source = {} if network.source is None else {"source": network.source}
    log_state(network.name, state, version=network.version, **source, **fields)


def log_state(name: str, state: str, **fields: object) -> None:
    """Log the state of a name, of which no version may be known."""
    shown = {"name": name, "state": state, **fields}
    log.info("value_network %s", " ".join(f"{k}={_quoted(v)}" for k, v in shown.items()))


def _quoted(value: object) -> str:
    text = str(value)[:500]
    # Quoted as JSON, no text can begin a line or a field of its own.
    return text if re.fullmatch(r"[\w.,:@/-]+", text, re.ASCII) else json.dumps(text)
