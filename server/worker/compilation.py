"""torch.compile for value networks: once for all models of one architecture.

Compiling takes seconds, and a store may hold dozens of networks that differ in their weights alone.
vLLM's ahead-of-time compiled forward takes the module as its first argument and reads every weight
from it, so a model can run the forward that another of the same shape compiled, in this process or
in an earlier start.

Reads vLLM 0.32's `decorators._try_load_aot_compiled_fn` and `VllmConfig.compute_hash`, and
`torch.compiler`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch._inductor.config as inductor
from vllm import envs
from vllm.compilation import caching
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from server.worker import small_weights
from server.worker.graphs import GraphMemory

LAYER_PREFIX = "value_network"
"""Prefix of every model's layers: the names are constants of a compiled forward."""
ANY_FOLDER = "<any value network>"
"""Stands for a model's folder where vLLM looks for what it has compiled."""


def compilation_mode(target: VllmConfig) -> CompilationMode:
    """Compile where the target is compiled and this way of sharing was tried: on the CPU.

    Without ahead-of-time compilation, vLLM drops the guards that would keep the networks (and the
    target) apart; on CUDA, graphs rather than fusion take the launch overhead away.
    """
    config = target.compilation_config
    shareable = (
        config.mode == CompilationMode.DYNAMO_TRACE_ONCE
        and config.backend == "inductor"
        and envs.VLLM_USE_AOT_COMPILE
    )
    return config.mode if shareable else CompilationMode.NONE


def load_what_was_compiled() -> None:
    """Let vLLM load what it compiled in an earlier start: the target's forward, and networks'.

    vLLM 0.32 saves them, but on a CPU it never loads one, and compiles anew at each start: of what
    it has read it calls a method that only forwards of its own backend have, and here inductor's
    are used. There is nothing to do in that method.

    What was compiled for another CPU is not found: wider vectors would leave numbers out, silently.
    A cache may be on a volume, and vLLM does not ask; nor which kernel small weights were compiled
    for (`server/worker/small_weights.py`). On CUDA there is nothing to mend.
    """
    load, factors = torch.compiler.load_compiled_function, caching.aot_compile_hash_factors
    if not current_platform.is_cpu() or hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def load_compiled_function(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        forward = loaded._artifacts.compiled_fn
        if not hasattr(forward, "finalize_loading"):
            forward.finalize_loading = lambda config: None
        return loaded

    @wraps(factors)
    def aot_compile_hash_factors(config: VllmConfig) -> list[str]:
        cpu = torch.backends.cpu.get_cpu_capability(), sorted(torch.cpu.get_capabilities().items())
        ours = cpu, inductor.cpp_wrapper, small_weights.MAX_BYTES
        return [*factors(config), *map(str, ours)]

    torch.compiler.load_compiled_function = load_compiled_function
    caching.aot_compile_hash_factors = aot_compile_hash_factors


@contextmanager
def without_python() -> Iterator[None]:
    """Have inductor call one kernel after the other from C++, and not from Python.

    It refuses to (`InductorError`) where operations take other things than tensors and numbers.
    vLLM's attention takes a layer's name.
    """
    with inductor.patch(cpp_wrapper=True):
        yield


@contextmanager
def whatever_folder(config: VllmConfig) -> Iterator[None]:
    """Have vLLM look for a compiled forward without regard to the folder of the model.

    The folder is a copy, and another one in each start.
    """
    model = config.model_config
    described = {id(c): c for c in (model.hf_config, model.hf_text_config)}.values()
    folder, names = model.model, [c._name_or_path for c in described]
    model.model = ANY_FOLDER
    for c in described:
        c._name_or_path = ANY_FOLDER
    try:
        yield
    finally:
        model.model = folder
        for c, name in zip(described, names, strict=True):
            c._name_or_path = name


class CompiledForwards:
    """The compiled forwards of a worker, by architecture.

    Attributes:
        graphs: what the CUDA graphs of all models share.
    """

    def __init__(self) -> None:
        load_what_was_compiled()
        self.graphs = GraphMemory()
        self._forwards: dict[str, Any] = {}

    def knows(self, config: VllmConfig) -> bool:
        """Whether a model of the same architecture has compiled its forward."""
        return _architecture(config) in self._forwards

    def adopt(self, model: torch.nn.Module, config: VllmConfig) -> None:
        """Give `model` the forward of an earlier model of the same architecture, if any."""
        module = compiled_module(model)
        forward = self._forwards.get(_architecture(config))
        if module is not None and forward is not None:
            module.aot_compiled_fn = forward

    def keep(self, model: torch.nn.Module, config: VllmConfig) -> None:
        """Remember the forward that `model` compiled when it first ran."""
        forward = getattr(compiled_module(model), "aot_compiled_fn", None)
        if forward is not None:
            self._forwards.setdefault(_architecture(config), forward)


def compiled_module(model: torch.nn.Module) -> Any:
    """Return the part of a model that vLLM compiles, which has its forward; None: there is none."""
    wrappers = (m for m in model.modules() if isinstance(m, TorchCompileWithNoGuardsWrapper))
    return next((wrapper for wrapper in wrappers if not wrapper.do_not_compile), None)


def _architecture(config: VllmConfig) -> str:
    """Everything that shapes the compiled code, and nothing else: no path, no weights."""
    model = config.model_config
    described = model.hf_config.to_dict() | {"_name_or_path": None}
    return f"{model.dtype} {model.max_model_len} {sorted(described.items(), key=str)}"
