"""vLLM's server as trimtab's child process: `python -m server.launch <flags of vllm serve>`.

Everything that can be refused is refused here, by vLLM's own reading of its flags, before anything
loads. What the parent needs to know goes to it as one line of JSON on the file descriptor that
`REPORT_FD` names: a `Launched`, or a `Refused`.
"""

import ctypes
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from importlib.metadata import entry_points
from pathlib import Path
from secrets import token_hex
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from server import run_directory, zygote
from server.cpu import settle_cpu
from server.initial import LaunchError, Memory, copy_networks, plan
from server.lifecycle.folders import is_mapped
from server.lifecycle.staging import start_early
from server.settings import ADMIN_KEY_VARIABLE, Settings, instance_id, key_digest
from server.token_bytes import TokenBytes
from value_models.manifest import tokenizer_fingerprint
from value_models.store import NetworkError, NetworkFolder
from value_models.vocabulary.tokens import Vocabulary, VocabularyError, load_tokenizer

MODULE = "server.launch"
REPORT_FD = "TRIMTAB_REPORT_FD"
SHUTDOWN_SECONDS = 30
EXAMPLE = "Hello!"
FLAGS = {"max_body_bytes": "--max-body-mb", "max_networks": "--max-networks-per-request"}
"""Those that are not called as the setting that they decide."""


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
    run_dir: Path | None = None
    """To be removed when the server has ended."""


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
        help="a store of value networks, one folder each: those that were loaded when the server "
        "last ran, or at first all that fit, are served under their folders' names",
    )
    group.add_argument(
        "--value-memory-gb",
        type=float,
        default=Settings.model_fields["value_memory_gb"].default,
        metavar="GB",
        help="memory for the weights and KV cache of all value networks, in GiB per worker "
        "(default: %(default)g)",
    )
    group.add_argument(
        "--max-networks-per-request",
        type=int,
        default=Settings.model_fields["max_networks"].default,
        metavar="N",
        help="value networks that one request may combine, 1 to 8 (default: %(default)d)",
    )
    group.add_argument(
        "--no-load-on-demand",
        action="store_true",
        help="answer 404 to requests for a network that is in the store but not loaded",
    )
    group.add_argument(
        "--load-timeout",
        type=float,
        default=Settings.model_fields["load_timeout"].default,
        metavar="SECONDS",
        help="how long a request waits for a network that is loaded for it (default: %(default)g)",
    )
    group.add_argument(
        "--evict-idle",
        action="store_true",
        help="let a load that does not fit unload networks that nobody uses, longest idle first",
    )
    group.add_argument(
        "--state-file",
        metavar="FILE",
        help="remembers which networks of the store are loaded (default: one for this store, host "
        "and port, in $XDG_STATE_HOME/trimtab or ~/.local/state/trimtab)",
    )
    group.add_argument(
        "--admin-api-key",
        metavar="KEY",
        help="the key that opens /admin; without one it answers this machine only. The environment "
        f"variable {ADMIN_KEY_VARIABLE} keeps it out of the list of processes",
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
    die_with_parent(signal.SIGTERM)
    parent = int(os.environ.pop(REPORT_FD))
    zygote.start()
    try:
        args, launched = prepare(sys.argv[1:])
    except (NetworkError, LaunchError) as error:
        _report(parent, Refused(refused=" ".join(str(error).split())))
        raise SystemExit(2) from None
    _report(parent, launched)
    num_api_processes = args.api_server_count or args.data_parallel_size
    if num_api_processes == 1:  # then this process serves
        start_early(Settings.load())
    if num_api_processes == args.tensor_parallel_size * args.data_parallel_size == 1:
        zygote.use()
    else:
        zygote.stop()

    from vllm.entrypoints.cli.serve import ServeSubcommand

    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


def _report(descriptor: int, message: Refused | Launched) -> None:
    with os.fdopen(descriptor, "w") as parent:
        parent.write(message.model_dump_json())


def die_with_parent(death: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent has ended."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death)


def prepare(argv: list[str]) -> tuple[Namespace, Launched]:
    """Read the flags, check the networks against the target, and set the environment.

    Returns the arguments for vLLM's `serve`, and what the parent is told.

    Raises:
        LaunchError, NetworkError: what was asked for cannot be served.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from server.plugin import ENDPOINT_PLUGIN, LOGITS_PROCESSOR, WORKER_EXTENSION

    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["DO_NOT_TRACK"] = "1"
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*_wanted_plugins(), ENDPOINT_PLUGIN]))
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

    notes = [*settle_cpu(args), *_note_precision(args)]
    keys = _take_keys(args)
    taken = _taken_names(args)
    planned = plan(args, taken, notes)
    tokenizer = _target_tokenizer(args)
    settings = _settings(
        networks={},
        key=token_hex(32),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        store=planned.store and planned.store.directory,
        value_memory_gb=args.value_memory_gb,
        max_networks=args.max_networks_per_request,
        max_body_bytes=int(args.max_body_mb * 2**20),
        evict_idle=args.evict_idle,
        load_on_demand=not args.no_load_on_demand,
        load_timeout=args.load_timeout,
        state_file=planned.state_file,
        withheld=planned.withheld,
        **keys,
    )
    run_dir = _make_run_directory(settings)
    settings = settings.model_copy(update={"run_dir": run_dir})
    try:
        token_bytes = _write_token_bytes(run_dir, tokenizer)
        chosen = copy_networks(planned, settings, taken, _memory(args, settings), notes)
    except BaseException:
        run_directory.remove(run_dir)
        raise
    settings = settings.model_copy(
        update={
            "networks": {name: network.path for name, network in chosen.networks.items()},
            "sources": chosen.sources,
            "unloadable": chosen.unloadable,
            "token_bytes": token_bytes,
        }
    )
    settings.export()
    # Guidance first: the user's own processors then see guided logits as the model's.
    args.logits_processors = [LOGITS_PROCESSOR, *(args.logits_processors or [])]
    args.worker_extension_cls = WORKER_EXTENSION
    chats = bool(args.chat_template or tokenizer.chat_template)
    return args, _describe(args, settings, list(chosen.networks.values()), chats, notes)


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
        "--enable-batch-sharded-sampling": (
            bool(args.enable_batch_sharded_sampling),
            "value networks need all rows of a batch in each worker; leave it out",
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
    }
    for flag, (given, reason) in unsupported.items():
        if given:
            raise LaunchError(f"{flag} cannot be honoured: {reason}")


def _note_precision(args: Namespace) -> list[str]:
    """Say so where the target would run faster in another number format."""
    if args.dtype in ("float", "float32") or _itemsize(args) == 2:
        return []
    return [
        "This CPU has no instructions for half-precision numbers: --dtype float32 decodes large "
        "batches several times as fast, with twice the memory for the target"
    ]


def _itemsize(args: Namespace) -> int:
    """Bytes of a number in the networks' dtype."""
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    from server.worker.precision import network_dtype

    # "auto" is half precision for all checkpoints but those of a few models.
    target = STR_DTYPE_TO_TORCH_DTYPE["bfloat16" if args.dtype == "auto" else args.dtype]
    return network_dtype(target, current_platform.device_type).itemsize


def _settings(**fields: Any) -> Settings:
    try:
        return Settings(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        field = str(fault["loc"][0])
        flag = FLAGS.get(field, f"--{field.replace('_', '-')}")
        raise LaunchError(f"{flag} {fault['input']}: {fault['msg']}") from None


def _take_keys(args: Namespace) -> dict[str, Any]:
    """Return the digests of the keys, and leave the admin's where no log and no child finds it."""
    from vllm import envs

    admin_key = args.admin_api_key
    from_environment = os.environ.pop(ADMIN_KEY_VARIABLE, None)
    args.admin_api_key = None
    if admin_key == "":
        raise LaunchError("--admin-api-key is empty; leave it out, or give a key")
    admin_key = admin_key or from_environment
    client_keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if admin_key and admin_key in client_keys:
        raise LaunchError("--admin-api-key is a client's key too; clients must not manage networks")
    return {
        "admin_key_digest": key_digest(admin_key) if admin_key else None,
        "client_key_digests": tuple(map(key_digest, client_keys)),
    }


def _make_run_directory(settings: Settings) -> Path:
    # Checkpoints may have twice the bytes that they take in memory, and versions come and go.
    num_bytes = int(2 * settings.value_memory_gb * 2**30)
    try:
        return run_directory.create(instance_id(settings.key), num_bytes)
    except OSError as error:
        raise LaunchError(f"no directory for the server's own files can be made: {error}") from None


def _write_token_bytes(run_dir: Path, tokenizer: Any) -> Path | None:
    """Write down what the target's tokens spell; None if it cannot be told."""
    try:
        tokens = Vocabulary.of(tokenizer).tokens
    except VocabularyError:
        return None
    file = run_dir / run_directory.TOKEN_BYTES
    try:
        TokenBytes.write(file, tokens)
    except OSError as error:
        raise LaunchError(f"{file} cannot be written: {error}") from None
    return file


def _memory(args: Namespace, settings: Settings) -> Memory:
    total = int(settings.value_memory_gb * 2**30)
    return Memory(total, _itemsize(args), args.tensor_parallel_size, _target_context(args))


def _target_context(args: Namespace) -> int | None:
    """The longest context of the target in tokens; None if only vLLM can tell."""
    if isinstance(args.max_model_len, int) and args.max_model_len > 0:
        return args.max_model_len
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
        context = config.get_text_config().max_position_embeddings
    except Exception:  # of code in the checkpoint, of a format that is vLLM's own, ...
        return None
    return context if isinstance(context, int) else None


def _taken_names(args: Namespace) -> dict[str, str]:
    """Names that no value network may have -> whose they are."""
    taken = {name: "the target's" for name in args.served_model_name or [args.model]}
    return taken | {module.name: "a LoRA adapter's" for module in args.lora_modules or []}


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
        run_dir=settings.run_dir,
    )


def _line(network: NetworkFolder, target_fingerprint: str) -> str:
    models = "" if len(network.models) == 1 else f" in {len(network.models)} models"
    return (
        f"{network.name}@{network.version}, {network.manifest.kind}, "
        f"{network.num_parameters:,} parameters{models}"
        f"{', through a vocabulary map' if is_mapped(network, target_fingerprint) else ''}"
    )


if __name__ == "__main__":
    main()
