"""
Hugging Face's own tests of models, run on every class of both families.

They come from the source distribution of the installed transformers, or from a checkout (see hf_sources.py). A test
that is skipped has to be listed here with its reason, and what is listed has to be skipped. A table of the results:

    python tests/test_hf_mixins.py
"""

import os
import re
import sys
from collections import Counter

import pytest
from hf_sources import CHECKOUT, HINT, folders


if os.environ.get("MODELING_AFT_SKIP_HF_TESTS") == "1":
    pytest.skip(f"MODELING_AFT_SKIP_HF_TESTS is set. {HINT}", allow_module_level=True)

from hf_testers import Skip, make_test_class  # noqa: E402


# Class of tests: variant, and whether its models are causal. Each holds the model without a head, the language model,
# and both classifiers; with None the model of images without a head and the classifier; and of encoder-decoders these
# three.
CLASSES = {
    "TestAFTFullCausal": ("full", True),
    "TestAFTFullBidirectional": ("full", False),
    "TestAFTLocalCausal": ("local", True),
    "TestAFTLocalBidirectional": ("local", False),
    "TestAFTSimpleCausal": ("simple-nopos", True),
    "TestAFTConvCausal": ("conv-nopos", True),
    "TestAFTConvBidirectional": ("conv-nopos", False),
    "TestSynthesizerDenseCausal": ("dense", True),
    "TestSynthesizerDenseBidirectional": ("dense", False),
    "TestSynthesizerRandomCausal": ("random", True),
    "TestSynthesizerFactorizedDenseCausal": ("factorized-dense", True),
    "TestSynthesizerMixtureCausal": ("random+dot_product", True),
    "TestSynthesizerMixtureBidirectional": ("random+dot_product", False),
    "TestAFTVisionConv": ("conv", None),
    "TestAFTVisionFull": ("full", None),
    "TestAFTSeq2Seq": ("conv-nopos", "seq2seq"),
    "TestSynthesizerSeq2Seq": ("random+dot_product", "seq2seq"),
}
SKIPPED = [
    Skip(
        "No sliding window: what lies beyond the window of AFT has no bias, but is seen.",
        ("test_sliding_window_mask",),
    ),
    Skip(
        "The logits are not queries times keys alone, so `attn_implementation` has nothing to choose from.",
        (
            "test_can_set_attention_dynamically",
            "test_eager_matches_sdpa_*",
            "test_sdpa_can_dispatch_*composite_models",
            "test_attn_implementation_composite_models",
        ),
    ),
    Skip("No rotary embeddings.", ("test_model_rope_*", "test_vision_axial_rope")),
    Skip(
        "No mixture of experts.",
        ("test_moe_*", "test_output_router_logits_*", "test_eager_matches_batched_and_grouped_*"),
    ),
    Skip(
        "No tensor parallel plan: a mixer works on all channels.",
        ("test_tp_plan_matches_params", "test_tied_head_has_a_tp_plan_entry"),
    ),
    Skip(
        "One configuration, with none inside it.",
        ("test_internal_model_config_and_subconfig_are_same",),
        classes="*[!q]",
    ),
    Skip(
        "No part with attention that can be chosen.",
        ("test_can_set_attention_dynamically_composite_model",),
    ),
    Skip(
        "Its outputs name the stack whose hidden states they are; test_seq2seq.py looks at those.",
        ("test_can_capture_specific_layers_hidden_states",),
        classes="*Seq2Seq",
    ),
    Skip("Decoder or encoder, never both.", ("test_encoder_decoder_loss_no_double_shift",), classes="*[!q]"),
    *(
        Skip("No causal language model among these.", ("test_causal_lm_loss_honors_shift_labels",), classes=classes)
        for classes in ("*Bidirectional", "TestAFTVision*", "*Seq2Seq")
    ),
    Skip(
        "Models of images have no embeddings of tokens, and no tokens in their pipelines.",
        (
            "test_inputs_embeds*",
            "test_resize_*embeddings*",
            "test_enable_input_require_grads_with_gradient_checkpointing",
            "test_pipeline_feature_extraction*",
            "test_pipeline_fill_mask*",
            "test_pipeline_text_*",
            "test_pipeline_token_classification*",
            "test_pipeline_zero_shot*",
        ),
        classes="TestAFTVision*",
    ),
    Skip(
        "All weights may be of half precision: what needs more is computed in more.", ("test_keep_in_fp32_modules*",)
    ),
    Skip(
        "Weights are saved under the names they have.",
        ("test_reverse_loading_mapping", "test_can_load_from_already_mapped_keys"),
    ),
    Skip(
        "The table of positions has the length of the configuration (as in most models of the library).",
        ("test_resize_position_vector_embeddings",),
    ),
    Skip(
        "Text only.",
        (
            "test_pipeline_*audio*",
            "test_pipeline_*image*",
            "test_pipeline_*video*",
            "test_pipeline_*object_detection*",
            "test_pipeline_any_to_any*",
            "test_pipeline_automatic_speech_recognition*",
            "test_pipeline_depth_estimation*",
            "test_pipeline_document_question_answering*",
            "test_pipeline_mask_generation*",
        ),
    ),
    Skip("No head for tables.", ("test_pipeline_table_question_answering*",)),
    Skip("Causal models do not fill masks.", ("test_pipeline_fill_mask*",), classes="*Causal"),
    Skip("Bidirectional models do not generate.", ("test_pipeline_text_generation*",), classes="*Bidirectional"),
    Skip(
        "Needs an accelerator.",
        (
            "test_can_load_with_device_context_manager",
            "test_can_load_with_global_device_set",
            "test_cpu_offload",
            "test_disk_offload_*",
            "test_model_parallelism",
            "test_torch_compile_for_training",
        ),
        always=False,
    ),
    Skip(
        "Needs an accelerator, and attention that can be computed by scaled_dot_product or flex attention.",
        ("test_sdpa_can_compile_dynamic", "test_sdpa_can_dispatch_on_flash", "test_flex_attention_with_grads"),
        always=False,
    ),
    Skip(
        "Needs an accelerator and flash attention or the package kernels.",
        ("test_flash_attn_*", "test_kernels_can_load_without_crashing"),
        always=False,
    ),
    Skip("Needs an accelerator and the package deepspeed.", ("test_resize_*_with_deepspeed*",), always=False),
]


