"""Pictures as sequences of sub-pixels: the image processor, and what a causal language model makes of them."""

import re

import numpy as np
import pytest
import torch
from families import make_model
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from aft.commands.push import main as push
from modeling_aft import AFTImageProcessor, SynthesizerConfig, SynthesizerForCausalLM


SIZE = {"height": 3, "width": 5}
RANDOM = np.random.default_rng(0)
CHANNELS = pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])


def make_pictures(channels: int, count: int = 2) -> np.ndarray:
    """[B, H, W, C] uint8, the ends of the range among them."""
    pictures = RANDOM.integers(256, size=(count, *SIZE.values(), channels), dtype=np.uint8)
    pictures.reshape(count, -1)[:, :2] = 0, 255
    return pictures


def as_pil(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


FORMS = {
    "pil": lambda pictures: [as_pil(picture) for picture in pictures],
    "one-at-a-time": lambda pictures: list(pictures),
    "batch": lambda pictures: pictures,
    "tensor": lambda pictures: torch.from_numpy(pictures).permute(0, 3, 1, 2),
    "tensors": lambda pictures: list(torch.from_numpy(pictures).permute(0, 3, 1, 2)),
}


@CHANNELS
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_sequences_are_sub_pixels_in_raster_order_and_come_back(form, channels):
    processor, pictures = AFTImageProcessor(size=SIZE, num_channels=channels), make_pictures(channels)
    ids = processor(form(pictures))["input_ids"]
    expected = [
        [256] + [picture[y, x, c] for y in range(3) for x in range(5) for c in range(channels)] for picture in pictures
    ]
    assert ids.dtype == torch.int64 and ids.tolist() == expected
    for given in (ids, ids[:, 1:], ids.numpy(), ids.tolist()):  # with the start, and without
        for picture, found in zip(pictures, processor.postprocess(given), strict=True):
            assert (found.mode, found.size) == ({1: "L", 3: "RGB"}[channels], (5, 3))
            assert (np.asarray(found).reshape(picture.shape) == picture).all()


def test_the_upper_rows_are_a_prompt():
    processor, pictures = AFTImageProcessor(size=SIZE), make_pictures(3)
    whole, prompt = processor(pictures).input_ids, processor(pictures, num_rows=2).input_ids
    assert torch.equal(prompt, whole[:, : 1 + 2 * 5 * 3])
    assert processor(pictures, num_rows=0).input_ids.tolist() == [[256], [256]]
    [shown, _] = processor.postprocess(prompt, fill_value=127)
    assert (np.asarray(shown)[:2] == pictures[0, :2]).all() and (np.asarray(shown)[2] == 127).all()


def test_other_pictures_become_those_of_the_processor():
    """The shorter side fits, and the middle of the longer one stays; colours become grey as PIL makes them."""
    wide = np.zeros((6, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200, 100, 50
    [found] = AFTImageProcessor(size=SIZE, resample=0, add_bos_token=False)(wide).input_ids
    assert found.tolist() == [200, 100, 50] * 15
    [grey] = AFTImageProcessor(size=SIZE, num_channels=1, add_bos_token=False)(wide[:3, 12:17]).input_ids
    assert grey.tolist() == [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)] * 15
    colours = AFTImageProcessor(size=SIZE, add_bos_token=False)(Image.new("L", (5, 3), 9)).input_ids
    assert colours.tolist() == [[9] * 45]


def test_a_layout_that_is_open_has_to_be_said():
    processor = AFTImageProcessor(size={"height": 3, "width": 3}, add_bos_token=False)
    picture = make_pictures(3)[0][:, :3]
    with pytest.raises(ValueError, match="input_data_format"):
        processor(picture)
    for layout, expected in (("channels_last", picture), ("channels_first", picture.transpose(1, 2, 0))):
        assert processor(picture, input_data_format=layout).input_ids.tolist() == [expected.reshape(-1).tolist()]


PICTURES = make_pictures(3)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        pytest.param(PICTURES / 255, {}, "uint8.*float64", id="floats"),
        pytest.param(np.zeros((6, 5, 2), np.uint8), {}, r"channels.*\[6, 5, 2\]", id="channels"),
        pytest.param(Image.new("I;16", (5, 3)), {}, "8 bits.*I;16", id="16-bits"),
        pytest.param([], {}, "at least one", id="none"),
        pytest.param([[0, 1]], {}, "pictures of PIL, arrays or tensors, got list", id="lists"),
        pytest.param(PICTURES, {"num_rows": 4}, "num_rows.*0 to 3.*got 4", id="rows"),
        pytest.param(PICTURES, {"input_data_format": "last"}, "input_data_format.*'last'", id="layout"),
    ],
)
def test_what_is_no_picture_is_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        AFTImageProcessor(size=SIZE)(images, **options)


