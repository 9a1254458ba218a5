"""torch.export, torch.jit.trace, AOTInductor and ONNX: programs compute what the model does, at any size, without its
code."""

import copy
import functools

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from families import LIMIT, SYNTHESIZER_VARIANTS, make_config, make_ids, make_model
from launching import run
from torch.export import Dim
from transformers import GenerationConfig
from transformers.exporters.configs import DynamoConfig, OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.utils import decompose_for_generation

import modeling_aft
from modeling_aft.compatibility import CACHE_NAME
from modeling_aft.ops_panel import panel_for_export


EVERYTHING = "dense+random+factorized_dense+dot_product"
KINDS = ["full", "local", "simple", "conv", "dense", "random", "factorized-dense", EVERYTHING]
SIZES = [(1, 1), (3, 2), (1, 20), (2, LIMIT)]  # batch and length, none of which is the example's
# Rounding differs between the operations of a model and those of its export.
CLOSE = {"rtol": 0, "atol": 2e-5}
# Beside core ATen: what checks a program's inputs, which every runtime leaves out.
CHECKS = {torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default}


def small_model(variant, **changes):
    return make_model(variant, dtype=torch.float32, num_hidden_layers=1, **changes)


def with_head(variant, head, is_decoder):
    family = "Synthesizer" if variant in SYNTHESIZER_VARIANTS else "AFT"
    torch.manual_seed(0)
    config = make_config(variant, is_decoder=is_decoder, num_hidden_layers=1, initializer_range=0.4)
    return getattr(modeling_aft, f"{family}For{head}")(config).eval()


def padded(batch, length):
    """Inputs with padding on the left, on the right and inside, but for one token."""
    ids = make_ids(length, batch)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    mask[-1, length // 2 + 1 :] = 0
    mask[:, length // 3] = int(length < 3)
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(sizes, masked):
    return [padded(*size) if masked else {"input_ids": make_ids(*reversed(size))} for size in sizes]


def export(model, masked=True, strict=False):
    """The program for any batch, and any length that the model has positions for."""
    inputs = padded(2, 9) if masked else {"input_ids": make_ids(9)}
    shape = {0: Dim("batch"), 1: Dim("length", max=LIMIT)}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape), strict=strict)


def assert_equal(program, model, masked=True):
    exported = program.module() if isinstance(program, torch.export.ExportedProgram) else program
    for inputs in inputs_of(SIZES, masked):
        with torch.no_grad():
            torch.testing.assert_close(exported(**inputs)[0], model(**inputs)[0], **CLOSE)


@functools.cache
def without_cache(variant):
    """The causal language model of a variant that returns no cache."""
    return small_model(variant, use_cache=False)


@functools.cache
def exported(variant):
    """Its program, made once for all that is asked of it."""
    return export(without_cache(variant))


@pytest.mark.parametrize("variant", KINDS)
def test_exported_program_equals_the_model_at_any_size(variant):
    assert_equal(exported(variant), without_cache(variant))


@pytest.mark.parametrize("variant", ["full", "local", "conv", EVERYTHING])
def test_exported_program_is_made_of_core_operators(variant):
    """As ExecuTorch and others ask, also of what the library is left to take apart."""
    for program in (exported(variant), exported(variant).run_decompositions()):
        operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        assert {operator.namespace for operator in operators} == {"aten"}
    assert [operator for operator in operators - CHECKS if torch.Tag.core not in operator.tags] == []


@pytest.mark.parametrize("variant", ["full-dense", "simple"])
def test_exported_program_without_a_mask_equals_the_model_at_any_size(variant):
    assert_equal(export(without_cache(variant), masked=False), without_cache(variant), masked=False)


@pytest.mark.parametrize("variant", ["simple", "dense"])
def test_strict_export_equals_the_model_at_any_size(variant):
    assert_equal(export(without_cache(variant), strict=True), without_cache(variant))


@pytest.mark.parametrize("variant", ["full", "local", "dense"])
def test_exported_program_equals_a_bidirectional_model(variant):
    model = small_model(variant, head=False, is_decoder=False)
    assert_equal(export(model), model)


