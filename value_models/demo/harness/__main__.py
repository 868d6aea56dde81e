"""Runs both tasks against a server of the demo, and against transformers, and prints both.

    python -m value_models.demo.harness [--url URL] [--target NAME] [--limit N] [NETWORK ...]

The numbers can only be the same if the server, too, computes in float32 (`--dtype float32`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from value_models.demo.harness.comparison import TASKS, Result, reference, served


def row(title: str, by_server: Result, by_reference: Result) -> str:
    """One line of the table."""
    accuracies = (
        f"{by_server.accuracy[task]:.4f} | {by_reference.accuracy[task]:.4f}" for task in TASKS
    )
    apart = max(
        abs(a - b)
        for a, b in zip(by_server.loglikelihoods, by_reference.loglikelihoods, strict=True)
    )
    same = sum(a == b for a, b in zip(by_server.answers, by_reference.answers, strict=True))
    return " | ".join(
        (f"| {title}", *accuracies, f"{apart:.1e}", f"{same} of {len(by_server.answers)} |")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table to stdout; lm-eval's progress goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m value_models.demo.harness")
    parser.add_argument(
        "networks", nargs="*", default=["qa"], metavar="NETWORK", help="default: qa"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--target", default="atlas", help="the target's name at the server")
    parser.add_argument("--limit", type=int, help="at most so many documents of each task")
    args = parser.parse_args(arguments)
    titles = [f"{task}, {who}" for task in TASKS for who in ("server", "transformers")]
    print(f"| model | {' | '.join(titles)} | log-likelihoods apart, at most | same answers |")
    print(f"| --- |{' ---: |' * (len(titles) + 2)}")
    for name in (None, *args.networks):
        by_server = served(args.url, name or args.target, args.limit)
        print(row(name or "target alone", by_server, reference(name, args.limit)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