def test_another_size_is_refused_without_resizing():
    with pytest.raises(ValueError, match="3 high and 5 wide, or `do_resize` True, got a picture 4 high and 5 wide"):
        AFTImageProcessor(size=SIZE, do_resize=False)(Image.new("RGB", (5, 4)))


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        pytest.param([256] + [0] * 44, {}, "45 sub-pixels .*fill_value.*got 44", id="short"),
        pytest.param([0] * 46, {}, "45 sub-pixels of a picture, got 46", id="long"),
        pytest.param([256] * 2 + [0] * 44, {}, "0 to 255 after the start, got 256", id="start-within"),
        pytest.param([-1] + [0] * 43 + [300], {}, "got -1, 300", id="values"),
        pytest.param([0.0] * 45, {}, "integers.*float64", id="floats"),
        pytest.param([0], {"fill_value": 256}, "fill_value.*got 256", id="fill"),
    ],
)
def test_what_is_no_sequence_of_a_picture_is_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        AFTImageProcessor(size=SIZE).postprocess(ids, **options)


def test_every_wrong_field_is_named():
    fields = {"size": {"height": 0, "width": 4}, "num_channels": 2, "do_resize": 1, "resample": 9, "bos_token_id": 255}
    with pytest.raises(ValueError) as error:
        AFTImageProcessor(**fields, add_bos_token=None)
    assert set(re.findall("`(.*?)` must be", str(error.value))) == {*fields, "add_bos_token"}
    with pytest.raises(TypeError, match="unexpected fields do_normalize; allowed: size, "):
        AFTImageProcessor(do_normalize=True)


def test_a_folder_keeps_every_field(tmp_path):
    fields = {"size": SIZE, "num_channels": 1, "do_resize": False, "resample": 2, "bos_token_id": 300}
    AFTImageProcessor(**fields, add_bos_token=False).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is AFTImageProcessor
    assert {name: getattr(loaded, name) for name in (*fields, "add_bos_token")} == {**fields, "add_bos_token": False}
    assert AutoImageProcessor.from_pretrained(tmp_path, num_channels=3).num_channels == 3


# Models


def make_model_of(processor: AFTImageProcessor, variant: str = "local"):
    """One that would rather draw the start token than anything else."""
    fields = {"vocab_size": 257, "bos_token_id": 256, "max_position_embeddings": processor.num_subpixels}
    model = make_model(variant, **fields, lm_head_bias=True)
    model.generation_config = processor.generation_config()
    with torch.no_grad():
        model.lm_head.bias[256] += 50
    return model


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=["cached", "static", "uncached"]
)
@pytest.mark.parametrize("variant", ["local", "simple-nopos", "dense"])
def test_a_model_draws_and_completes_pictures_that_fill_its_tables(variant, options):
    processor = AFTImageProcessor(size=SIZE)
    model = make_model_of(processor, variant)
    for images in (
        processor.postprocess(model.generate(torch.full((2, 1), 256), disable_compile=True, **options)),
        processor.postprocess(
            model.generate(max_new_tokens=45, num_return_sequences=2, disable_compile=True, **options)
        ),
    ):
        assert len(images) == 2
    pictures = make_pictures(3)
    made = model.generate(processor(pictures, num_rows=2).input_ids, disable_compile=True, **options)
    for picture, found in zip(pictures, processor.postprocess(made), strict=True):
        assert (np.asarray(found)[:2] == picture[:2]).all()


def test_the_loss_is_of_every_sub_pixel():
    processor = AFTImageProcessor(size=SIZE)
    model, ids = make_model_of(processor), processor(make_pictures(3)).input_ids
    loss = model(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:]).loss
    log_probs = model(ids[:, :-1]).logits.log_softmax(-1)
    expected = -sum(log_probs[b, t, ids[b, t + 1]] for b in range(2) for t in range(45)) / 90
    torch.testing.assert_close(loss, expected.float())


@pytest.mark.parametrize("with_code", [True, False], ids=["with-code", "without-code"])
def test_push_sends_the_processor_and_its_code(with_code, tmp_path, capsys, monkeypatch):
    processor = AFTImageProcessor(size=SIZE)
    make_model_of(processor).float().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if not with_code:
        from aft.model_code import remove_code

        remove_code(tmp_path)
    push([str(tmp_path), "me/pictures", "--dry_run"])
    output = capsys.readouterr().out
    assert all(
        name in output for name in ("image_processing_aft.py", "preprocessor_config.json", "AutoImageProcessor")
    )
    assert "unconditional-image-generation" in output and "AutoTokenizer" not in output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bos_token_id": 257}, "bos_token_id 257 .*vocab_size 257"),
        ({"size": {"height": 4, "width": 5}}, "60 sub-pix"),
    ],
    ids=["start", "size"],
)
def test_push_refuses_a_processor_of_another_model(fields, message, tmp_path):
    make_model_of(AFTImageProcessor(size=SIZE)).float().save_pretrained(tmp_path)
    AFTImageProcessor(**{"size": SIZE, **fields}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        push([str(tmp_path), "me/pictures", "--dry_run"])


def test_a_synthesizer_has_the_same_processor(tmp_path):
    SynthesizerForCausalLM(SynthesizerConfig(hidden_size=8, num_hidden_layers=1, vocab_size=257)).save_pretrained(
        tmp_path
    )
    AFTImageProcessor(size=SIZE).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is AFTImageProcessor