def test_exported_classifier_of_tokens_equals_the_model():
    model = with_head("random", "TokenClassification", True)
    assert_equal(export(model), model)


def test_exported_classifier_of_texts_and_its_onnx_graph_equal_the_model():
    model = with_head("simple", "SequenceClassification", False)
    program = export(model)
    assert_equal(program, model)
    assert_onnx_graph_equals(program, model)


@pytest.mark.parametrize("variant", ["full", "simple"])
def test_exported_program_is_exact_where_exponentials_underflow(variant):
    extreme = small_model(variant, use_cache=False)
    with torch.no_grad():
        mixer = extreme.model.layers[0].mixer
        mixer.qkv_proj.weight.split(mixer.widths)[1].mul_(100)
    program, weights = exported(variant).module(), extreme.state_dict()
    del weights["lm_head.weight"]  # tied
    assert_equal(lambda **inputs: torch.func.functional_call(program, weights, (), inputs), extreme)


def test_exported_program_takes_a_mask_of_pairs():
    model, ids = without_cache("random+dot_product"), make_ids(9)
    pairs = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    length = Dim("length", max=LIMIT)
    shapes = {"input_ids": {0: Dim("batch"), 1: length}, "attention_mask": {0: Dim("batch"), 2: length, 3: length}}
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids, "attention_mask": pairs}, dynamic_shapes=shapes)
    for size in (9, 5):
        inputs = {"input_ids": make_ids(size, 3), "attention_mask": pairs[:1, :, :size, :size].expand(3, -1, -1, -1)}
        torch.testing.assert_close(program.module()(**inputs)[0], model(**inputs)[0], **CLOSE)


