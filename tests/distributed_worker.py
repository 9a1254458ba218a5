"""What each of the processes of test_distributed.py runs, as `torchrun distributed_worker.py FOLDER` does.

FOLDER has the file `runs.json`: arguments of scripts/pretrain_enwik8.py by the names of runs. The first process writes
what it finds to FOLDER.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from families import make_ids, make_model, make_seq2seq
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, Trainer, TrainingArguments

from aft.commands.pretrain import main as pretrain
from modeling_aft.modeling_stack import MixerBlock


STEPS, BATCH, LENGTH = 4, 4, 12
SEQ2SEQ = "encoder-decoder"  # beside the variants
# One of each kind of parameters.
KINDS = ["full", "full-dense", "local", "simple-nopos", "conv-nopos", "conv-1", "relative-decay", "z1t", "dense"]
KINDS += ["random", "factorized-random", "dense+random+factorized_dense+dot_product", SEQ2SEQ]
CARRIED = ["simple-nopos", "conv-nopos"]  # the variants that can train with a carried state


def make_any(variant):
    return make_seq2seq("random+dot_product") if variant == SEQ2SEQ else make_model(variant)


def train_steps(model, optimizer, steps, rank=0, size=1):
    """The mean loss of every step, on this process's rows of its batch."""
    losses = []
    for step in steps:
        ids = make_ids(LENGTH, BATCH, seed=step).chunk(size)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def carry_steps(model, optimizer, steps, rank=0, size=1):
    """The same where each row goes on with the detached state of the step before."""
    losses, cache = [], DynamicCache(config=model.config)
    for step in steps:
        ids = make_ids(LENGTH, BATCH, seed=step).chunk(size)[rank]
        loss = model(input_ids=ids, labels=ids, cache=cache).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in cache.layers:
            layer.detach()
        losses.append(loss.detach())
    return torch.stack(losses)


def new_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train_with_trainer(model, folder, per_process):
    """The weights after an epoch of two steps of the Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=per_process,
        num_train_epochs=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        ddp_find_unused_parameters=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in make_ids(LENGTH, 2 * BATCH)]
    Trainer(model, arguments, train_dataset=rows).train()
    return model.state_dict()


def sharded(variant):
    """A model whose blocks, and the rest of it, are sharded over the processes, and its optimizer."""
    model = make_any(variant).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [module for module in model.modules() if isinstance(module, MixerBlock)]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, new_optimizer(model)


def whole_weights(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train_sharded(variant, folder):
    """Losses and weights of a sharded run, and the weights of one that went on from its checkpoint."""
    where = {"rank": dist.get_rank(), "size": dist.get_world_size()}
    model, optimizer = sharded(variant)
    losses = train_steps(model, optimizer, range(STEPS // 2), **where)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    losses = torch.cat([losses, train_steps(model, optimizer, range(STEPS // 2, STEPS), **where)])
    dist.all_reduce(losses)
    found = {"losses": losses / where["size"], "weights": whole_weights(model)}
    if where["rank"] == 0:
        model.save_pretrained(folder, state_dict=dict(found["weights"]))  # of which it lets go, one by one

    model, optimizer = sharded(variant)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    weights, state = get_state_dict(model, optimizer)
    state = {"weights": weights, "optimizer": state}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"])
    train_steps(model, optimizer, range(STEPS // 2, STEPS), **where)
    return {**found, "resumed": whole_weights(model)}


def carry_sharded(variant):
    """Losses and weights of a sharded run that carries its state."""
    where = {"rank": dist.get_rank(), "size": dist.get_world_size()}
    model, optimizer = sharded(variant)
    losses = carry_steps(model, optimizer, range(STEPS), **where)
    dist.all_reduce(losses)
    return {"losses": losses / where["size"], "weights": whole_weights(model)}


def pretrain_and_resume(folder, name, arguments):
    """A run of the script in the folder `name`, and in `name-resumed` one from its checkpoint after two steps."""
    checkpoint = folder / name / "checkpoints" / "step-2"
    for run, resume in ((name, "none"), (f"{name}-resumed", str(checkpoint))):
        AcceleratorState._reset_state(reset_partial_state=True)  # as it is in a new process
        if not dist.is_initialized():
            join(folder, f"group-{run}")
        pretrain([*arguments, "--output_dir", str(folder / run), "--resume", resume])


def join(folder, name):
    """Starts a process group, which the file `name` brings together: a run of the script ends the one that it uses."""
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / name}", world_size=size, rank=rank)


def main(folder):
    torch.set_num_threads(1)
    join(folder, "first")
    found = {
        variant: {
            **train_sharded(variant, folder / variant),
            "trainer": train_with_trainer(make_any(variant).train(), folder / "trainer", BATCH // 2),
        }
        for variant in KINDS
    }
    for variant in CARRIED:
        found[variant]["carried"] = carry_sharded(variant)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        pretrain_and_resume(folder, name, arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
