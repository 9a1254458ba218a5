"""What Hugging Face's tests ask of those who use them: small models with inputs, and an account of what is skipped."""

import functools
import inspect
import itertools
import tempfile
import types
import unittest
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import SimpleNamespace
from unittest import mock

import hf_pipelines
import hf_sources
import pytest
import torch
from families import make_config, make_seq2seq_config
from transformers import DynamicCache, EncoderDecoderCache

import modeling_aft
from modeling_aft.modeling_images import PatchEmbeddings
from modeling_aft.modeling_stack import MixerPreTrainedModel


hf = hf_sources.load()

# Fields that every configuration shares, with values that are not the defaults.
COMMON_FIELDS = {
    "architectures": ["A"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "a"},
    "label2id": {"a": 0},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
if inspect.isclass(hf.configuration.config_common_kwargs):  # it stands in for a dict that is not in the sources
    hf.configuration.config_common_kwargs = COMMON_FIELDS
PIPELINES = {
    "feature-extraction": ("Model", hf_pipelines.FeatureExtraction),
    "fill-mask": ("ForMaskedLM", hf_pipelines.FillMask),
    "text-generation": ("ForCausalLM", hf_pipelines.TextGeneration),
    "text-classification": ("ForSequenceClassification", hf_pipelines.TextClassification),
    "token-classification": ("ForTokenClassification", hf_pipelines.TokenClassification),
    "zero-shot": ("ForSequenceClassification", hf_pipelines.ZeroShot),
}
if hf.generation is None:  # a checkout has its own
    for task, (_, checks) in PIPELINES.items():
        entry = hf.pipelines.pipeline_test_mapping[task]
        # Up to 5.17 the class itself.
        entry["test"] = f"{checks.__module__}.{checks.__name__}" if isinstance(entry["test"], str) else checks


class ModelTester:
    """A small model of a variant, causal or bidirectional, under the names by which the mixins know it."""

    batch_size, seq_length, vocab_size = 3, 7, 257  # the bytes and a token for masked places
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True
    type_sequence_label_size, num_labels = 2, 3
    question_answering_class = None
    padded = False  # whether a row of the inputs begins with padding

    def __init__(self, parent, variant, is_decoder):
        self.parent, self.variant, self.is_decoder = parent, variant, is_decoder
        self.config_class = type(self.get_config())
        if self.config_class is modeling_aft.AFTConfig and self.get_config().aft_type != "conv":
            self.num_attention_heads = self.hidden_size  # every channel has weights of its own
        self.base_model_class = self.model_class("Model")
        self.causal_lm_class = self.model_class("ForCausalLM") if is_decoder else None
        self.sequence_classification_class = self.model_class("ForSequenceClassification")
        self.token_classification_class = self.model_class("ForTokenClassification")
        self.all_model_classes = (
            self.base_model_class,
            self.causal_lm_class or self.model_class("ForMaskedLM"),
            self.sequence_classification_class,
            self.token_classification_class,
        )

    def model_class(self, suffix):
        return getattr(modeling_aft, self.config_class.__name__.replace("Config", suffix))

    def get_config(self):
        return make_config(
            self.variant,
            is_decoder=self.is_decoder,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = hf.modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(ids)
        mask[1:, : self.padded] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}

    def prepare_config_and_inputs(self):
        """As the tests of causal language models take them: without labels."""
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, inputs["input_ids"], None, inputs["attention_mask"], None, None, None

    def create_and_check_model(self, config, input_ids, token_type_ids, input_mask, *labels):
        hidden = self.base_model_class(config).eval()(input_ids, attention_mask=input_mask).last_hidden_state
        self.parent.assertEqual(hidden.shape, (self.batch_size, self.seq_length, self.hidden_size))


# Tests that ask AFT for no weights: of tokens that a cache has summed up there are none, and no gradient goes through
# them, because the output is not computed from them.
WITHOUT_WEIGHTS = (
    "test_retain_grad_hidden_states_attentions",
    "test_*_use_cache",
    "test_assisted_decoding_*",
    "test_prompt_lookup_decoding_*",
    "test_generate_compilation_all_outputs",
    "test_custom_4d_attention_mask",
)


@dataclass(frozen=True)
class Skip:
    """Tests that are skipped, by patterns of their names, in the classes whose names match, and why."""

    reason: str
    tests: tuple[str, ...]
    classes: str = "*"
    always: bool = True  # else only where something is missing that a machine may have

    def covers(self, class_name: str, test: str) -> bool:
        return fnmatchcase(class_name, self.classes) and any(fnmatchcase(test, pattern) for pattern in self.tests)


class MixerTests:
    """What the tests of all variants share; stands before the mixins among the bases of a test class."""

    variant: str
    is_decoder: bool
    listed: list[Skip]
    model_tester = None
    model_tester_class = ModelTester
    has_attentions = True
    has_text = True
    # Models as small as these learn faster than the 300 steps at 0.001 that the library gives every model.
    training_overfit_steps = 100
    training_overfit_learning_rate = 0.003

    def setUp(self):
        self.model_tester = self.model_tester_class(self, self.variant, self.is_decoder)
        self.config_tester = hf.configuration.ConfigTester(
            self, config_class=self.model_tester.config_class, has_text_modality=self.has_text
        )
        self.all_model_classes = self.model_tester.all_model_classes
        if self.model_tester.config_class is not modeling_aft.SynthesizerConfig:
            self.has_attentions = not any(fnmatchcase(self._testMethodName, name) for name in WITHOUT_WEIGHTS)
        self.pipeline_model_mapping = self.make_pipeline_model_mapping()
        self.skips = []

    def make_pipeline_model_mapping(self):
        classes = {task: self.model_tester.model_class(suffix) for task, (suffix, _) in PIPELINES.items()}
        return {task: model for task, model in classes.items() if model in self.all_model_classes}

    def test_config(self):
        self.config_tester.run_common_tests()

    def run_task_tests(self, task, *args, **kwargs):
        """With a model that is made here, where the mixin takes one from the Hub."""
        model_classes = [model for name, model in self.pipeline_model_mapping.items() if name == task]
        config = self.model_tester.get_config()
        with (
            tempfile.TemporaryDirectory() as folder,
            hf_pipelines.local_models(hf.pipelines, folder, model_classes, config),
        ):
            super().run_task_tests(task, *args, **kwargs)

    def test_generation_tester_mixin_inheritance(self):
        if self.is_decoder and hf.generation is None:
            self.skipTest("not in the source distribution")
        super().test_generation_tester_mixin_inheritance()

    def test_bc_cache_name_forward(self):
        """The mixin, which has it from 5.24 on, wants a warning besides: to these models both names are the same."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        names = ("cache", "past_key_values")
        if not self.is_decoder:
            for name in names:
                with self.assertRaisesRegex(ValueError, "is_decoder=True"):
                    self.model_tester.base_model_class(config)(**inputs, **{name: DynamicCache(config=config)})
            return
        for model_class in (self.model_tester.base_model_class, self.model_tester.causal_lm_class):
            model = model_class(config).eval()
            caches = [model(**inputs, **{name: DynamicCache(config=config)}).cache for name in names]
            self._check_caches_are_equal(*caches)

    def _check_caches_are_equal(self, cache1, cache2):
        """A state has other tensors than keys and values of every token."""
        self.assertEqual(len(cache1), len(cache2))
        for one, other in zip(cache1.layers, cache2.layers, strict=True):
            torch.testing.assert_close(one.state_dict(), other.state_dict())

    @contextmanager
    def subTest(self, *args, **kwargs):
        """Reports only failures: to report each of thousands that pass takes longer than to test them."""
        try:
            yield
        except unittest.SkipTest:
            pass  # is in self.skips
        except Exception as error:
            with super().subTest(*args, **kwargs):
                raise error

    def skip_listed(self) -> Skip | None:
        matching = [skip for skip in self.listed if skip.covers(type(self).__name__, self._testMethodName)]
        return matching[0] if matching else None

    def skipTest(self, reason):
        """Skips for the reason that is listed, and fails where none is."""
        skip = self.skip_listed()
        if skip is None:
            self.fail(f"{type(self).__name__}.{self._testMethodName} is skipped, but not listed: {reason}")
        self.skips.append(reason)
        super().skipTest(f"{skip.reason} ({reason})")


def accounted(test):
    """A test that fails if it is skipped without being listed, or listed and not skipped."""
    if test.__qualname__.startswith("is_flaky.<locals>"):  # @is_flaky without (): only returns the real test
        test = inspect.getclosurevars(inspect.unwrap(test)).nonlocals["max_attempts"]
    absent = getattr(test, "__unittest_skip_why__", None) if getattr(test, "__unittest_skip__", False) else None

    @functools.wraps(test)
    def run(self):
        try:
            if absent is not None:
                self.skipTest(absent)
            test(self)
        except (unittest.SkipTest, pytest.skip.Exception) as skip:
            if not self.skips:  # raised by other means than `skipTest`
                self.skipTest(str(skip))
            raise
        if self.skips:  # in subtests
            self.skipTest(self.skips[-1])
        if (skip := self.skip_listed()) is not None and skip.always:
            self.fail(f"{type(self).__name__}.{self._testMethodName} is listed as skipped ({skip.reason}), but it ran")

    run.__unittest_skip__ = False
    return run


class ImageModelTester:
    """A small model of images, of the type `variant`, under the names by which the mixins know it."""

    batch_size, num_channels, image_size, patch_size = 3, 3, 12, 4
    hidden_size, num_hidden_layers = 32, 2
    is_training = True
    num_labels = 3

    def __init__(self, parent, variant, is_decoder):
        self.parent, self.variant = parent, variant
        self.config_class = modeling_aft.AFTVisionConfig
        self.num_attention_heads = 4 if variant == "conv" else self.hidden_size
        self.seq_length = self.get_config().max_position_embeddings
        self.base_model_class = modeling_aft.AFTVisionModel
        self.all_model_classes = modeling_aft.AFTVisionModel, modeling_aft.AFTForImageClassification

    def get_config(self):
        return modeling_aft.AFTVisionConfig(
            aft_type=self.variant,
            num_attention_heads=4,
            kernel_size=3,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            position_bias_rank=4,
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self):
        size = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": hf.modeling.floats_tensor(size)}


class ImageTests(MixerTests):
    """What the tests of models of images need besides."""

    model_tester_class = ImageModelTester
    has_text = False
    test_resize_embeddings = False

    def make_pipeline_model_mapping(self):
        return {}  # the tests of pipelines of images are not in the sources; test_images.py has some

    def test_model_get_set_embeddings(self):
        """As the library's own tests of such models: what goes in is no `nn.Embedding`."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            self.assertIsInstance(model_class(config).get_input_embeddings(), PatchEmbeddings)

    def test_bc_cache_name_forward(self):
        """There is no cache, under neither name."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class, name in itertools.product(self.all_model_classes, ("cache", "past_key_values")):
            with self.assertRaisesRegex(TypeError, name):
                model_class(config)(**inputs, **{name: DynamicCache()})


class Seq2SeqModelTester(ModelTester):
    """A small encoder-decoder of a variant, under the names by which the mixins know it."""

    encoder_seq_length = decoder_seq_length = ModelTester.seq_length
    is_encoder_decoder = True

    def __init__(self, parent, variant, is_decoder):
        self.parent, self.variant = parent, variant
        config = self.get_config()
        self.config_class, self.num_attention_heads = type(config), config.decoder.num_attention_heads
        family = self.config_class.__name__.removesuffix("Seq2SeqConfig")
        self.base_model_class = self.model_class("Model")
        self.causal_lm_class = getattr(modeling_aft, f"{family}ForConditionalGeneration")
        self.sequence_classification_class = self.model_class("ForSequenceClassification")
        self.all_model_classes = self.base_model_class, self.causal_lm_class, self.sequence_classification_class

    def get_config(self):
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "max_position_embeddings": 64}
        return make_seq2seq_config(
            self.variant, of_encoder=sizes, of_decoder=sizes, num_cross_attention_heads=4, bos_token_id=2
        )

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        ids = hf.modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return config, {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


class Seq2SeqTests(MixerTests):
    """What the tests of encoder-decoders need besides."""

    model_tester_class = Seq2SeqModelTester
    is_encoder_decoder = True

    def make_pipeline_model_mapping(self):
        return {}

    def test_config(self):
        """Without the part that finds a stack by its model type, which is that of both."""
        with mock.patch.object(self.config_tester, "create_and_test_config_from_and_save_pretrained_composite"):
            super().test_config()

    def test_load_with_mismatched_shapes(self):
        """With the vocabulary of both stacks where the mixin would change that of one."""
        config_class = self.model_tester.config_class
        of_stack = config_class.get_text_config

        def get_text_config(config, **which):
            return of_stack(config, **which) if which else config

        with mock.patch.object(config_class, "get_text_config", get_text_config):
            super().test_load_with_mismatched_shapes()

    def test_bc_cache_name_forward(self):
        """As above."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in (self.model_tester.base_model_class, self.model_tester.causal_lm_class):
            model = model_class(config).eval()
            for name in ("cache", "past_key_values"):
                own, cross = DynamicCache(config=config), DynamicCache()
                cache = EncoderDecoderCache(own, cross)
                self.assertIs(model(**inputs, **{name: cache}).cache, cache)


class DecoderTests(MixerTests):
    """What the tests of `generate`, which a checkout has, need besides: they know attention and its caches only."""

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """A state has other tensors than keys and values of every token; keys and values of an encoder are plain."""
        config = config.get_text_config(decoder=True)
        if isinstance(past_key_values, EncoderDecoderCache):
            cross = past_key_values.cross_attention_cache
            self.assertEqual({layer.keys.shape[:2] for layer in cross.layers}, {(batch_size, 4)})
            past_key_values = past_key_values.self_attention_cache
            self.assertEqual(len(cross), len(past_key_values))
        self.assertEqual([type(layer)._layer_type for layer in past_key_values.layers], config.layer_types)
        self.assertEqual(past_key_values.get_seq_length(), seq_length)
        for layer in past_key_values.layers:
            self.assertEqual({len(t) for t in layer.state if t is not None}, {batch_size})

    def _check_attentions_for_generate(self, **outputs):
        """AFT has weights for each channel."""
        config = SimpleNamespace(num_attention_heads=self.model_tester.num_attention_heads)
        super()._check_attentions_for_generate(**{**outputs, "config": config})

    def test_left_padding_compatibility(self):
        """The mixin believes that without attention maps there is no padding."""
        self.has_attentions = True
        super().test_left_padding_compatibility()

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args, **kwargs):
        """The mixin believes that packed documents need attention that can be chosen; and it needs padding."""
        self.model_tester.padded = True
        flags = {"_supports_attention_backend": True, "_supports_sdpa": True}
        with mock.patch.multiple(MixerPreTrainedModel, **flags):
            super().attention_mask_padding_matches_padding_free_with_position_ids(*args, **kwargs)


