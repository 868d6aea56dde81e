"""Runs as an engine would report them, made up."""

from deploy.bench.engine import Run, Stream


def make_run(*tokens: list[int], step: float = 0.1, sent: float = 0.0) -> Run:
    """Return a run with these streams, whose tokens come at a steady pace."""
    return Run(
        [Stream(row, sent, [sent + step * (n + 1) for n in range(len(row))]) for row in tokens]
    )


def timed(step: float, batch_size: int = 4) -> Run:
    """Return a run of ten steps of so many seconds, whose tokens tell it from others."""
    return make_run(*[[int(1000 * step)] * 10] * batch_size, step=step)
