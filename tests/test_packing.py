"""Packed documents: several texts in a row, none of which sees another, however they are told apart."""

import pytest
import torch
from families import AFT_VARIANTS, VARIANTS, make_config, make_ids, make_model
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from modeling_aft.ops import aft_attention


variants = pytest.mark.parametrize("variant", VARIANTS)
directions = pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
LENGTHS = (5, 9, 1, 3, 17, 8)
DOCUMENTS = [make_ids(length, batch=1, seed=length) for length in LENGTHS]
FLAT = torch.cat(DOCUMENTS, 1)
BORDERS = torch.tensor([0, *LENGTHS]).cumsum(0)
NUMBERS = torch.arange(1, 7).repeat_interleave(torch.tensor(LENGTHS))[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
WAYS = {
    "position_ids": {"position_ids": POSITIONS},
    "seq_idx": {"seq_idx": NUMBERS.int()},
    "cu_seq_lens": {"cu_seq_lens_q": BORDERS.int(), "cu_seq_lens_k": BORDERS.int()},
    "numbered-mask": {"attention_mask": NUMBERS},
    "mask-of-ones-and-twos": {"attention_mask": NUMBERS % 2 + 1},
    "everything": {
        "position_ids": POSITIONS,
        "seq_idx": NUMBERS.int() - 1,
        "cu_seq_lens_q": BORDERS.int(),
        "cu_seq_lens_k": BORDERS.int(),
        "max_length_q": 17,
        "max_length_k": 17,
    },
}


def each_alone(model):
    return torch.cat([model(document, use_cache=False)[0] for document in DOCUMENTS], 1)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@directions
@variants
@torch.no_grad()
def test_each_document_is_as_if_alone(variant, is_decoder, way):
    model = make_model(variant, head=False, is_decoder=is_decoder)
    torch.testing.assert_close(model(FLAT, use_cache=False, **way).last_hidden_state, each_alone(model))


@directions
@variants
def test_gradients_are_those_of_each_alone(variant, is_decoder):
    model = make_model(variant, head=False, is_decoder=is_decoder)
    weight = torch.randn(1, FLAT.shape[1], 16, dtype=torch.float64)
    gradients = []
    for hidden in (model(FLAT, position_ids=POSITIONS, use_cache=False).last_hidden_state, each_alone(model)):
        model.zero_grad()
        (hidden * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


@directions
@variants
@torch.no_grad()
def test_rows_of_a_batch_with_padding(variant, is_decoder):
    """Two documents and padding before, between or behind in one row, one document in the other."""
    model = make_model(variant, head=False, is_decoder=is_decoder)
    ids, mask = make_ids(20), torch.zeros(2, 20, dtype=torch.long)
    mask[0, 2:9], mask[0, 11:18], mask[1, 3:] = 1, 2, 1
    mask[0, 5] = 0
    hidden = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    for row, places in ((0, mask[0] == 1), (0, mask[0] == 2), (1, mask[1] == 1)):
        alone = model(ids[row : row + 1, places], use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden[row : row + 1, places], alone)


@variants
@torch.no_grad()
def test_positions_of_each_document_may_begin_anywhere(variant):
    model = make_model(variant, head=False)
    positions = torch.cat([torch.arange(5) + 3, torch.arange(9), torch.tensor([0, 2, 3, 7])])[None]
    ids = make_ids(18, batch=1)
    hidden = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    for part in (slice(0, 5), slice(5, 14), slice(14, 18)):
        alone = model(ids[:, part], position_ids=positions[:, part], use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden[:, part], alone)


@variants
def test_the_loss_is_that_of_each_alone(variant):
    """What the end of a document would say of the first token of the next does not count, labelled or not."""
    model = make_model(variant)
    alone = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in DOCUMENTS if ids.shape[1] > 1]
    expected = sum(alone) / sum(length - 1 for length in LENGTHS)
    for way in ("position_ids", "seq_idx", "cu_seq_lens", "numbered-mask"):
        torch.testing.assert_close(model(FLAT, labels=FLAT, **WAYS[way]).loss, expected)
    batch = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": ids[0].tolist()} for ids in DOCUMENTS]
    )
    torch.testing.assert_close(model(**batch).loss, expected)


HEADS = {"masked": AutoModelForMaskedLM, "token": AutoModelForTokenClassification}


