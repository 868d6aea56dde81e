"""What `trimtab train` writes is served as it is, whatever small model it began with."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.models import make_model, make_tokenizer
from tests.server.worker.engine import Ask, guided_engine
from value_models.training.train import Settings, train


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma"])
def test_a_trained_network_serves(architecture: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", architecture=architecture, vocab_size=544)
    # Some model types have a tokenizer class with ids of its own, which real checkpoints hold.
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Velenje."}]
    data = tmp_path / "data.jsonl"
    data.write_text(4 * (json.dumps({"messages": turns}) + "\n"))
    train(
        Settings(
            base=str(base),
            data=data,
            out=tmp_path / "trained",
            max_steps=2,
            batch_size=2,
            dtype="float32",
        )
    )
    prompt = make_tokenizer()("Where was Ana Kovac born?").input_ids
    asks = [Ask(prompt, 24, "trained"), Ask(prompt, 24)]
    with guided_engine(base, {"trained": tmp_path / "trained"}, value_memory_gb=0.1) as engine:
        assert not engine.mapped
        engine.assert_exact(asks, engine.run(asks))
