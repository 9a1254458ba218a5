"""A saved folder carries its code: it loads, and computes the same, in a process without the package."""

import json

import pytest
import torch
from families import VARIANTS, make_ids, make_model, make_seq2seq, model_classes
from launching import run
from PIL import Image
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_aft import AFTImageProcessor, ByteTokenizer


WITHOUT_PACKAGE = """
import sys
sys.modules["modeling_aft"] = None  # importing it now fails, also where it is installed
"""
LOAD = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
trust = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, **trust)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
base = AutoModel.from_pretrained(folder, **trust)
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
assert "transformers_modules" in type(model).__module__
ids = torch.load(out + "/ids.pt")
made = model.generate(ids, max_new_tokens=8, do_sample=False)
model.save_pretrained(out + "/again")
loss = model.train()(ids, labels=ids).loss
loss.backward()
torch.save(dict(logits=model.eval()(ids).logits, hidden=base(ids).last_hidden_state, made=made,
                text=tokenizer("hé", return_tensors="pt").input_ids), out + "/result.pt")
"""


# What the models of both families carry, and those of one.
SHARED = """cache_files cache_state compatibility configuration_common continuous_batching modeling_causal_lm
modeling_heads modeling_linear modeling_stack modeling_text modeling_tokens ops_kernels ops_modes ops_operators
ops_packing ops_tokens refresh"""
AFT = """configuration_aft modeling_attention_free ops ops_chunks ops_cpu ops_full ops_grid ops_panel ops_reference
ops_state ops_step ops_triton ops_triton_full ops_windows triton_language triton_layouts"""
SYNTHESIZER = "configuration_synthesizer modeling_synthesizer ops_synthesizer"
SEQ2SEQ = """configuration_seq2seq configuration_{0}_seq2seq modeling_seq2seq modeling_seq2seq_heads
modeling_{0}_seq2seq"""


@pytest.mark.parametrize(("variant", "own"), [("conv", AFT), ("dense", SYNTHESIZER)], ids=["aft", "synthesizer"])
def test_a_model_carries_the_code_of_its_family_alone(variant, own, tmp_path):
    make_model(variant, dtype=torch.float32).save_pretrained(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.py")} == {*SHARED.split(), *own.split()}


LOAD_SEQ2SEQ = """
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoModelForTextEncoding
folder, out = sys.argv[1:]
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
encoder = AutoModelForTextEncoding.from_pretrained(folder, trust_remote_code=True)
assert "transformers_modules" in type(model.model.decoder).__module__
ids = torch.load(out + "/ids.pt")
made = model.generate(ids, max_new_tokens=4)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
assert classifier(ids.index_fill(1, torch.tensor([8]), classifier.config.eos_token_id)).logits.isfinite().all()
torch.save(dict(made=made, states=encoder(ids).last_hidden_state), out + "/result.pt")
"""


@pytest.mark.parametrize(("variant", "own"), [("conv", AFT), ("dense", SYNTHESIZER)], ids=["aft", "synthesizer"])
def test_an_encoder_decoder_loads_without_the_package(variant, own, tmp_path):
    model, ids, folder = make_seq2seq(variant, dtype=torch.float32), make_ids(9), tmp_path / "model"
    model.save_pretrained(folder)
    name = "aft" if own is AFT else "synthesizer"
    files = {path.stem for path in folder.glob("*.py")}
    assert files == {*SHARED.split(), *own.split(), *SEQ2SEQ.format(name).split()}
    torch.save(ids, tmp_path / "ids.pt")
    result = run_without_package(folder, tmp_path, LOAD_SEQ2SEQ)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "result.pt")
    assert torch.equal(found["made"], model.generate(ids, max_new_tokens=4))
    torch.testing.assert_close(found["states"], model.model.encoder(ids).last_hidden_state)


@pytest.mark.parametrize("variant", ["local", "random+dot_product"])
def test_two_copies_of_the_code_of_encoder_decoders_do_not_mix(variant, tmp_path):
    """`generate` makes the layers of its caches by their name, which the copy that was loaded last has."""
    model, ids = make_seq2seq(variant, dtype=torch.float32), make_ids(9)
    model.save_pretrained(tmp_path)
    copy = get_class_from_dynamic_module(model.config.auto_map["AutoModelForSeq2SeqLM"], tmp_path)
    assert copy is not type(model)
    other = copy.from_pretrained(tmp_path).eval()
    for settings in ({}, {"cache_implementation": "static", "disable_compile": True}):
        made = [one.generate(ids, max_new_tokens=4, **settings) for one in (model, other)]
        assert torch.equal(*made)


def run_without_package(folder, out, script=LOAD):
    return run(WITHOUT_PACKAGE + script, folder, out, cwd=out, HF_MODULES_CACHE=str(out / "modules"))


@pytest.mark.parametrize("variant", ["full", "conv-nopos", "fixed-random", "random+dot_product"])
def test_loads_without_the_package(variant, tmp_path):
    model, ids = make_model(variant, dtype=torch.float32), make_ids(12)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    torch.save(ids, tmp_path / "ids.pt")
    result = run_without_package(folder, tmp_path)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(found["logits"], model(ids).logits)
    torch.testing.assert_close(found["hidden"], model.model(ids).last_hidden_state)
    assert torch.equal(found["made"], model.generate(ids, max_new_tokens=8, do_sample=False))
    assert found["text"].tolist() == [list("hé".encode())]
    # What was saved there carries the code as well.
    assert {p.name for p in folder.glob("*.py")} == {p.name for p in (tmp_path / "again").glob("*.py")} | {
        "tokenization_bytes.py"
    }


LOAD_PICTURES = """
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.image_processing_auto import AutoImageProcessor
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert "transformers_modules" in type(processor).__module__
torch.manual_seed(0)
processor.postprocess(model.generate())[0].save(out + "/picture.png")
processor.save_pretrained(out + "/again")
"""


def test_a_model_of_pictures_loads_without_the_package(tmp_path):
    folder, processor = tmp_path / "model", AFTImageProcessor(size={"height": 4, "width": 4})
    model = make_model("local", vocab_size=257, bos_token_id=256)
    model.generation_config = processor.generation_config()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    result = run_without_package(folder, tmp_path, LOAD_PICTURES)
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    expected = processor.postprocess(model.generate())[0]
    assert Image.open(tmp_path / "picture.png").tobytes() == expected.tobytes()
    for saved in (folder, tmp_path / "again"):
        assert {"image_processing_aft.py", "preprocessor_config.json"} <= {path.name for path in saved.iterdir()}


def test_is_refused_without_trust(tmp_path):
    make_model("simple").save_pretrained(tmp_path / "model")
    script = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    result = run_without_package(tmp_path / "model", tmp_path, script)
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr


@pytest.mark.parametrize("with_head", [False, True], ids=["without-head", "with-head"])
@pytest.mark.parametrize(
    ("variant", "family", "module"),
    [("local", "AFT", "modeling_attention_free"), ("dense", "Synthesizer", "modeling_synthesizer")],
    ids=["aft", "synthesizer"],
)
def test_every_auto_class_is_named_whichever_class_saved(variant, family, module, with_head, tmp_path):
    make_model(variant, with_head).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"configuration_{family.lower()}.{family}Config",
        "AutoModel": f"{module}.{family}Model",
        **{
            f"AutoModelFor{head}": f"{module}.{family}For{head}"
            for head in ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification")
        },
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_checkpoint_without_the_head_loads_into_the_head(variant, tmp_path):
    base = make_model(variant, head=False, dtype=torch.float32)
    base.save_pretrained(tmp_path)
    loaded = model_classes(variant)[1].from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.model(make_ids(9)).last_hidden_state, base(make_ids(9)).last_hidden_state)