# What a checkout has besides.
SKIPPED_OF_CHECKOUT = [
    Skip("A state has no keys and values of every token to quantize.", ("test_generate_with_quant_cache",)),
    Skip(
        "The sums of AFT know padding, but no mask of pairs of tokens.",
        ("test_custom_4d_attention_mask",),
        classes="TestAFT*",
    ),
    Skip("No layers that predict several tokens.", ("test_generate_with_mtp",)),
    Skip(
        "The library has these tests for causal models alone.",
        (
            "test_*_padding_matches_padding_free_with_position_ids",
            "test_generate_continue_from_inputs_embeds",
            "test_generate_with_and_without_position_ids",
            "test_generate*_with_static_cache",
            "test_left_padding_compatibility",
        ),
        classes="*Seq2Seq",
    ),
    Skip(
        "Assisted generation hands `logits_to_keep` to the encoder as well, so the head does without.",
        ("test_*_with_logits_to_keep",),
        classes="*Seq2Seq",
    ),
    Skip("There is no text without a source.", ("test_generate_without_input_ids",), classes="*Seq2Seq"),
    Skip("The decoder reads one document per row.", ("test_custom_4d_attention_mask",), classes="Test*zerSeq2Seq"),
    Skip("No head for questions.", ("test_question_answering_model",)),
    Skip(
        "For layer types of the library; test_generation.py pads what continues a cache.",
        ("test_recurrent_layers_mask_padding_on_continued_forward",),
    ),
    Skip("Needs an accelerator.", ("test_model_parallel_beam_search",), always=False),
    Skip(
        "Needs an accelerator and flash attention or the package kernels.",
        ("test_flash_attention_*", "test_eager_matches_fa*_generate"),
        always=False,
    ),
    Skip(
        "Needs several accelerators and a plan for them.",
        ("test_tp_backward", "test_tp_forward_*", "test_tp_generation*", "test_fsdp2_*", "test_hsdp_*"),
        always=False,
    ),
]
SKIPPED_WITHOUT_CHECKOUT = [
    Skip(
        "The library's tests of `generate` come with a checkout.",
        ("test_generation_tester_mixin_inheritance",),
        classes=classes,
    )
    for classes in ("*Causal", "*Seq2Seq")
]
# The mixins of the library that are not among those of CLASSES.
OTHER_MIXINS = {
    "TensorParallelTesterMixin": "No tensor parallel plan: a mixer works on all channels.",
    "ExpertParallelTesterMixin": "No mixture of experts.",
    "FSDPTesterMixin": "Runs the models that the library lists, with a module that is not in the source distribution.",
    "MemoryCleanupMixin": "For tests that fill the memory of an accelerator.",
    "BackboneTesterMixin": "For models of images.",
    "DecisionHeadTesterMixin": "For heads that choose among candidates.",
    "Tokeniz|SentencePiece": "For tokenizers, not for models.",
    "Process|FeatureExtraction|AnnotationFormat": "For images, videos and sounds.",
}


# What no variant could change, and takes long: the first class of tests of each family has it alone.
ONCE = ("test_bc_torch_dtype",)
FIRST = ("TestAFTFullCausal", "TestSynthesizerDenseCausal")


LISTED_SKIPS = SKIPPED + (SKIPPED_OF_CHECKOUT if CHECKOUT else SKIPPED_WITHOUT_CHECKOUT)
for class_name, (variant, is_decoder) in CLASSES.items():
    left_out = () if class_name in FIRST else ONCE
    globals()[class_name] = make_test_class(class_name, variant, is_decoder, LISTED_SKIPS, left_out)


def test_every_listed_skip_covers_a_test():
    names = [(cls, name) for cls in CLASSES for name in dir(globals()[cls]) if name.startswith("test_")]
    for skip in SKIPPED:
        assert any(skip.covers(*name) for name in names), f"there are no tests {skip.tests} in {skip.classes}"


def test_every_mixin_of_the_library_is_run_or_named():
    run = {base.__name__ for name in CLASSES for base in globals()[name].__mro__}
    for path in folders()[0].glob("test_*.py"):
        for mixin in re.findall(r"^class (\w+Mixin)\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert mixin in run or re.search("|".join(OTHER_MIXINS), mixin), f"{mixin} of {path.name}"


class Table:
    """Counts what pytest reports, by class of tests, and prints it at the end."""

    def __init__(self):
        self.counts, self.reasons = {name: Counter() for name in CLASSES}, Counter()

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[1]
        if name in self.counts and (report.when == "call" or not report.passed):
            self.counts[name][report.outcome] += 1
            if report.skipped:
                self.reasons[report.longrepr[2].removeprefix("Skipped: ").split(" (")[0]] += 1

    def pytest_terminal_summary(self, terminalreporter):
        print = terminalreporter.write_line
        print("| tests | passed | failed | skipped |\n|---|---|---|---|")
        for name, count in self.counts.items():
            print(f"| {name} | {count['passed']} | {count['failed']} | {count['skipped']} |")
        print("\n| skipped | because |\n|---|---|")
        for reason, count in self.reasons.most_common():
            print(f"| {count} | {reason} |")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]], plugins=[Table()]))