def make_test_class(
    class_name: str, variant: str, is_decoder: bool | None, listed: list[Skip], left_out: tuple[str, ...] = ()
) -> type[unittest.TestCase]:
    """The mixins that apply to the causal or to the bidirectional models of a variant, or to those of images where
    `is_decoder` is None, without some tests."""
    tests = {None: ImageTests, "seq2seq": Seq2SeqTests}.get(is_decoder, MixerTests)
    mixins = [tests, hf.modeling.ModelTesterMixin]
    if is_decoder != "seq2seq":  # whose pipelines no longer exist
        mixins.append(hf.pipelines.PipelineTesterMixin)
    if is_decoder == "seq2seq" and hf.generation is not None:
        mixins = [DecoderTests, hf.generation.GenerationTesterMixin, *mixins]
    if is_decoder is True:
        mixins.append(hf.training.TrainingTesterMixin)
        if hf.generation is not None:
            mixins = [DecoderTests, hf.generation.GenerationTesterMixin, *mixins[1:]]
        if hf.causal_lm is not None:
            mixins = [DecoderTests, hf.causal_lm.CausalLMModelTest]
    fields = {"variant": variant, "is_decoder": is_decoder, "listed": listed}
    test_class = types.new_class(
        class_name, (*mixins, unittest.TestCase), exec_body=lambda namespace: namespace.update(fields)
    )
    for name in dir(test_class):
        if name.startswith("test_") and callable(test := getattr(test_class, name)):
            setattr(test_class, name, None if name in left_out else accounted(test))
    return test_class
