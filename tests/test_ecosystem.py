"""What acts on a loaded model from outside: adapters, offloading, quantization, the Trainer's switches, copies."""

import copy
import pickle
import re

import pytest
import torch
import torch._dynamo.utils
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.state import AcceleratorState
from families import LIMIT, VARIANTS, make_config, make_ids, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_aft import ByteTokenizer


FEW = ["local", "conv", "full", "dense", "dense+dot_product"]
few = pytest.mark.parametrize("variant", FEW)
IDS = make_ids(12)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def make_float(variant, **changes):
    return make_model(variant, dtype=torch.float32, **changes)


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def relative_error(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


def weight_files(folder):
    return {path.name for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")}


# Adapters

HEADS = {
    "CAUSAL_LM": (AutoModelForCausalLM, {}, IDS),
    "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 3}, torch.tensor([0, 2])),
}
TARGETS = {"names": ["qkv_proj", "up_proj"], "all-linear": "all-linear"}


def with_lora(model, task="CAUSAL_LM", targets="all-linear", **changes):
    return get_peft_model(model, LoraConfig(task_type=task, r=4, target_modules=targets, **changes))


def train(model, labels, steps=12):
    """Trains on one batch; returns the loss before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("task", HEADS)
@few
def test_lora_is_trained_saved_loaded_and_merged(variant, task, targets, tmp_path):
    auto_class, options, labels = HEADS[task]
    base = save(make_float(variant), tmp_path / "base")
    model = auto_class.from_pretrained(base, **options)
    before = model(IDS).logits
    model = with_lora(model, task, targets)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or ".score." in name for name in trained)

    losses = train(model, labels)
    assert losses[-1] < 0.8 * losses[0]
    expected = model(IDS).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "adapter")
    assert weight_files(tmp_path / "adapter") == {"adapter_model.safetensors"}

    # The score of a classifier is new, and another one, in each model that is made from the language model.
    loaded = PeftModel.from_pretrained(auto_class.from_pretrained(base, **options), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    again = auto_class.from_pretrained(save(merged, tmp_path / "merged"))
    torch.testing.assert_close(again(IDS).logits, merged(IDS).logits, rtol=0, atol=0)


@few
def test_generation_through_lora_uses_the_cache(variant):
    plain = make_float(variant)
    model = with_lora(copy.deepcopy(plain), init_lora_weights=False).eval()
    text = model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)
    assert not torch.equal(text, plain.generate(IDS, attention_mask=MASK, **GREEDY))
    assert torch.equal(text, model.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **GREEDY))
    assert torch.equal(text, model.merge_and_unload().generate(IDS, attention_mask=MASK, **GREEDY))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@few
def test_lora_has_the_same_gradients_under_gradient_checkpointing(variant, reentrant):
    model = with_lora(make_float(variant), init_lora_weights=False).train()
    calls, gradients = [], []
    model.base_model.model.model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 3  # once, and then once more in the backward pass
    assert gradients[0] and all("lora_" in name for name in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("variant", "tables"),
    [(v, "position_bias") for v in ("local", "conv", "full")]
    + [(v, v.split("+")[0].replace("-", "_")) for v in ("dense", "random", "dense+dot_product", "factorized-random")],
)
def test_what_is_not_linear_can_be_trained_beside_lora(variant, tables, tmp_path):
    model = with_lora(make_float(variant), modules_to_save=[tables])
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
    train(model, IDS)
    assert before and not any(torch.equal(model.get_parameter(name), table) for name, table in before.items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_float(variant), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    torch.testing.assert_close(loaded.merge_and_unload()(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


# Offloading: the weights of a module are there only while its forward runs.


def placement(model, blocks, rest="cpu"):
    names = ["model.embed_tokens", "model.embed_positions", "model.norm", "lm_head"]
    if model.model.embed_positions is None:
        names.remove("model.embed_positions")
    return dict.fromkeys(names, rest) | {f"model.layers.{index}": where for index, where in enumerate(blocks)}


@torch.no_grad()
def assert_same(found, expected, **options):
    """Equal logits, and equal text, with padding, bit for bit."""
    logits = (model(IDS, attention_mask=MASK).logits[MASK.bool()] for model in (found, expected))
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    texts = (model.generate(IDS, attention_mask=MASK, **GREEDY, **options) for model in (found, expected))
    assert torch.equal(*texts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_on_the_disk(variant, tmp_path):
    plain = make_float(variant)
    model = AutoModelForCausalLM.from_pretrained(
        save(plain, tmp_path / "model"),
        device_map=placement(plain, ["cpu", "disk"]),
        offload_folder=tmp_path / "offload",
    )
    assert model.model.layers[1].mixer.qkv_proj.weight.is_meta
    assert_same(model, plain)
    assert_same(model, plain, num_beams=3)
    # Rolling back computes a state anew, outside of the forward that made it.
    prompt = IDS[:1].repeat(1, 2)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), plain.generate(prompt, **GREEDY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@few
def test_device_map_auto_fills_the_memory_with_whole_blocks(variant, tied, dtype, tmp_path):
    folder = save(make_float(variant, num_hidden_layers=4, tie_word_embeddings=tied), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    memory = {"cpu": int(0.8 * plain.get_memory_footprint())}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    places = {name: place for name, place in model.hf_device_map.items() if "layers" in name}
    assert set(places.values()) == {"cpu", "disk"}
    assert all(re.fullmatch(r"model\.layers\.\d", name) for name in places)
    assert_same(model, plain)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "again")).state_dict(), plain.state_dict()
    )


OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, "cpu", offload_buffers=True),
    "disk_offload": lambda model, folder: disk_offload(model, folder, "cpu", offload_buffers=True),
    "dispatch_model": lambda model, folder: dispatch_model(
        model, placement(model, ["disk", "cpu"]), main_device="cpu", offload_dir=folder, offload_buffers=True
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("variant", [*FEW, "fixed-random"])
def test_accelerate_offloads_a_model_in_memory(variant, offload, tmp_path):
    plain = make_float(variant)
    model = offload(copy.deepcopy(plain), tmp_path)
    assert model.model.layers[0].mixer.qkv_proj.weight.is_meta
    assert_same(model, plain)


# Int8 weights


def quantized_in_memory(model, folder):
    model = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def quantized_on_loading(model, folder):
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(save(model, folder), quantization_config=config)


@pytest.mark.parametrize("quantized", [quantized_in_memory, quantized_on_loading], ids=["in-memory", "on-loading"])
@few
@torch.no_grad()
def test_int8_weights_differ_by_their_rounding_alone(variant, quantized, tmp_path):
    plain = make_float(variant)
    model = quantized(plain, tmp_path)
    rounded, count = copy.deepcopy(plain), 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter:
            exact, found = rounded.get_submodule(name), module.weight.dequantize()
            half_a_step = exact.weight.abs().amax(1, keepdim=True) / 127 / 2
            assert ((found - exact.weight).abs() <= 1.001 * half_a_step).all()
            exact.weight = torch.nn.Parameter(found)
            count += "layers" in name
    linear = [m for m in plain.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert count == len(linear) >= 8
    torch.testing.assert_close(model(IDS).logits, rounded(IDS).logits, rtol=1e-4, atol=1e-4)
    # Half a step is at most 0.4 % of the largest weight of a row; a dozen such matrices follow on each other.
    assert 0 < relative_error(model(IDS).logits, plain(IDS).logits) < 0.03
    text = model.generate(IDS, attention_mask=MASK, **GREEDY)
    assert torch.equal(text, model.generate(IDS, attention_mask=MASK, use_cache=False, **GREEDY))


@few
def test_int8_weights_are_saved_as_safetensors_and_load(variant, tmp_path):
    model = quantized_on_loading(make_float(variant), tmp_path / "plain")
    model.save_pretrained(tmp_path / "int8")
    assert weight_files(tmp_path / "int8") == {"model.safetensors"}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "plain")]
    assert sizes[0] < sizes[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert type(loaded.model.layers[0].mixer.qkv_proj.weight) is type(model.model.layers[0].mixer.qkv_proj.weight)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)


# Files


@few
def test_shards_are_safetensors_and_load(variant, tmp_path):
    model = make_float(variant)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    files = weight_files(tmp_path)
    assert len(files) > 3 and all(name.endswith(".safetensors") for name in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Takes back what a Trainer sets for the rest of the process."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run_trainer(model, folder, **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in make_ids(16, batch=8)]
    Trainer(model, arguments, train_dataset=rows).train()
    return model.eval()


SWITCHES = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


LABELS_OF_TOKENS = {
    "causal": (AutoModelForCausalLM, "CAUSAL_LM"),
    "masked": (AutoModelForMaskedLM, None),
    "token": (AutoModelForTokenClassification, "TOKEN_CLS"),
}


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("remote", [False, True], ids=["package", "remote-code"])
@pytest.mark.parametrize(("auto_class", "task"), LABELS_OF_TOKENS.values(), ids=LABELS_OF_TOKENS)
@pytest.mark.parametrize("variant", ["local", "dense"])
def test_smoothed_labels_are_those_of_the_loss(variant, auto_class, task, remote, lora, fresh_accelerate, tmp_path):
    """The trainer shifts labels where a model does, by the name of its class."""
    is_causal = auto_class is AutoModelForCausalLM
    config = make_config(variant, is_decoder=is_causal, num_labels=256, initializer_range=0.4)
    model = auto_class.from_config(config).eval()
    if remote:
        folder = save(model, tmp_path / "model")
        reference = model.config.auto_map[auto_class.__name__]
        model = get_class_from_dynamic_module(reference, folder).from_pretrained(folder)
    if lora:
        model = with_lora(model, task, ["qkv_proj"]).eval()
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[0, 4] = -100  # which a causal model would predict from padding
    settings = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    with torch.no_grad():
        found = Trainer(model, settings).compute_loss(model, dict(inputs))
        output = model(**inputs)
    logits, labels = (output.logits[:, :-1], labels[:, 1:]) if is_causal else (output.logits, labels)
    uniform = -logits.log_softmax(-1).mean(-1)[labels != -100].mean()
    torch.testing.assert_close(found, 0.9 * output.loss + 0.1 * uniform)


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("variant", ["conv", "dense+dot_product"])
def test_switches_of_the_trainer_change_no_weight(variant, switch, fresh_accelerate, tmp_path):
    before, plain, switched = (make_float(variant) for _ in range(3))
    run_trainer(plain, tmp_path / "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_trainer(switched, tmp_path / "switched", **switch)
    assert (torch._dynamo.utils.counters["frames"]["ok"] > 0) == ("torch_compile" in switch)
    assert relative_error(plain(IDS).logits, before(IDS).logits) > 0.01
    torch.testing.assert_close(switched.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)
    # The optimizer and the random state stand beside the weights in files of their own, by the Trainer's names.
    found = tmp_path / "switched" / "checkpoint-3"
    others = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert weight_files(found) == {"model.safetensors", *others}
    loaded = AutoModelForCausalLM.from_pretrained(found)
    torch.testing.assert_close(loaded(IDS).logits, switched(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("variant", ["local", "dense+dot_product"])
def test_accelerate_saves_and_loads_the_state_of_training(variant, tied, safe, fresh_accelerate, tmp_path):
    def start():
        accelerator, model = Accelerator(cpu=True), make_float(variant, tie_word_embeddings=tied)
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def steps(accelerator, model, optimizer):
        for _ in range(2):
            accelerator.backward(model(IDS, labels=IDS).loss)
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    run = start()
    steps(*run)
    run[0].save_state(tmp_path, safe_serialization=safe)
    expected = steps(*run)
    run = start()
    run[0].load_state(tmp_path)
    torch.testing.assert_close(steps(*run), expected, rtol=0, atol=0)
    assert (run[1].lm_head.weight is run[1].model.embed_tokens.weight) == tied


# Copies, half precision, pipelines


@few
def test_a_model_can_be_copied_and_pickled(variant):
    model = make_float(variant)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert other.lm_head.weight is not model.lm_head.weight
        assert_same(other, model)


@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
@few
@torch.no_grad()
def test_a_copied_cache_is_a_conversation_of_its_own(variant, recording):
    model, other = make_model(variant), make_ids(6, seed=9)
    cache = model(IDS[:, :6], use_cache=True).cache
    if recording:
        cache.activate_past_recording()
        model(other[:, :3], cache=cache)
    fork = copy.deepcopy(cache)
    if recording:
        fork.crop(-3)
        cache.crop(-3)
    for past, ids in ((fork, other), (cache, IDS[:, 6:])):
        parts = [model(part, cache=past).logits for part in ids.split([4, 1, 1], 1)]
        whole = model(torch.cat([IDS[:, :6], ids], 1), use_cache=False).logits
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, 6:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (make_ids(LIMIT), f"max_position_embeddings={LIMIT}"),
        (make_ids(4, batch=1), "`cache` must hold a batch"),
        (make_ids(4, batch=3), "`cache` must hold a batch"),
    ],
    ids=["too-long", "smaller-batch", "larger-batch"],
)
@few
@torch.no_grad()
def test_a_refused_input_leaves_the_cache_as_it_was(variant, wrong, message):
    model = make_model(variant)
    cache = model(IDS[:, :6], use_cache=True).cache
    with pytest.raises(ValueError, match=message):
        model(wrong, cache=cache)
    logits = model(IDS[:, 6:], cache=cache).logits
    torch.testing.assert_close(logits, model(IDS, use_cache=False).logits[:, 6:])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str)
@few
@torch.no_grad()
def test_half_precision_generates_what_float32_scores(variant, dtype, bound):
    """The bounds are a few times the unit roundoff, 0.4 % and 0.05 %."""
    plain = make_float(variant)
    model = copy.deepcopy(plain).to(dtype)
    output = model.generate(IDS, **GREEDY, output_logits=True, return_dict_in_generate=True)
    steps, expected = torch.stack(output.logits, 1), plain(output.sequences).logits[:, IDS.shape[1] - 1 : -1]
    assert steps.shape == expected.shape and model.dtype is dtype
    assert relative_error(steps, expected) < bound


@few
def test_a_text_pipeline_says_the_same_in_a_batch(variant):
    generate = pipeline("text-generation", model=make_float(variant), tokenizer=ByteTokenizer())
    prompts = ["a", "hello there", "some words"]
    options = {"max_new_tokens": 6, "do_sample": False}
    together = generate(prompts, batch_size=3, **options)
    assert together == [generate(prompt, **options) for prompt in prompts]
    assert all(len(row[0]["generated_text"]) > len(p) for row, p in zip(together, prompts, strict=True))
