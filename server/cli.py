"""The command `trimtab`."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from value_models.store import NetworkFolder

SERVE_DESCRIPTION = """\
Serve MODEL, steered per request by value networks, over OpenAI's API.

Every flag of `vllm serve` works here too, with vLLM's meaning and default, except that --host is
127.0.0.1 and --shutdown-timeout is 30 (seconds that running requests have to finish) unless given.
`trimtab serve --help=all` lists them all, `--help=<word>` those about a word.
"""
SERVE_EPILOG = """\
examples:
  trimtab serve Qwen/Qwen2.5-7B --value-network chat=./networks/chat --max-model-len 8192
  trimtab serve ./target --value-network-dir ./networks --host 0.0.0.0 --api-key sesame

environment:
  TRIMTAB_ADMIN_API_KEY    the key to management, as --admin-api-key
  VLLM_CPU_KVCACHE_SPACE   on a CPU, GiB for the target's KV cache (2 unless set)
  VLLM_CPU_NUM_OF_RESERVED_CPU
                           on a CPU, cores that workers leave to others (0 of up to three)

Exits with 0 after a clean stop (SIGTERM, Ctrl-C), 1 after a failure, 2 if it cannot start as asked.
"""


def main() -> None:
    """Run the command that the arguments name."""
    match sys.argv[1:]:
        case ["serve", *arguments]:
            raise SystemExit(serve(arguments))
        case ["train", *arguments]:
            raise SystemExit(train(arguments))
        case ["evaluate", *arguments]:
            raise SystemExit(evaluate(arguments))
        case ["align", *arguments]:
            raise SystemExit(align(arguments))
        case ["pair", *arguments]:
            raise SystemExit(pair(arguments))
        case ["check", *arguments]:
            raise SystemExit(check(arguments))
        case ["publish", *arguments]:
            raise SystemExit(publish(arguments))
        case ["networks", *arguments]:
            raise SystemExit(networks(arguments))
    parser = argparse.ArgumentParser(
        prog="trimtab", description="Serve a large language model, steered by value networks."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    parser.parse_args()


COMMANDS = {
    "serve": "serve a model and its value networks over OpenAI's API",
    "train": "train a value network from demonstrations",
    "evaluate": "measure how well a value network guides a model, offline",
    "align": "map a value network's vocabulary to another target's",
    "pair": "make a value network of two models, without training",
    "check": "check a value network's folder without loading it",
    "publish": "put a value network into a store, at once and whole",
    "networks": "see, load and unload the value networks of a running server",
}


def serve(arguments: list[str]) -> int:
    """`trimtab serve`: start vLLM's server and watch over it. Returns the exit code."""
    from server.launch import MODULE, add_options

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--verbose", action="store_true", help="show vLLM's log here")
    own.add_argument(
        "--log-file",
        type=Path,
        metavar="FILE",
        help="write vLLM's log to FILE (default: a new file, which the output names)",
    )
    options, passed = own.parse_known_args(arguments)
    if {"-h", "--help"} & set(passed):
        documented = argparse.ArgumentParser(
            usage="trimtab serve MODEL [options] [any flag of `vllm serve`]",
            description=SERVE_DESCRIPTION,
            epilog=SERVE_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[own],
        )
        add_options(documented)
        documented.print_help()
        return 0
    if any(argument.startswith("--help=") for argument in passed):
        return subprocess.call([sys.executable, "-m", MODULE, *passed])

    from server.supervisor import Supervisor

    return Supervisor(passed, verbose=options.verbose, log_file=options.log_file).run()


def train(arguments: list[str]) -> int:
    """`trimtab train`: learn a value network. Returns the exit code."""
    from value_models.training import train as training

    parser = argparse.ArgumentParser(prog="trimtab train", description=COMMANDS["train"])
    training.add_arguments(parser)
    return training.main(parser.parse_args(arguments))


def evaluate(arguments: list[str]) -> int:
    """`trimtab evaluate`: measure a network of any kind beside a base. Returns the exit code."""
    from value_models.training import evaluate as evaluation

    parser = argparse.ArgumentParser(
        prog="trimtab evaluate",
        description="Read demonstrations along with a value network beside a model, in plain "
        "PyTorch: for every kind, those included that cannot be served.",
    )
    evaluation.add_arguments(parser)
    return evaluation.main(parser.parse_args(arguments))