def session(program) -> onnxruntime.InferenceSession:
    """onnxruntime's session of what torch.onnx or an exporter of transformers has made."""
    model = onnx_ir.to_proto(getattr(program, "model", program))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def outputs(session, values):
    """The outputs by name. An exporter tells an input from the output of the same name by `input.` and `output.`."""
    values = {**values, **{f"input.{name}": value for name, value in values.items()}}
    feed = {i.name: np.asarray(values[i.name]) for i in session.get_inputs()}
    names = [output.name.removeprefix("output.") for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def assert_onnx_graph_equals(program, model):
    graph = session(torch.onnx.export(program, (), dynamo=True, verbose=False))
    for inputs in inputs_of(SIZES, masked=True):
        (result,) = outputs(graph, inputs).values()
        torch.testing.assert_close(torch.from_numpy(result), model(**inputs).logits.detach(), **CLOSE)


@pytest.mark.parametrize("variant", ["full", EVERYTHING])
def test_onnx_graph_equals_the_model_at_any_size(variant):
    assert_onnx_graph_equals(exported(variant), without_cache(variant))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("variant", ["conv", "simple", "full", "random+dot_product"])
def test_exporters_can_join_steps_of_generate_to_one_of_several_tokens(variant, cache):
    model, inputs = small_model(variant), padded(2, 7)
    config = GenerationConfig(cache_implementation=cache) if cache == "static" else None
    _, step = decompose_for_generation(model, inputs, config, multi_token_decode=True)["decode"]
    written = step["input_ids"]
    assert written.shape == (2, 2)
    ids, mask = (torch.cat(pair, 1) for pair in zip(inputs.values(), (written, torch.ones_like(written)), strict=True))
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(model(**step).logits, expected, **CLOSE)


@pytest.mark.parametrize("variant, steps", [("conv", 7 * [1]), ("random+dot_product", [3, 1, 2, 1])])
def test_onnx_decodes_from_the_state_of_a_prefill(variant, steps):
    """Through the exporter of transformers, whose graphs take and return the tensors of the cache by name."""
    model, several = small_model(variant), max(steps) > 1
    stages = OnnxExporter().export_for_generation(
        model, padded(2, 7), OnnxConfig(dynamic=True), multi_token_decode=several
    )
    stages = {name: getattr(stage, "program", stage) for name, stage in getattr(stages, "components", stages).items()}
    prefill, decode = session(stages["prefill"]), session(stages["decode"])

    inputs = padded(3, 16)
    inputs["attention_mask"][:, 9:] = 1
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    first, *later = zip(*(tensor.split([9, *steps], 1) for tensor in inputs.values()), strict=True)
    nothing = {
        i.name: 0 for i in prefill.get_inputs() if f"{CACHE_NAME}.layers" in i.name
    }  # how long an empty cache is
    state = outputs(prefill, {**dict(zip(inputs, first, strict=True)), **nothing})
    logits = [state.pop("logits")]
    for tokens in later:
        state = outputs(decode, {**dict(zip(inputs, tokens, strict=True)), **state})
        logits.append(state.pop("logits"))
    expected = model(**inputs, use_cache=False).logits.detach()
    torch.testing.assert_close(torch.from_numpy(np.concatenate(logits, 1)), expected, **CLOSE)


@pytest.mark.parametrize("variant", ["conv", "random+dot_product"])
def test_exported_step_with_a_static_cache_equals_that_of_the_model(variant):
    model = small_model(variant)
    config = GenerationConfig(cache_implementation="static")
    _, step = decompose_for_generation(model, padded(2, 7), config)["decode"]
    program = DynamoExporter().export(model, step, DynamoConfig())
    with torch.no_grad():
        result = getattr(program, "program", program).module()(**copy.deepcopy(step))
        expected = model(**step)
    torch.testing.assert_close(result.logits, expected.logits, **CLOSE)
    for found, state in zip(result[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
        torch.testing.assert_close(found.state._asdict(), state.state._asdict(), **CLOSE)


class Traced(torch.nn.Module):
    """A model with tensors alone for arguments and result."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, return_dict=False)[0]


TRACED = [
    *((variant, "CausalLM", True) for variant in KINDS),
    *((variant, "MaskedLM", False) for variant in ["full", "local", "conv", "random+dot_product"]),
    ("conv", "SequenceClassification", False),
    ("dense", "TokenClassification", True),
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.*deprecated")
@pytest.mark.parametrize("variant, head, causal", TRACED)
def test_model_traced_with_an_unpadded_example_knows_padding(variant, head, causal):
    """At any size, checked by torch.jit.trace itself, and of operators that are there without this package."""
    model = Traced(with_head(variant, head, causal))
    if causal and head == "CausalLM":
        model.model.config.use_cache = False
    ids = make_ids(9)
    for masked in (True, False):
        traced = torch.jit.trace(model, (ids, torch.ones_like(ids)) if masked else (ids,))
        assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
        for inputs in inputs_of(SIZES, masked):
            torch.testing.assert_close(traced(**inputs), model(**inputs), **CLOSE)


def test_package_of_aot_inductor_takes_panels_without_a_row_to_compute_again(tmp_path):
    """As all but those with inputs of extreme size are. In a process of its own: it would end with this one."""

    class Panel(torch.nn.Module):
        def forward(self, *tensors):
            return panel_for_export(*tensors, 0)

    panels, queries, keys, columns, channels = 4, 5, 7, 3, 2
    sizes = [(keys, columns, 1), (keys, columns, channels), (1, columns, 1), (1, columns, 1), (1, columns, channels)]
    tensors = tuple(torch.rand(panels, *size) for size in [*sizes, (queries, keys + 1)])
    torch.save((tensors, Panel()(*tensors)), tmp_path / "expected.pt")
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    torch._inductor.aoti_compile_and_package(
        torch.export.export(Panel(), tensors), package_path=str(tmp_path / "panel.pt2"), inductor_configs=quickly
    )
    call = """if True:
        import sys, torch
        tensors, expected = torch.load(sys.argv[2])
        torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(*tensors), expected)
    """
    done = run(call, tmp_path / "panel.pt2", tmp_path / "expected.pt")
    assert done.returncode == 0, done.stderr[-2000:]
