"""`make bench`: measures one machine from end to end; see `--help`."""

import argparse
import collections
import json
import random
import shlex
import signal
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging

from deploy.bench import report, retokenization
from deploy.bench.baseline import Baseline
from deploy.bench.checkpoints import Checkpoints, make_checkpoints
from deploy.bench.engine import Engine, Prompts
from deploy.bench.report import CACHED, GUIDED, MAPPED, PLAIN, UNCACHED, UNGUIDED, Measurements

PROMPT_TOKENS = 32


def main() -> None:
    arguments = parse_arguments()
    # A plain end would leave the engines behind, stopped and holding their memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        say("making random checkpoints")
        checkpoints = make_checkpoints(Path(folder), arguments.dtype)
        measured, same_tokens = measure_engines(checkpoints, arguments, Path(folder))
        measured |= measure_transformers(checkpoints, arguments)
    say("retokenization: aligning two real vocabularies")
    retokenized = retokenization.measure()
    found = {
        "command": shlex.join(["python", "-m", "deploy.bench", *sys.argv[1:]]),
        "machine": report.describe_machine(),
        "versions": report.versions(),
        "models": {
            "dtype": arguments.dtype,
            "target_parameters": checkpoints.target_parameters,
            "network_parameters": checkpoints.network_parameters,
            "resident_networks": len(checkpoints.networks),
            "vocab_size": checkpoints.vocab_size,
        },
        "settings": {
            "batch_sizes": arguments.batch_sizes,
            "rounds": arguments.rounds,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": arguments.tokens,
            "sampling": "greedy",
        },
        "unguided_tokens_equal_plain": same_tokens,
        **report.summarise(
            measured, 1 + checkpoints.network_parameters / checkpoints.target_parameters
        ),
        "retokenization": retokenized,
    }
    report.show(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
        say(f"written to {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--rounds", type=int, default=7, help="times that each is measured")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per request")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the checkpoints; vLLM then runs in the same",
    )
    return parser.parse_args()


def measure_engines(
    checkpoints: Checkpoints, arguments: argparse.Namespace, folder: Path
) -> tuple[Measurements, bool]:
    """Measure plain, unguided and guided by turns, and whether unguided tokens are plain vLLM's."""
    measured: Measurements = collections.defaultdict(lambda: collections.defaultdict(list))
    same_tokens = True
    say("starting vLLM plain (it compiles the target at first)")
    with Engine(checkpoints.target, {}, folder / "plain.log") as plain:
        say("starting vLLM with trimtab")
        with Engine(checkpoints.target, checkpoints.networks, folder / "trimtab.log") as trimtab:
            turns = [
                (PLAIN, plain, ()),
                (UNGUIDED, trimtab, ()),
                (GUIDED, trimtab, ("guiding",)),
                (MAPPED, trimtab, ("mapped",)),
            ]
            for round_number in range(arguments.rounds + 1):  # the first one warms up
                for batch_size in arguments.batch_sizes:
                    prompts = make_prompts(batch_size, seed=round_number)
                    runs = {
                        name: engine.generate(prompts, arguments.tokens, *networks)
                        for name, engine, networks in turns
                    }
                    same_tokens &= runs[UNGUIDED].tokens == runs[PLAIN].tokens
                    if runs[PLAIN].tokens in (runs[GUIDED].tokens, runs[MAPPED].tokens):
                        sys.exit("The guided requests were not guided.")
                    if round_number:
                        for name, run in runs.items():
                            measured[name][batch_size].append(run.tokens_per_second)
                turns.append(turns.pop(0))  # no configuration always follows the same other one
                say(f"vLLM: round {round_number} of {arguments.rounds}")
    return measured, same_tokens


def measure_transformers(checkpoints: Checkpoints, arguments: argparse.Namespace) -> Measurements:
    """Measure the baselines: with caches up to three times, without once (it takes minutes)."""
    baseline = Baseline(checkpoints.target, checkpoints.networks["guiding"], arguments.dtype)
    measured: Measurements = {}
    for name, cached, rounds in ((CACHED, True, min(3, arguments.rounds)), (UNCACHED, False, 1)):
        baseline.generate(make_prompts(1, seed=0), 4, cached)
        measured[name] = {
            batch_size: [
                baseline.generate(
                    make_prompts(batch_size, seed), arguments.tokens, cached
                ).tokens_per_second
                for seed in range(1, rounds + 1)
            ]
            for batch_size in arguments.batch_sizes
        }
        say(f"{name}: done")
    return measured


def make_prompts(batch_size: int, seed: int) -> Prompts:
    """Return random prompts of equal length, the same for every configuration."""
    draw = random.Random(1000 * seed + batch_size)
    return [[draw.randrange(8, 256) for _ in range(PROMPT_TOKENS)] for _ in range(batch_size)]


def say(line: str) -> None:
    print(f"[bench] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
