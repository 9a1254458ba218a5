"""`transformers serve` answers requests of the unmodified OpenAI client with the text of greedy decoding."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from families import make_model
from openai import OpenAI
from torch import float32
from transformers.cli.serving.model_manager import ModelManager

from aft.chats import prepare_tokenizer
from modeling_aft import ByteTokenizer


PRINTABLE = range(32, 127)
PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "Who is there?"}]
VARIANTS = ["conv-nopos", "dense+dot_product"]


def save(variant, folder):
    """A model that says nothing but ASCII, and the tokenizer that `aft finetune --chat_file` saves."""
    model, tokenizer = make_model(variant, dtype=float32), ByteTokenizer()
    prepare_tokenizer(tokenizer, "--model")
    model.generation_config.suppress_tokens = [byte for byte in range(256) if byte not in PRINTABLE]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def let_the_server_find_the_class(folder):
    """The server looks for `architectures` inside of transformers, where a class of custom code is not to be found."""
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["AutoModelForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


def start(folder, options):
    """The process of a server on a free port, and its address, once it answers."""
    log = folder / "server.log"
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", "0", *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    for _ in range(1800):
        if address := re.search(r"running on (http://\S+)", log.read_text()):
            return process, address[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"The server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The client of one server, and of each variant its folder, model and tokenizer."""
    folder, models = tmp_path_factory.mktemp("serve"), {}
    for variant in VARIANTS:
        models[variant] = str(folder / variant), *save(variant, folder / variant)
        let_the_server_find_the_class(folder / variant)
    process, address = start(folder, ["--host", "127.0.0.1", "--device", "cpu", "--trust-remote-code"])
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client, models
    process.terminate()
    process.wait(timeout=30)


def greedy(model, tokenizer, prompt):
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_completions_are_the_text_of_greedy_decoding(served, variant, stream):
    client, models = served
    folder, model, tokenizer = models[variant]
    answer = client.completions.create(model=folder, prompt=PROMPT, max_tokens=8, temperature=0, stream=stream)
    text = "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text
    assert len(text) == 8 and text == greedy(model, tokenizer, PROMPT)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chats_are_put_into_the_template_of_the_folder(served, variant, stream):
    client, models = served
    folder, model, tokenizer = models[variant]
    answer = client.chat.completions.create(model=folder, messages=CHAT, max_tokens=8, temperature=0, stream=stream)
    if stream:
        text = "".join(part.choices[0].delta.content or "" for part in answer)
    else:
        text = answer.choices[0].message.content
    assert len(text) == 8 and text == greedy(model, tokenizer, CHAT)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_responses_are_those_of_the_chat(served, variant, stream):
    client, models = served
    folder, model, tokenizer = models[variant]
    answer = client.responses.create(model=folder, input=CHAT, max_output_tokens=8, temperature=0, stream=stream)
    if stream:
        text = "".join(event.delta for event in answer if event.type == "response.output_text.delta")
    else:
        text = answer.output_text
    assert len(text) == 8 and text == greedy(model, tokenizer, CHAT)


def test_without_the_change_of_its_config_a_folder_is_not_served(tmp_path):
    """When this fails, the server has learnt to load custom code by `auto_map`."""
    save("conv-nopos", tmp_path)
    with pytest.raises(AttributeError, match="transformers has no attribute AFTForCausalLM"):
        ModelManager(force_model=str(tmp_path), device="cpu", trust_remote_code=True)
    let_the_server_find_the_class(tmp_path)
    ModelManager(force_model=str(tmp_path), device="cpu", trust_remote_code=True)
