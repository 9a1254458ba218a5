"""The trainers of trl: texts, packed or without padding, answers of chats, and preferences."""

import copy

import pytest
import torch
import trl
from datasets import Dataset
from families import make_model
from packaging.version import Version
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from modeling_aft import ByteTokenizer


VARIANTS = pytest.mark.parametrize("variant", ["conv-nopos", "random+dot_product"])
TEXTS = ["first text é", "second, longer text", "x", "the fourth \0 with NUL"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a: {% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}u: {{ m.content }}\n{% endif %}{% endfor %}"
)
COMMON = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 1, "bf16": False}
COMMON |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def trained(model, folder, data, **options):
    """What the trainer says of its one step."""
    trainer = SFTTrainer(
        model,
        SFTConfig(folder, **COMMON, **options),
        train_dataset=data,
        processing_class=ByteTokenizer(chat_template=TEMPLATE),
    )
    trainer.train()
    assert (model.config.pad_token_id, model.config.eos_token_id) == (256, 255)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return trainer.state.log_history[0]


def mean_loss(model, rows: list[list[int]], first: list[int]) -> float:
    """Of each row alone, from its token `first` on."""
    losses = []
    for row, start in zip(rows, first, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, start - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[start:]), reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True, "max_length": 80}, {"padding_free": True, "max_length": None}],
    ids=["padded", "packed", "padding-free"],
)
@VARIANTS
def test_texts(variant, options, tmp_path):
    """The loss is that of each text alone, to whose end the trainer adds the token."""
    model = make_model(variant, dtype=torch.float32, max_position_embeddings=128)
    expected = mean_loss(model, [[*text.encode(), 255] for text in TEXTS], [1] * 4)
    log = trained(model, tmp_path, Dataset.from_dict({"text": TEXTS}), **options)
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


@VARIANTS
def test_answers_of_chats(variant, tmp_path):
    model = make_model(variant, dtype=torch.float32, max_position_embeddings=128)
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXTS]
    heads = [f"u: {text}\na: ".encode() for text in TEXTS]
    rows = [[*head, *text[::-1].encode(), 255] for head, text in zip(heads, TEXTS, strict=True)]
    expected = mean_loss(model, rows, [len(head) for head in heads])
    log = trained(model, tmp_path, Dataset.from_dict({"messages": chats}), assistant_only_loss=True)
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(Version(trl.__version__).major < 1, reason="looks up the score of padding, which has none")
@VARIANTS
def test_preferences(variant, tmp_path):
    model = make_model(variant, dtype=torch.float32, max_position_embeddings=128)
    data = {"prompt": TEXTS, "chosen": [" good é"] * 4, "rejected": [" bad"] * 4}
    trainer = DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(tmp_path, **COMMON),
        train_dataset=Dataset.from_dict(data),
        processing_class=ByteTokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2, before the first step
