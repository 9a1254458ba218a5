"""For the pipelines of Hugging Face's tests: models and tokenizers made on the spot, and what each has to give."""

from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from transformers import pipeline

from modeling_aft import ByteTokenizer
from modeling_aft.tokenization_bytes import BYTE_SYMBOLS


def mask_tokenizer(config) -> ByteTokenizer:
    """[MASK] is token 256, and padding 257; the model knows the first alone."""
    limit = {"model_max_length": config.max_position_embeddings} if config.has_position_table else {}
    return ByteTokenizer(mask_token="[MASK]", bos_token=BYTE_SYMBOLS[1], padding_side="left", **limit)


@contextmanager
def local_models(module, folder, model_classes, config):
    """Saves a random model of each class where the module of the pipeline tests looks for it, with a tokenizer."""
    for model_class in model_classes:
        path = Path(folder, config.model_type, model_class.__name__)
        model_class(config).save_pretrained(path)
        mask_tokenizer(config).save_pretrained(path)
    files = {"tokenizer_classes": ["AutoTokenizer"], "processor_classes": []}
    summary = {model_class.__name__: files for model_class in model_classes}
    with mock.patch.multiple(module, TRANSFORMERS_TINY_MODEL_PATH=str(folder), tiny_model_summary=summary):
        yield


class PipelineChecks:
    """What a test of a pipeline is to the mixin. The texts are of different length, so a batch of them is padded."""

    task: str
    settings = {}
    texts = ["A text.", "And a longer one."]

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        model = model.to(getattr(torch, dtype))
        return pipeline(self.task, model=model, tokenizer=tokenizer, **self.settings), self.texts

    def run_pipeline_test(self, pipe, texts):
        tolerance = 1e-4 if pipe.model.dtype == torch.float32 else 1e-2
        for text, answer in zip(texts, pipe(texts, batch_size=2), strict=True):
            numbers = self.numbers(pipe, text, answer)
            torch.testing.assert_close(numbers, self.numbers(pipe, text, pipe(text)), rtol=0, atol=tolerance)

    def numbers(self, pipe, text, answer) -> torch.Tensor:
        """Checks the form of an answer, and gives the numbers in it that do not depend on the rest of the batch."""
        raise NotImplementedError


class FeatureExtraction(PipelineChecks):
    task = "feature-extraction"

    def numbers(self, pipe, text, answer):
        vectors = torch.tensor(answer)[0, -len(text) :]  # the padding, on the left, has vectors too
        assert vectors.shape == (len(text), pipe.model.config.hidden_size)
        return vectors


class FillMask(PipelineChecks):
    task = "fill-mask"
    texts = ["A [MASK]ext.", "And a longer [MASK]"]

    def numbers(self, pipe, text, answer):
        assert len(answer) == 5
        for guess in answer:
            special = guess["token"] in pipe.tokenizer.all_special_ids
            assert guess["sequence"] == text.replace("[MASK]", "" if special else guess["token_str"])
        return torch.tensor([guess["score"] for guess in answer])


class TextGeneration(PipelineChecks):
    task = "text-generation"
    settings = {"max_new_tokens": 5, "do_sample": False}

    def numbers(self, pipe, text, answer):
        assert answer[0]["generated_text"].startswith(text)
        return torch.tensor(len(answer))


class TextClassification(PipelineChecks):
    task = "text-classification"
    settings = {"top_k": None}

    def numbers(self, pipe, text, answer):
        answer = answer[0] if isinstance(answer[0], list) else answer  # of a text outside of a list
        assert {guess["label"] for guess in answer} == set(pipe.model.config.label2id)
        return torch.tensor([guess["score"] for guess in sorted(answer, key=lambda guess: guess["label"])])


class TokenClassification(PipelineChecks):
    task = "token-classification"
    settings = {"ignore_labels": []}

    def numbers(self, pipe, text, answer):
        assert [entity["word"] for entity in answer] == pipe.tokenizer.tokenize(text)
        return torch.tensor([float(entity["score"]) for entity in answer])


class ZeroShot(PipelineChecks):
    task = "zero-shot-classification"
    settings = {"candidate_labels": ["a", "bc"]}

    def numbers(self, pipe, text, answer):
        assert answer["sequence"] == text
        scores = dict(zip(answer["labels"], answer["scores"], strict=True))
        return torch.tensor([scores["a"], scores["bc"]])
