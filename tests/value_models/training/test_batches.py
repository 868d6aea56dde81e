import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from value_models.training import TrainingError
from value_models.training.batches import Collator, PackCollator, Packs, check_separation
from value_models.training.data import IGNORED, Example, Examples
from value_models.training.objective import guide

A = Example([1, 2, 3], [IGNORED, 2, 3])
B = Example([4, 5], [4, 5])
C = Example([6], [6])


def test_batches_are_padded_on_the_right_without_labels():
    batch = Collator(pad_token_id=7)([A, Example([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_pack_begins_anew_with_each_example():
    batch = PackCollator(pad_token_id=7)([[A, B], [C]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 7, 7, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    # The label 4 would be predicted from the example before it.
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5], [IGNORED] * 5]
    assert set(batch) == {"input_ids", "position_ids", "labels"}


def test_packs_hold_every_example_once_and_never_too_much():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 41, (200,), generator=generator).tolist()
    examples = Examples(Example([i] * length, [i] * length) for i, length in enumerate(lengths))
    packs = Packs(examples, max_length=40)
    rows = [packs[row] for row in range(len(packs))]
    assert sorted(e.input_ids[0] for row in rows for e in row) == list(range(200))
    assert max(sum(len(e.input_ids) for e in row) for row in rows) <= 40
    assert len(rows) < 1.1 * sum(lengths) / 40


def small_model(architecture: str, **more):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 50,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape | more))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)  # else all logits are nearly equal, whatever was attended to
    return model.eval()


ARCHITECTURES = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 4}),
    ("gemma2", {"sliding_window": 4}),
    ("gemma3_text", {"sliding_window": 4}),
    ("phi3", {}),
    ("gpt2", {}),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("architecture", "more"), ARCHITECTURES)
@torch.inference_mode()
def test_packed_examples_lose_what_they_lose_alone(architecture, more, attention):
    model = small_model(architecture, attn_implementation=attention, **more)
    check_separation(model)
    generator = torch.Generator().manual_seed(1)
    examples = Examples()
    for length in (5, 9, 12, 7, 3, 20, 11):
        tokens = torch.randint(3, 50, (length,), generator=generator).tolist()
        examples.append(Example(tokens, [IGNORED, IGNORED, *tokens[2:]]))
    packs = Packs(examples, max_length=32)
    rows = [packs[row] for row in range(len(packs))]
    assert max(map(len, rows)) > 1

    losses = []
    for batch in (PackCollator(0)(rows), Collator(0)([e for row in rows for e in row])):
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        losses.append(guide(torch.zeros_like(logits), logits, labels).cross_entropy)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)


def test_models_that_mix_packed_examples_are_refused():
    with pytest.raises(TrainingError, match="opt cannot keep packed conversations apart"):
        check_separation(small_model("opt", ffn_dim=64, word_embed_proj_dim=32))
