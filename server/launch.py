"""vLLM's server as trimtab's child process: `python -m server.launch <flags of vllm serve>`.

Everything that can be refused is refused here, by vLLM's own reading of its flags, before anything
loads. What the parent needs to know goes to it as one line of JSON on the file descriptor that
`REPORT_FD` names: a `Launched`, or a `Refused`.
"""

import ctypes
import os
import shutil
import signal
import sys
import sysconfig
from argparse import ArgumentParser, Namespace
from importlib.metadata import entry_points
from pathlib import Path
from secrets import token_hex
from typing import Any, NoReturn

from pydantic import BaseModel

from server.settings import Settings
from value_models.manifest import tokenizer_fingerprint
from value_models.store import NetworkError, NetworkFolder, Store, check_fits, check_network
from value_models.vocabulary.reading import Reader
from value_models.vocabulary.tokens import VocabularyError, load_tokenizer

MODULE = "server.launch"
REPORT_FD = "TRIMTAB_REPORT_FD"
SHUTDOWN_SECONDS = 30
CPU_KV_CACHE_GB = 2
EXAMPLE = "Hello!"


class LaunchError(ValueError):
    """A flag or a setting of the environment that cannot be honoured."""


class Refused(BaseModel):
    """The server is not started, and why."""

    refused: str


class Launched(BaseModel):
    """A server that is about to load: where it will be, and what it will serve."""

    url: str
    uds: str | None
    key: str
    target: str
    networks: dict[str, str]
    """name -> a line about it."""
    chats: bool
    """Whether the target has a chat template."""
    example_model: str
    """A model to try, and something to say to it."""
    example: str
    shutdown_timeout: int
    notes: list[str]
    """What a person should know besides."""


def add_options(parser: ArgumentParser) -> None:
    """Add the flags that are trimtab's own."""
    group = parser.add_argument_group("value networks")
    group.add_argument(
        "--value-network",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="serve the value network in DIR under NAME; may be given again",
    )
    group.add_argument(
        "--value-network-dir",
        metavar="DIR",
        help="serve every value network in DIR under its folder's name",
    )
    group.add_argument(
        "--value-cache-gb",
        type=float,
        default=Settings.model_fields["value_cache_gb"].default,
        metavar="GB",
        help="memory for all value networks' KV cache, in GiB per worker (default: %(default)s)",
    )
    group.add_argument(
        "--max-body-mb",
        type=float,
        default=Settings.model_fields["max_body_bytes"].default / 2**20,
        metavar="MB",
        help="largest request body, in MiB; larger ones get a 413 (default: %(default)g)",
    )


def main() -> None:
    """Check everything, then become vLLM's server."""
    _die_with_parent()
    try:
        args, launched = prepare(sys.argv[1:])
    except (NetworkError, LaunchError) as error:
        _report(Refused(refused=" ".join(str(error).split())))
        raise SystemExit(2) from None
    _report(launched)

    from vllm.entrypoints.cli.serve import ServeSubcommand

    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


def _report(message: Refused | Launched) -> None:
    with os.fdopen(int(os.environ.pop(REPORT_FD)), "w") as parent:
        parent.write(message.model_dump_json())


