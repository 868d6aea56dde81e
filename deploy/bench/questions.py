"""The questions that can be asked."""

import argparse
from pathlib import Path
from typing import Protocol

from deploy.bench import (
    arrivals,
    beside,
    choices,
    combining,
    cores,
    exactness,
    fusion,
    mixture,
    prefill,
    price,
    profile,
    retokenization,
    sizes,
    stall,
    startup,
    swapping,
    throughput,
    traffic,
)
from deploy.bench.report import Answer


class Question(Protocol):
    """A module; its docstring begins with what it answers."""

    __doc__: str | None

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None: ...

    @staticmethod
    def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
        """Measure; what is made for it may go into `folder`."""
        ...


QUESTIONS: dict[str, Question] = {
    "throughput": throughput,
    "traffic": traffic,
    "price": price,
    "prefill": prefill,
    "stall": stall,
    "sizes": sizes,
    "mixture": mixture,
    "beside": beside,
    "profile": profile,
    "choices": choices,
    "combining": combining,
    "cores": cores,
    "swapping": swapping,
    "arrivals": arrivals,
    "startup": startup,
    "retokenization": retokenization,
    "fusion": fusion,
    "exactness": exactness,
}


def summary(question: Question) -> str:
    """Return its line in the list of questions."""
    return (question.__doc__ or "").partition("\n")[0].removesuffix(".").removesuffix(":")
