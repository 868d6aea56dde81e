"""`trimtab train`: a value network from demonstrations, on a frozen base."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from value_models.store import NetworkError, NetworkFolder, check_network
from value_models.training import TrainingError
from value_models.training.batches import Collator, PackCollator, Packs, check_separation
from value_models.training.data import Demonstrations, Examples, load_demonstrations
from value_models.training.models import (
    check_reference,
    connect,
    context,
    has_fast_bfloat16,
    load_base,
    load_network,
    load_tokenizer,
)
from value_models.training.options import add_arguments, settings_from
from value_models.training.result import write_network
from value_models.training.resume import State
from value_models.training.settings import Settings
from value_models.training.source import source_name
from value_models.training.trainer import EventFiles, ValueTrainer

__all__ = ["Settings", "add_arguments", "main", "run", "train"]

NUM_MEASURED = 200
"""Demonstrations that the final metrics of what was trained on are taken from."""


def train(settings: Settings) -> NetworkFolder:
    """Train a network and write its folder, complete or not at all.

    The same settings after an interruption go on from the last checkpoint, which lies beside the
    folder until it is finished. Under `accelerate launch` all processes call this alike.

    Raises:
        TrainingError: nothing can be trained with these settings.
        NetworkError: the folder that was written does not pass the server's own checks.
    """
    settings.check()
    settings = replace(settings, precision=_precision(settings))
    state = State(settings)
    arguments = _trainer_arguments(settings, state)
    first = arguments.process_index == 0
    if state.is_finished():
        _wait_for_all(arguments)
        if first:
            state.remove()
        return check_network(state.out)

    if settings.base_device_map is not None and arguments.world_size > 1:
        raise TrainingError(
            "--base-device-map spreads the base of one process over all GPUs; with several "
            "processes, quantise the base instead"
        )
    if settings.reference:
        with arguments.main_process_first(local=False):
            check_reference(settings)
    tokenizer = load_tokenizer(settings)
    network = load_network(settings)
    dtype = getattr(torch, settings.precision)
    base = load_base(settings, dtype, arguments.device)
    max_length = min(settings.max_length, context(network), context(base))
    data = load_demonstrations(settings.data, tokenizer, max_length)
    examples, held_out, described = _hold_out(settings, data, tokenizer, max_length)
    if first:
        print(f"{source_name(settings.data)}: {data.report()}", file=sys.stderr)
    with arguments.main_process_first(local=False):
        state.claim([data.fingerprint, described.get("fingerprint")])

    pad_token_id = _padding(tokenizer)
    rows: Sequence[Any] = examples
    collator: Collator | PackCollator = Collator(pad_token_id)
    if settings.packing:
        check_separation(network)
        check_separation(base)
        rows, collator = Packs(examples, max_length), PackCollator(pad_token_id)
        if first:
            print(f"packed into {len(rows)} rows of {max_length} tokens", file=sys.stderr)
    connect(network, settings.kind)
    callbacks: list[TrainerCallback] = []
    if settings.log_dir is not None:
        callbacks.append(EventFiles(settings.log_dir))
    trainer = ValueTrainer(
        base=base,
        settings=settings,
        pad_token_id=pad_token_id,
        model=network,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=state.last_checkpoint())
    # Of the final weights, so that a run that was interrupted reports the same.
    metrics = {"demonstrations": trainer.measure(examples[:NUM_MEASURED]).named()}
    if held_out is not None:
        metrics["held_out"] = trainer.measure(held_out).named()
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if first:
        shutil.rmtree(state.unfinished, ignore_errors=True)
        write_network(
            state.unfinished,
            settings,
            trainer.accelerator.unwrap_model(trainer.model),
            weights,
            tokenizer,
            {
                "data": _described(source_name(settings.data), data),
                "held_out": described,
                "steps": trainer.state.global_step,
                "processes": arguments.world_size,
                "metrics": metrics,
            },
        )
        check_network(state.unfinished, name="unfinished")
        state.finish()
    _wait_for_all(arguments)
    return check_network(state.out)


def _hold_out(
    settings: Settings,
    data: Demonstrations,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[Examples, Examples | None, dict[str, Any]]:
    """What to train on, what to measure on, and what the manifest says about the latter."""
    if settings.held_out is not None:
        other = load_demonstrations(settings.held_out, tokenizer, max_length)
        return data.examples, other.examples, _described(source_name(settings.held_out), other)
    if settings.held_out_share:
        kept, rest = data.split(settings.held_out_share, settings.seed)
        return kept, rest, {"share": settings.held_out_share, "examples": len(rest)}
    return data.examples, None, {}


def _described(name: str, data: Demonstrations) -> dict[str, Any]:
    return {
        "file": name,
        "fingerprint": data.fingerprint,
        "conversations": data.num_conversations,
        "examples": len(data.examples),
        "response_tokens": data.examples.num_response_tokens,
        "dropped": dict(data.dropped),
    }


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked and carries no label: any id does where the tokenizer has none.
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def _wait_for_all(arguments: TrainingArguments) -> None:
    arguments.distributed_state.wait_for_everyone()


def _trainer_arguments(settings: Settings, state: State) -> TrainingArguments:
    held_out = settings.held_out is not None or settings.held_out_share > 0
    arguments = TrainingArguments(
        output_dir=str(state.folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=settings.precision == "bfloat16",
        seed=settings.seed,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=20,
        eval_strategy="steps" if held_out else "no",
        eval_steps=settings.held_out_steps,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        # Said aloud, because processes on CPUs would else not find each other.
        use_cpu=not torch.accelerator.is_available(),
    )
    # One process takes one GPU: with several, Trainer would copy the network at every step.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _precision(settings: Settings) -> str:
    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if has_fast_bfloat16() else "float32"


def main(args: argparse.Namespace) -> int:
    """Run `trimtab train` and return its exit code."""
    settings = settings_from(args)
    disable_progress_bar()  # of loading and saving, which would cut up that of training
    speaks = os.environ.get("RANK", "0") == "0"  # set by every launcher of several processes
    try:
        network = train(settings)
    except (TrainingError, NetworkError) as error:
        if speaks:
            print(f"trimtab train: {error}", file=sys.stderr)
        return 1
    if speaks:
        print(
            f"wrote {settings.out} ({network.num_parameters:,} parameters, version "
            f"{network.version}); serve it with --value-network {network.name}={settings.out}"
        )
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """`python -m value_models.training`."""
    parser = argparse.ArgumentParser(
        prog="python -m value_models.training", description="Train a value network."
    )
    add_arguments(parser)
    return main(parser.parse_args(arguments))