def prepare(argv: list[str]) -> tuple[Namespace, Launched]:
    """Read the flags, check the networks against the target, and set the environment.

    Returns the arguments for vLLM's `serve`, and what the parent is told.

    Raises:
        LaunchError, NetworkError: what was asked for cannot be served.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from server.plugin import ENDPOINT_PLUGIN, LOGITS_PROCESSOR, WORKER_EXTENSION

    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["DO_NOT_TRACK"] = "1"
    os.environ["VLLM_PLUGINS"] = ",".join([*_wanted_plugins(), ENDPOINT_PLUGIN])
    cli_env_setup()

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise LaunchError(message)

    parser = make_arg_parser(Parser(prog="trimtab serve"))
    add_options(parser)
    parser.set_defaults(host="127.0.0.1", shutdown_timeout=SHUTDOWN_SECONDS)
    args = parser.parse_args(argv)
    if args.model_tag is None and args.model == parser.get_default("model"):
        raise LaunchError("which model? `trimtab serve MODEL ...`, a folder or a Hugging Face id")
    args.model = args.model_tag = args.model_tag or args.model
    configure_logging_from_args(args)
    _refuse_flags(args)
    if current_platform.is_cpu() and args.kv_cache_memory_bytes is None:
        # vLLM would take most of the machine's memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GB))
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # it has another processor interface

    notes = _settle_compilation(args)
    networks = _check_networks(args)
    _refuse_taken_names(args, networks)
    tokenizer = _target_tokenizer(args)
    settings = Settings(
        networks={network.name: network.path for network in networks},
        key=token_hex(32),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        value_cache_gb=args.value_cache_gb,
        max_body_bytes=int(args.max_body_mb * 2**20),
    )
    for network in networks:
        _check_fits(network, settings.tokenizer_fingerprint)
    settings.export()
    # Guidance first: the user's own processors then see guided logits as the model's.
    args.logits_processors = [LOGITS_PROCESSOR, *(args.logits_processors or [])]
    args.worker_extension_cls = WORKER_EXTENSION
    chats = bool(args.chat_template or tokenizer.chat_template)
    return args, _describe(args, settings, networks, chats, notes)


def _die_with_parent() -> None:
    """Have the kernel end this process, gently, should the parent be killed."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wanted_plugins() -> list[str]:
    """Names of the vLLM plugins that would load without trimtab.

    vLLM loads every installed plugin while VLLM_PLUGINS is unset, but endpoint plugins only by
    name, and one name makes it filter all.
    """
    if "VLLM_PLUGINS" in os.environ:
        return [name for name in os.environ["VLLM_PLUGINS"].split(",") if name]
    groups = ("general", "platform", "io_processor", "stat_logger")
    return sorted({e.name for group in groups for e in entry_points(group=f"vllm.{group}_plugins")})


def _refuse_flags(args: Namespace) -> None:
    """Raise `LaunchError` for what would leave requests unguided, or break."""
    from vllm import envs

    unsupported = {
        "--pipeline-parallel-size": (
            args.pipeline_parallel_size > 1,
            "value networks need all layers in one worker; use --tensor-parallel-size",
        ),
        "--decode-context-parallel-size": (
            args.decode_context_parallel_size > 1,
            "value networks need whole rows in one worker; use --tensor-parallel-size",
        ),
        "--prefill-context-parallel-size": (
            args.prefill_context_parallel_size > 1,
            "value networks need whole rows in one worker; use --tensor-parallel-size",
        ),
        "--speculative-config": (
            bool(args.speculative_config or args.spec_method or args.spec_model),
            "draft tokens cannot be guided yet; leave it out",
        ),
        "--runner": (
            args.runner not in ("auto", "generate") or args.convert not in ("auto", "none"),
            "value networks steer generation; only --runner generate can be served",
        ),
        "--worker-extension-cls": (
            bool(args.worker_extension_cls),
            "vLLM has room for one worker extension, and trimtab is it",
        ),
        "--skip-tokenizer-init": (
            args.skip_tokenizer_init or args.tokens_only,
            "networks are checked against the target's tokenizer; leave it out",
        ),
        "--headless": (
            args.headless or args.nnodes > 1,
            "a server over several machines is not supported",
        ),
        "--data-parallel-multi-port-external-lb": (
            args.data_parallel_multi_port_external_lb,
            "it starts vLLM's servers without trimtab; run one `trimtab serve` per port",
        ),
        "--distributed-executor-backend": (
            args.distributed_executor_backend == "ray",
            "Ray's workers do not get trimtab's settings; use mp",
        ),
        "--grpc": (args.grpc, "value networks are chosen over HTTP"),
        "VLLM_SERVER_DEV_MODE": (
            envs.VLLM_SERVER_DEV_MODE,
            "it lets any client run code in the workers; unset it",
        ),
        "VLLM_USE_RUST_FRONTEND": (
            envs.VLLM_USE_RUST_FRONTEND,
            "the Rust frontend has no endpoint plugins; unset it",
        ),
        "VLLM_USE_V2_MODEL_RUNNER": (
            envs.VLLM_USE_V2_MODEL_RUNNER is True,
            "value networks run in the V1 model runner so far; unset it",
        ),
    }
    for flag, (given, reason) in unsupported.items():
        if given:
            raise LaunchError(f"{flag} cannot be honoured: {reason}")