@pytest.mark.parametrize("auto_class", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("variant", ["full", "local", "simple", "conv", "dense", "random", "random+dot_product"])
def test_other_heads(variant, auto_class):
    torch.manual_seed(0)
    model = auto_class.from_config(make_config(variant, is_decoder=False, initializer_range=0.4)).double().eval()
    expected = torch.cat([model(ids).logits for ids in DOCUMENTS], 1)
    for way in WAYS.values():
        torch.testing.assert_close(model(FLAT, **way).logits, expected)


@pytest.mark.parametrize("variant", ["conv", "dense"])
def test_a_head_with_one_class_for_a_row_refuses_several_documents(variant):
    model = AutoModelForSequenceClassification.from_config(make_config(variant, is_decoder=False))
    with pytest.raises(ValueError, match="Packed documents .* a row gets one class"):
        model(FLAT, position_ids=POSITIONS)


@directions
@variants
@torch.no_grad()
def test_attentions_are_blocks(variant, is_decoder):
    model = make_model(variant, head=False, is_decoder=is_decoder)
    options = {"use_cache": False, "output_attentions": True}
    packed = model(FLAT, position_ids=POSITIONS, **options).attentions
    alone = [model(ids, **options).attentions for ids in DOCUMENTS]
    for layer, weights in enumerate(packed):
        for heads in range(weights.shape[1]):
            blocks = [attentions[layer].expand(1, weights.shape[1], -1, -1)[0, heads] for attentions in alone]
            torch.testing.assert_close(weights[0, heads], torch.block_diag(*blocks))


@variants
def test_packed_documents_have_no_cache(variant):
    model = make_model(variant)
    assert model(FLAT, position_ids=POSITIONS).cache is None
    with pytest.raises(ValueError, match="`use_cache` must be False for packed documents"):
        model(FLAT, position_ids=POSITIONS, use_cache=True)
    cache = model(FLAT[:, :4], use_cache=True).cache
    for given in (
        {"position_ids": torch.tensor([[4, 5, 0, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3]])},
        {"seq_idx": torch.tensor([[0, 0, 1, 1]])},
        {"attention_mask": torch.tensor([[1, 1, 2, 2]])},
    ):
        with pytest.raises(ValueError, match="Packed documents .* must be given without a past"):
            model(FLAT[:, 4:8], cache=cache, **given)


REFUSED = {
    "numbers-of-another-shape": ({"seq_idx": NUMBERS[:, 1:]}, r"`seq_idx` must be of shape \[1, 43\], got \[1, 42\]"),
    "numbers-that-are-floats": ({"seq_idx": NUMBERS.float()}, "`seq_idx` must be whole numbers, got torch.float32"),
    "borders-that-end-early": (
        {"cu_seq_lens_q": BORDERS[:-1], "cu_seq_lens_k": BORDERS[:-1]},
        r"`cu_seq_lens` must be \[0, ..., 43\]",
    ),
    "borders-of-keys-alone": ({"cu_seq_lens_k": BORDERS}, "cu_seq_lens_q.*cu_seq_lens_k.*the same"),
    "different-borders": ({"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS // 2}, "must be the same"),
    "negative-numbers": ({"attention_mask": NUMBERS - 2}, "`attention_mask` must be whole numbers of at least 0"),
    "fractions": ({"attention_mask": NUMBERS / 2}, "`attention_mask` must be whole numbers of at least 0"),
    "additive-mask": ({"attention_mask": -1e9 * (NUMBERS > 3)}, "whole numbers of at least 0.*-1e"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("variant", ["local", "dense"])
def test_what_does_not_fit_is_refused_by_name(variant, given, message):
    with pytest.raises(ValueError, match=message):
        make_model(variant)(FLAT, **given)


def test_a_compiled_model_refuses_them_loudly():
    model = make_model("local", dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    rising = POSITIONS.new_tensor(range(FLAT.shape[1]))[None]
    torch.testing.assert_close(compiled(FLAT, position_ids=rising).logits, model(FLAT).logits)
    with pytest.raises(RuntimeError, match="must rise in a compiled model"):
        compiled(FLAT, position_ids=POSITIONS)
    with pytest.raises(Exception, match="need a model that is neither compiled nor exported"):
        compiled(FLAT, seq_idx=NUMBERS)


# The operator by itself


@pytest.mark.parametrize("rows", ["", "rows-of-each-query"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", ["full", "local", "simple", "conv"])
def test_the_operator_agrees_with_the_reference(form, causal, rows):
    length, width, taps = 40, 8, 4 if causal else 7
    query, value = torch.randn(2, 2, length, width, dtype=torch.float64)
    key = torch.randn(2, length, 4 if form == "conv" else width, dtype=torch.float64)
    shapes = {"full": (length, length), "local": (1, length, taps), "conv": (4, 1, taps)}
    if rows:
        shapes = {"full": (2, length, length), "local": (1, 2, length, taps), "conv": (4, 2, length, taps)}
    bias = {}
    if form != "simple":
        name = "position_bias" if form == "full" else "window_bias"
        bias = {name: torch.randn(shapes[form], dtype=torch.float64)}
    seq_idx = torch.stack([torch.arange(length) // 13, torch.arange(length) // 30])
    mask = torch.ones(2, length)
    mask[0, 3:5], mask[0, 12:14], mask[1, -4:] = 0, 0, 0
    results = []
    for backend in ("reference", "torch"):
        leaves = [t.clone().requires_grad_() for t in (query, key, value, *bias.values())]
        named = dict(zip(bias, leaves[3:], strict=True))
        options = {"causal": causal, "attention_mask": mask, "seq_idx": seq_idx, "backend": backend}
        out = aft_attention(*leaves[:3], **named, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_one_document_in_each_row_is_the_ordinary_case():
    inputs = torch.randn(3, 2, 9, 4)
    seq_idx = torch.tensor([[4], [7]]).expand(2, 9)
    assert torch.equal(aft_attention(*inputs, seq_idx=seq_idx), aft_attention(*inputs))


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": make_ids(3 + 2 * index, batch=1, seed=index)[0].tolist()}


@pytest.mark.parametrize("variant", [v for v in AFT_VARIANTS if v in ("local", "conv")] + ["dense+dot_product"])
def test_trainer_without_padding_learns_what_it_learns_with_padding(variant, tmp_path):
    def pad(texts):
        length = max(len(text["input_ids"]) for text in texts)
        rows = [text["input_ids"] + [0] * (length - len(text["input_ids"])) for text in texts]
        mask = [[1] * len(text["input_ids"]) + [0] * (length - len(text["input_ids"])) for text in texts]
        ids, mask = torch.tensor(rows), torch.tensor(mask)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = -100  # as the collator does, so that Trainer counts the same labels
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    weights = []
    for collator in (DataCollatorWithFlattening(return_tensors="pt"), pad):
        model = make_model(variant, dtype=torch.float32, max_position_embeddings=64)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=Texts(), data_collator=collator).train()
        weights.append(model.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
