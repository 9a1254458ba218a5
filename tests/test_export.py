"""torch.export and ONNX: exported programs compute what the model does, at any size, without its code."""

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from families import LIMIT, make_ids, make_model
from torch.export import Dim
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from modeling_aft.compatibility import CACHE_NAME


EVERYTHING = "dense+random+factorized_dense+dot_product"
SIZES = [(1, 1), (3, 2), (1, 20), (2, LIMIT)]  # batch and length, none of which is the example's
# Rounding differs between the operations of a model and those of its export.
CLOSE = {"rtol": 0, "atol": 2e-5}


def small_model(variant, **changes):
    return make_model(variant, dtype=torch.float32, num_hidden_layers=1, **changes)


def padded(batch, length):
    """Inputs with padding on the left, on the right and inside, but for one token."""
    ids = make_ids(length, batch)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    mask[-1, length // 2 + 1 :] = 0
    mask[:, length // 3] = int(length < 3)
    return {"input_ids": ids, "attention_mask": mask}


def example(masked):
    """Arguments to export with, and their shapes: any batch, any length that the model has positions for."""
    inputs = padded(2, 9) if masked else {"input_ids": make_ids(9)}
    shape = {0: Dim("batch"), 1: Dim("length", max=LIMIT)}
    return {**inputs, "use_cache": False}, {**dict.fromkeys(inputs, shape), "use_cache": None}


def inputs_of(sizes, masked):
    return [padded(*size) if masked else {"input_ids": make_ids(*reversed(size))} for size in sizes]


@torch.no_grad()
def assert_exports(model, masked=True, strict=False):
    arguments, shapes = example(masked)
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=strict)
    operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert {operator.namespace for operator in operators} == {"aten"}
    exported = program.module()
    for inputs in inputs_of(SIZES, masked):
        result, expected = exported(**inputs, use_cache=False)[0], model(**inputs, use_cache=False)[0]
        torch.testing.assert_close(result, expected, **CLOSE)


@pytest.mark.parametrize(
    "variant", ["full", "local", "simple", "conv", "dense", "random", "factorized-dense", EVERYTHING]
)
def test_exported_program_equals_the_model_at_any_size(variant):
    assert_exports(small_model(variant))


@pytest.mark.parametrize("variant", ["full-dense", "conv", EVERYTHING])
def test_exported_program_without_a_mask_equals_the_model_at_any_size(variant):
    assert_exports(small_model(variant), masked=False)


@pytest.mark.parametrize("variant", ["simple", "dense"])
def test_strict_export_equals_the_model_at_any_size(variant):
    assert_exports(small_model(variant), strict=True)


@pytest.mark.parametrize("variant", ["full", "local", "dense"])
def test_exported_program_equals_a_bidirectional_model(variant):
    assert_exports(small_model(variant, head=False, is_decoder=False))


@pytest.mark.parametrize("variant", ["full", "simple"])
def test_exported_program_is_exact_where_exponentials_underflow(variant):
    model = small_model(variant)
    with torch.no_grad():
        mixer = model.model.layers[0].mixer
        mixer.qkv_proj.weight.split(mixer.widths)[1].mul_(100)
    assert_exports(model)


def session(program) -> onnxruntime.InferenceSession:
    """onnxruntime's session of what torch.onnx or an exporter of transformers has made."""
    model = onnx_ir.to_proto(getattr(program, "model", program))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, values):
    """The outputs by name. An exporter tells an input from the output of the same name by `input.` and `output.`."""
    values = {**values, **{f"input.{name}": value for name, value in values.items()}}
    feed = {i.name: np.asarray(values[i.name]) for i in session.get_inputs()}
    names = [output.name.removeprefix("output.") for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


@pytest.mark.parametrize("variant", ["simple", EVERYTHING])
def test_onnx_graph_equals_the_model_at_any_size(variant):
    model = small_model(variant)
    arguments, shapes = example(masked=True)
    with torch.no_grad():
        program = torch.onnx.export(model, (), kwargs=arguments, dynamic_shapes=shapes, dynamo=True, verbose=False)
    graph = session(program)
    for inputs in inputs_of(SIZES, masked=True):
        (result,) = run(graph, inputs).values()
        torch.testing.assert_close(torch.from_numpy(result), model(**inputs).logits.detach(), **CLOSE)


@pytest.mark.parametrize("variant", ["conv", "full", "random+dot_product"])
def test_onnx_decodes_token_by_token_from_the_state_of_a_prefill(variant):
    """Through the exporter of transformers, whose graphs take and return the tensors of the cache by name."""
    model = small_model(variant)
    stages = OnnxExporter().export_for_generation(model, padded(2, 7), OnnxConfig(dynamic=True))
    stages = {name: getattr(stage, "program", stage) for name, stage in getattr(stages, "components", stages).items()}
    prefill, decode = session(stages["prefill"]), session(stages["decode"])

    inputs = padded(3, 16)
    inputs["attention_mask"][:, 9:] = 1
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    first, *later = zip(*(tensor.split([9] + 7 * [1], 1) for tensor in inputs.values()), strict=True)
    nothing = {
        i.name: 0 for i in prefill.get_inputs() if f"{CACHE_NAME}.layers" in i.name
    }  # how long an empty cache is
    state = run(prefill, {**dict(zip(inputs, first, strict=True)), **nothing})
    logits = [state.pop("logits")]
    for token in later:
        state = run(decode, {**dict(zip(inputs, token, strict=True)), **state})
        logits.append(state.pop("logits"))
    expected = model(**inputs, use_cache=False).logits.detach()
    torch.testing.assert_close(torch.from_numpy(np.concatenate(logits, 1)), expected, **CLOSE)