def _settle_compilation(args: Namespace) -> list[str]:
    """Run uncompiled where vLLM could not compile and so not start. Returns what to say of it."""
    from vllm.platforms import current_platform

    compiler = os.environ.get("CXX", "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not current_platform.is_cpu() or args.enforce_eager:
        return []
    if shutil.which(compiler) and headers.exists():
        return []
    args.enforce_eager = True
    missing = f"{compiler} and " if not shutil.which(compiler) else ""
    return [
        f"Running uncompiled, somewhat slower: compiling needs {missing}Python's headers "
        "(Debian, Ubuntu: apt install g++ python3-dev)"
    ]


def _check_networks(args: Namespace) -> list[NetworkFolder]:
    """Check every network that the flags name. Raises `NetworkError` or `LaunchError`."""
    networks = []
    for option in args.value_network:
        name, given, folder = option.partition("=")
        if not given or not folder:
            raise LaunchError(f"--value-network {option}: write NAME=DIR, as in qa=./networks/qa")
        networks.append(check_network(Path(folder), name))
    if args.value_network_dir is not None:
        store = Store(args.value_network_dir)
        names = store.names()
        if not names:
            raise LaunchError(f"--value-network-dir {store.directory}: holds no value network")
        networks += [store.check(name) for name in names]
    return networks


def _check_fits(network: NetworkFolder, target_fingerprint: str) -> None:
    """Raise `NetworkError` or `LaunchError` if a network cannot steer this target."""
    check_fits(network, target_fingerprint)
    if _is_mapped(network, target_fingerprint):
        try:
            Reader.load(network.path, target_fingerprint)
        except VocabularyError as error:
            raise LaunchError(f"value network {network.name!r}: {error}") from error


def _is_mapped(network: NetworkFolder, target_fingerprint: str) -> bool:
    """Whether a network has another vocabulary than the target."""
    return network.manifest.tokenizer_fingerprint != target_fingerprint


def _refuse_taken_names(args: Namespace, networks: list[NetworkFolder]) -> None:
    taken = {name: "the target's" for name in args.served_model_name or [args.model]}
    taken |= {module.name: "a LoRA adapter's" for module in args.lora_modules or []}
    for network in networks:
        if network.name in taken:
            raise LaunchError(
                f"the value network's name {network.name!r} is {taken[network.name]} too; "
                "clients choose by name, so give it another"
            )
        taken[network.name] = "another value network's"


def _target_tokenizer(args: Namespace) -> Any:
    try:
        return load_tokenizer(
            args.tokenizer or args.model, args.tokenizer_revision or args.revision
        )
    except VocabularyError as error:
        raise LaunchError(f"the target's tokenizer: {error}") from error


def _describe(
    args: Namespace,
    settings: Settings,
    networks: list[NetworkFolder],
    chats: bool,
    notes: list[str],
) -> Launched:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
    scheme = "https" if args.ssl_certfile else "http"
    # A network may bring an example of what it is for.
    examples = [(n.name, n.manifest.example) for n in networks]
    target = (args.served_model_name or [args.model])[0]
    example_model, example = next((e for e in examples if e[1]), (examples or [(target, "")])[0])
    return Launched(
        url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}",
        uds=args.uds,
        key=settings.key,
        target=target,
        networks={
            network.name: _line(network, settings.tokenizer_fingerprint) for network in networks
        },
        chats=chats,
        example_model=example_model,
        example=example or EXAMPLE,
        shutdown_timeout=args.shutdown_timeout,
        notes=notes,
    )


def _line(network: NetworkFolder, target_fingerprint: str) -> str:
    return (
        f"{network.name}@{network.version}, {network.manifest.kind}, "
        f"{network.num_parameters:,} parameters"
        f"{', through a vocabulary map' if _is_mapped(network, target_fingerprint) else ''}"
    )


if __name__ == "__main__":
    main()
