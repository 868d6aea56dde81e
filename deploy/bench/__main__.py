"""Measures one machine, a question at a time, each side by side in one run.

Results are printed as tables, and written as JSON with --out, curves beside it as SVG. Progress
goes to standard error.
"""

import argparse
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

from deploy.bench import report
from deploy.bench.questions import QUESTIONS, summary

PROGRAM = "python -m deploy.bench"


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.question == "show":
        try:
            for file in arguments.files:
                report.show(report.read(file))
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        return
    command = shlex.join([*report.environment(), *PROGRAM.split(), *sys.argv[1:]])
    # A plain end would leave the engines behind, stopped and holding their memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        answer = QUESTIONS[arguments.question].ask(arguments, Path(folder))
    found = report.compose(arguments.question, command, settings_of(arguments), answer)
    report.show(found)
    if arguments.out:
        written = report.write(found, arguments.out)
        report.say(f"written: {', '.join(map(str, written))}")
    if answer.failed:
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    """Return a parser with a command for each question."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for name, question in QUESTIONS.items():
        command = commands.add_parser(
            name,
            help=summary(question),
            description=question.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--out", type=Path, help="write the results here, as JSON")
        question.add_arguments(command)
    shown = commands.add_parser("show", help="print the tables of result files again")
    shown.add_argument("files", type=Path, nargs="+", metavar="FILE")
    return parser


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for, for the report."""
    return {k: v for k, v in vars(arguments).items() if k not in ("question", "out")}


if __name__ == "__main__":
    main()