def align(arguments: list[str]) -> int:
    """`trimtab align`: map a network's vocabulary to a target's. Returns the exit code."""
    from value_models.vocabulary import command

    parser = argparse.ArgumentParser(
        prog="trimtab align",
        description=command.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return command.main(parser.parse_args(arguments))


def pair(arguments: list[str]) -> int:
    """`trimtab pair`: make a contrast network. Returns the exit code."""
    from value_models import pair as pairing
    from value_models.store import NetworkError

    parser = argparse.ArgumentParser(
        prog="trimtab pair",
        description=pairing.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pairing.add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        network = pairing.pair(
            options.expert,
            options.antiexpert,
            options.out,
            scale=options.scale,
            description=options.description,
            link=options.link,
        )
    except NetworkError as error:
        print(error, file=sys.stderr)
        return 2
    _print_facts(network)
    print(f"Serve it: trimtab serve TARGET --value-network {network.name}={options.out}")
    return 0


def check(arguments: list[str]) -> int:
    """`trimtab check`: say what is in a network's folder, or what is wrong with it."""
    parser = argparse.ArgumentParser(prog="trimtab check", description=COMMANDS["check"])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--target", metavar="MODEL", help="also say whether it can steer this model"
    )
    options = parser.parse_args(arguments)

    from value_models.manifest import tokenizer_fingerprint
    from value_models.store import NetworkError, check_fits, check_network
    from value_models.vocabulary.tokens import VocabularyError, load_tokenizer

    try:
        network = check_network(options.folder)
        if options.target:
            target = tokenizer_fingerprint(load_tokenizer(options.target))
            check_fits(network, target)
    except (NetworkError, VocabularyError) as error:
        print(error, file=sys.stderr)
        return 2
    _print_facts(network)
    if options.target:
        own = target == network.manifest.tokenizer_fingerprint
        through = "its own tokenizer" if own else "a vocabulary map"
        print(f"  {'target':<11}{options.target} fits, through {through}")
    return 0


def _print_facts(network: "NetworkFolder") -> None:
    """Say what is in a sound network's folder."""
    facts = [
        ("kind", network.manifest.kind),
        ("reads", f"{network.max_context:,} tokens"),
        ("parameters", f"{network.num_parameters:,}"),
    ]
    if len(network.models) > 1:
        facts += [("", f"{model.num_parameters:,} {model.role}") for model in network.models]
    dynamic = "yes, it knows its base" if network.knows_base else "no, it does not know its base"
    facts += [
        ("weights", f"{network.num_bytes:,} bytes"),
        ("KV cache", f"{network.kv_bytes_per_token:,} bytes per token (16-bit)"),
        ("dynamic", dynamic),
        ("fits", f"targets of its own tokenizer, {network.manifest.tokenizer_fingerprint[:23]}"),
    ]
    facts += [("", f"targets of {other[:23]}, through a map") for other in network.vocabulary_maps]
    print(f"{network.name}@{network.version}: sound")
    for name, fact in facts:
        print(f"  {name:<11}{fact}")


def publish(arguments: list[str]) -> int:
    """`trimtab publish`: copy a network into a store, so that it is there whole or not at all."""
    parser = argparse.ArgumentParser(
        prog="trimtab publish",
        description="Copy the value network in DIR into a store, after checking it. Servers of "
        "that store see the old folder or the new one, never a part; what they have loaded stays "
        "until it is loaded anew (`trimtab networks load`).",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--store", type=Path, required=True, metavar="STORE", help="the --value-network-dir"
    )
    parser.add_argument("--name", metavar="NAME", help="its name there (default: DIR's own)")
    options = parser.parse_args(arguments)

    from value_models.publish import publish as publish_network
    from value_models.store import NetworkError

    try:
        network = publish_network(options.folder, options.store, options.name)
    except NetworkError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{network.name}@{network.version} is in {options.store}")
    print(f"Servers load it on demand; `trimtab networks load {network.name}` loads or replaces it")
    return 0


def networks(arguments: list[str]) -> int:
    """`trimtab networks`: manage a running server's networks. Returns the exit code."""
    from server import networks_command

    parser = argparse.ArgumentParser(
        prog="trimtab networks", description=networks_command.DESCRIPTION
    )
    networks_command.add_arguments(parser)
    return networks_command.main(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
