"""What has to hold on a CUDA device as well. Skipped where there is none."""

import pytest
import torch
from families import VARIANTS, make_ids, make_model

from aft.commands.pretrain import main as pretrain
from modeling_aft.ops import aft_attention


pytestmark = pytest.mark.gpu
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", ["full", "local", "simple", "conv", "conv-decay"])
def test_operator_matches_float64_on_the_cpu(form, dtype):
    length, width = 300, 64
    query, key, value = torch.randn(3, 2, length, width)
    bias = {
        "full": {"position_bias": torch.randn(length, length)},
        "local": {"window_bias": torch.randn(1, length, 9)},
        "simple": {},
        "conv": {"window_bias": torch.randn(8, 1, 9)},
        "conv-decay": {"window_bias": torch.randn(8, 1, 9), "decay": torch.logspace(-3, -0.5, 8)},
    }[form]
    key = key[..., :8] if "conv" in form else key
    inputs = [t.to(dtype) for t in (query, key, value)]
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        tensors = [t.to(device, kind).requires_grad_() for t in (*inputs, *(b.to(dtype) for b in bias.values()))]
        out = aft_attention(*tensors[:3], **dict(zip(bias, tensors[3:], strict=True)))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for expected, actual in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance * scale)


@variants
def test_decoding_on_the_device(variant):
    model, ids = make_model(variant).cuda(), make_ids(12).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    on_cpu = model(ids, attention_mask=mask).logits.cpu()
    torch.testing.assert_close(model.cpu()(ids.cpu(), attention_mask=mask.cpu()).logits, on_cpu)


@variants
def test_training_step_compiles_with_inductor(variant):
    torch._dynamo.reset()
    model, ids = make_model(variant, dtype=torch.float32).cuda(), make_ids(40).cuda()
    loss = torch.compile(lambda ids: model(ids, labels=ids, use_cache=False).loss, fullgraph=True)(ids)
    loss.backward()
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preset", ["aft-conv-tiny", "transformer-tiny"])
def test_pretraining_in_bf16(preset, tmp_path):
    pytest.importorskip("datasets", reason="needs the extra train")
    flags = ["--model_preset", f"configuration/models/{preset}.json", "--mixed_precision", "bf16", "--max_steps", "8"]
    flags += ["--sequence_length", "64", "--batch_size", "4", "--warmup_steps", "2", "--eval_bytes", "1000"]
    assert pretrain([*flags, "--output_dir", str(tmp_path / "run")])["test_bits_per_byte"] < 9
