"""
The contract with transformers, in every release that is supported: what `generate` passes and reads, that another name
for it fails at import, that no argument of a forward pass is swallowed, and that nothing in use is about to go.
"""

import dataclasses
import inspect
import logging
import re
import runpy
import tomllib
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from families import VARIANTS, make_config, make_ids, make_model
from test_remote_code import run_without_package
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    StaticCache,
    Trainer,
    TrainingArguments,
    modeling_outputs,
    pipeline,
)

import modeling_aft
from aft.bits_per_byte import evaluate_bits_per_byte
from aft.protocols import Protocol
from aft.token_data import TokenData
from modeling_aft import ByteTokenizer, compatibility
from modeling_aft.compatibility import CACHE_NAME, CACHE_NAMES, NEWEST, OLDEST


ROOT = Path(__file__).parents[1]
OTHER_NAME = next(name for name in CACHE_NAMES if name != CACHE_NAME)
FAMILIES = ("full", "conv-nopos", "dense", "random+dot_product")
LABELS = {
    "ForCausalLM": torch.tensor([[1, 2, 3, 4]] * 2),
    "ForMaskedLM": torch.tensor([[-100, 2, -100, 4]] * 2),
    "ForSequenceClassification": torch.tensor([1, 0]),
    "ForTokenClassification": torch.tensor([[0, 1, 1, 0]] * 2),
}


# What `generate` passes to a model, and what it reads.


def test_the_installed_generate_uses_the_name_that_the_models_give():
    assert CACHE_NAME in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert CACHE_NAME in {field.name for field in dataclasses.fields(modeling_outputs.CausalLMOutputWithPast)}
    newer = transformers.__version__.split(".")[:2] >= ["5", "24"]
    assert CACHE_NAME == ("cache" if newer else "past_key_values")


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_of_generate_gets_the_cache_and_one_token(variant, mode):
    model, steps = make_model(variant, dtype=torch.float32), []

    def record(_, args, kwargs):
        assert not args and kwargs.get(OTHER_NAME) is None
        cache = kwargs[CACHE_NAME]
        steps.append((cache, int(cache.get_seq_length()), kwargs["input_ids"].shape[1]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    options = {"do_sample": False, "return_dict_in_generate": True, **MODES[mode]}
    made = model.generate(make_ids(6), max_new_tokens=4, eos_token_id=None, pad_token_id=0, **options)
    assert [step[1:] for step in steps] == [(0, 6), (6, 1), (7, 1), (8, 1)]
    returned = getattr(made, CACHE_NAME)
    assert all(cache is returned for cache, *_ in steps)
    assert type(returned) is (StaticCache if mode == "static" else DynamicCache)


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_cache_is_taken_by_either_name_and_not_by_both(variant):
    model, ids = make_model(variant), make_ids(7)
    expected = model(ids, use_cache=False).logits[:, -2:]
    for name in CACHE_NAMES:
        for head in (model, model.model):
            read = head(ids[:, :5], use_cache=True)
            assert read[CACHE_NAME] is read.cache and read.cache.get_seq_length() == 5
            out = head(ids[:, 5:], **{name: read.cache})
            assert out.cache is read.cache and out.cache.get_seq_length() == 7
            if head is model:
                torch.testing.assert_close(out.logits, expected)
        text = model.generate(ids, max_new_tokens=3, do_sample=False)
        cache = model(ids[:, :5], use_cache=True).cache
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, **{name: cache}), text)
    both = dict.fromkeys(CACHE_NAMES, cache)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="`cache` or as `past_key_values`"):
            call(ids, **both)


# Another release.

RENAMED = {
    "both": ("state", "state"),
    "what-is-passed": ("state", CACHE_NAME),
    "what-is-read": (CACHE_NAME, "state"),
    "one-of-the-two-alone": CACHE_NAMES,
}


def mixin(name: str) -> type:
    """With the method that takes what `generate` hands on, of which one argument is called `name`."""
    names = ("self", "input_ids", name)
    signature = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])

    def prepare_inputs_for_generation(*args, **kwargs):
        raise NotImplementedError

    prepare_inputs_for_generation.__signature__ = signature
    return type("Mixin", (), {"prepare_inputs_for_generation": prepare_inputs_for_generation})


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name_is_found(name):
    assert compatibility.cache_name(mixin(name), dataclasses.make_dataclass("Output", ["logits", name])) == name


@pytest.mark.parametrize(("passed", "read"), RENAMED.values(), ids=RENAMED)
def test_another_name_is_refused(passed, read, monkeypatch):
    allowed = f"transformers >= {OLDEST} and <= {NEWEST}"
    output = dataclasses.make_dataclass("Output", ["logits", read])
    with pytest.raises(ImportError, match="take the cache of `generate` as cache or past_key_values") as error:
        compatibility.cache_name(mixin(passed), output)
    assert transformers.__version__ in str(error.value) and allowed in str(error.value)
    # And so the module, which everything else imports, is not imported.
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", mixin(passed).prepare_inputs_for_generation)
    monkeypatch.setattr(modeling_outputs, "CausalLMOutputWithPast", output)
    with pytest.raises(ImportError, match=allowed):
        runpy.run_path(compatibility.__file__)


IMPORT_RENAMED = """
import sys
from transformers import AutoModelForCausalLM, GenerationMixin

def prepare_inputs_for_generation(self, input_ids, state=None, **kwargs):
    raise AssertionError("it must not come to this")

GenerationMixin.prepare_inputs_for_generation = prepare_inputs_for_generation
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print("refused:", error)
sys.path.insert(0, ROOT)
del sys.modules["modeling_aft"]
try:
    import modeling_aft
except ImportError as error:
    print("refused:", error)
"""


