"""The arguments that several questions take."""

import argparse
from collections.abc import Callable, Sequence

from deploy.bench.checkpoints import DTYPES, MODELS, SMALL


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of the checkpoints; vLLM then runs in the same",
    )


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        choices=MODELS,
        default=SMALL,
        help=f"the target ({SMALL}); 1.5b: Qwen2.5-1.5B's shape and networks of 5.5 %%; 7b, for a "
        "GPU: Qwen2.5-7B's, and networks of 0.5B's",
    )


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--rounds",
        type=within(1),
        default=default,
        help=f"times that each is measured ({default})",
    )


def add_batches(
    parser: argparse.ArgumentParser, batch_sizes: Sequence[int], tokens: int = 64
) -> None:
    parser.add_argument(
        "--tokens", type=within(2), default=tokens, help=f"new tokens per request ({tokens})"
    )
    parser.add_argument(
        "--batch-sizes",
        type=within(1, 64),
        nargs="+",
        default=list(batch_sizes),
        help=f"1 to 64 ({' '.join(map(str, batch_sizes))})",
    )


def within(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a type of argument: a whole number between these."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{number} is not {limits}")
        return number

    parse.__name__ = "number"
    return parse