def test_neither_the_package_nor_a_folder_that_carries_its_code_loads_under_another_name(tmp_path):
    make_model("conv-nopos", dtype=torch.float32).save_pretrained(tmp_path / "model")
    done = run_without_package(tmp_path / "model", tmp_path, IMPORT_RENAMED.replace("ROOT", repr(str(ROOT))))
    assert done.returncode == 0, done.stderr
    assert len(re.findall("refused: These models take the cache of `generate` as", done.stdout)) == 2, done.stdout


@pytest.mark.parametrize(("version", "warns"), [(f"{NEWEST}.9", False), ("5.99.0", True), ("6.0.0.dev0", True)])
def test_a_release_that_was_not_tested_is_named(version, warns, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with complaints("was tested with") as found:
        runpy.run_path(compatibility.__file__)
    assert bool(found) == warns and all(version in line for line in found)


def test_the_tested_range_is_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    minor = int(NEWEST.split(".")[1])
    assert f"transformers>={OLDEST},<5.{minor + 1}" in project["dependencies"]
    for name, release in {"constraints.txt": NEWEST, "constraints-oldest.txt": OLDEST}.items():
        assert re.search(rf"^transformers=={re.escape(release)}\.", (ROOT / name).read_text(encoding="utf-8"), re.M)


# What else a forward pass is given.


def heads():
    """Each class of both families that has a forward pass, with the config of a small model of it."""
    found = []
    for prefix, variant in {"AFT": "conv-nopos", "Synthesizer": "dense"}.items():
        for suffix in ("Model", *LABELS):
            config = make_config(variant, is_decoder=suffix in ("Model", "ForCausalLM"))
            found.append(pytest.param(getattr(modeling_aft, prefix + suffix), config, id=prefix + suffix))
    return found


@pytest.mark.parametrize("keyword", ["state", "cache_params", "attention_masks", "lables"])
@pytest.mark.parametrize(("model_class", "config"), heads())
def test_an_unknown_keyword_is_named(model_class, config, keyword):
    with pytest.raises(TypeError, match=rf"{model_class.__name__}\.forward\(\) got unexpected .*\b{keyword}\b"):
        model_class(config)(make_ids(4), **{keyword: None})


@pytest.mark.parametrize(("model_class", "config"), heads())
def test_what_the_library_passes_is_known(model_class, config):
    model, ids = model_class(config).eval(), make_ids(4)
    options = {"output_hidden_states": True, "output_attentions": True, "attention_mask": torch.ones_like(ids)}
    labels = next((labels for suffix, labels in LABELS.items() if model_class.__name__.endswith(suffix)), None)
    if labels is not None:  # as Trainer does
        options |= {"labels": labels, "num_items_in_batch": (labels != -100).sum()}
    out = model(ids, return_dict=True, **options)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2 and (labels is None or out.loss > 0)
    as_tuple = model(ids, return_dict=False, **options)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(out)


# What is about to go.


@contextmanager
def complaints(about: str):
    """The warnings and log lines in which a pattern is found, and all warnings of what will be dropped, as a list."""
    found = []

    class Collect(logging.Handler):
        def emit(self, record):
            if re.search(about, record.getMessage(), re.IGNORECASE):
                found.append(record.getMessage())

    collect = Collect()
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate", "modeling_aft", "<run_path>")]
    transformers.utils.logging.warning_once.cache_clear()  # that an earlier test has heard it is no reason
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(collect)
        try:
            yield found
        finally:
            for logger in loggers:
                logger.removeHandler(collect)
            gone = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
            for warning in caught:
                if issubclass(warning.category, gone) or re.search(about, str(warning.message), re.IGNORECASE):
                    found.append(
                        warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno)
                    )


@contextmanager
def nothing_deprecated():
    with complaints("deprecat|will be removed|no longer supported") as found:
        yield
    # What assisted decoding says of the library itself, whatever the model.
    found = [line for line in found if not line.startswith("Passing `generation_config` together with")]
    assert not found, "\n".join(found)


GENERATE = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 2},
    "assisted": {"assistant_model": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked-prefill": {"prefill_chunk_size": 3},
    "without-a-cache": {"use_cache": False},
    "all-outputs": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "continued": {CACHE_NAME: True},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("variant", FAMILIES)
def test_generate_uses_nothing_that_goes(variant, options):
    model, ids = make_model(variant, dtype=torch.float32), make_ids(8, batch=1)
    options = {"do_sample": False, "max_new_tokens": 4, **options}
    if "assistant_model" in options:
        options["assistant_model"] = make_model("simple", dtype=torch.float32)
    with nothing_deprecated():
        if CACHE_NAME in options:
            options[CACHE_NAME] = model(ids[:, :4], use_cache=True).cache
        model.generate(ids, **options)


@pytest.mark.parametrize("variant", FAMILIES)
def test_training_and_saving_use_nothing_that_goes(variant, tmp_path):
    model = make_model(variant, dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in make_ids(8, batch=4).tolist()]
    with nothing_deprecated():
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=ByteTokenizer())
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        assert trainer.predict(rows).predictions.shape == (4, 8, 256)
        trainer.save_model(str(tmp_path / "model"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        text = pipeline("text-generation", model=loaded, tokenizer=ByteTokenizer.from_pretrained(tmp_path / "model"))
        assert text("hello", max_new_tokens=3, do_sample=False)


def test_scoring_uses_nothing_that_goes():
    model, text = make_model("conv-nopos", dtype=torch.float32), make_ids(100, batch=1)[0].numpy().astype("uint8")
    protocol = Protocol("carried", 8, stream_length=20)
    with nothing_deprecated():
        evaluate_bits_per_byte(model, TokenData.of_bytes(text.tobytes()), Accelerator(cpu=True), 1, 50, protocol, 2)
