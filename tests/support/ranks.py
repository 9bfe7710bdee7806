"""What each of several processes does in the tests of distributed training: ``python -m support.ranks FOLDER``."""

import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.adapting import adapt, gradients
from support.tiny_models import inputs_for, loss_of, text
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import initialize_router, last_route, pin_route
from tucka.peft.files.keys import plain_name

WORLD = 2
ROUTINGS = ("batch", "sample", "token")
SPLITS = {"equal": (2, 2), "unequal": (3, 1)}


def whole_model(kind, routing, **options):
    """The model that all processes start with."""
    given = {"dtype": torch.float64, "init_weights": False, "affinity": "dot", "k": 4, **options}
    return adapt(kind, routing=routing, **given).train()


def whole_batch(kind, seed=1):
    """The data of all processes together, with padding where the kind knows of it."""
    inputs = inputs_for(kind, dtype=torch.float64, batch=4, seed=seed)
    if kind == "bert":
        inputs["attention_mask"][1, 3:] = 0
    return inputs


def part_of(inputs, rank, split):
    """One process's rows, and the weight of their mean in the mean of all rows."""
    start = sum(SPLITS[split][:rank])
    size = SPLITS[split][rank]
    rows = {name: value[start : start + size] for name, value in inputs.items()}
    return rows, size * WORLD / sum(SPLITS[split])


def data_for_initialization(rank):
    """Batches that differ in number and size from process to process."""
    return [text(batch=4 + rank, seed=10 * rank + number) for number in range(2 + rank)]


def ddp_gradients(rank, kind, routing, split, *, checkpointed=False, pinned=False):
    model = whole_model(kind, routing)
    if pinned:
        pin_route(model, group=1)
    if checkpointed:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    wrapped = DistributedDataParallel(model)
    for seed in (1, 2):  # the second step would fail if the first had left a gradient out
        rows, weight = part_of(whole_batch(kind, seed), rank, split)
        (loss_of(wrapped, rows) * weight).backward()
    return {"gradients": gradients(model), "route": last_route(model)}


def sync_off(rank):
    model = whole_model("plain", "batch", sync_routing=False)
    rows, _ = part_of(whole_batch("plain"), rank, "equal")
    loss_of(model, rows)
    return last_route(model)


def one_evaluates_alone(rank):
    model = whole_model("llama", "batch")
    if rank == 0:
        inputs = text(batch=2)
        model.eval()
        loss_of(model, {**inputs, "labels": inputs["input_ids"]})
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        model.train()
        with torch.no_grad():
            model(**inputs)
    dist.barrier()
    return True


def initialized(rank):
    model = whole_model("llama", "sample", affinity="directional")
    initialize_router(model, data_for_initialization(rank), progress=False)
    router = scope_of(model).router("default")
    return {"centroids": router.centroids.detach(), "center": router.center}


def fully_sharded(rank):
    """FSDP2: gradients, initialisation into shards, saving."""
    from peft import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = whole_model("llama", "batch")
    root = model.base_model.model
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in root.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    rows, _ = part_of(whole_batch("llama"), rank, "equal")
    loss_of(model, rows).backward()
    full = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    route = last_route(model)
    initialize_router(model, [text(batch=4, seed=rank)], progress=False)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    saved = get_peft_model_state_dict(model, state_dict=state) if rank == 0 else {}
    return {"gradients": full, "route": route, "saved": saved}


def wrapped_by_the_older_fsdp(rank):
    """FSDP1 around the whole and each block: gradients, initialisation of a router in pieces, saving."""
    from peft import get_peft_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = whole_model("llama", "batch")
    blocks = ModuleWrapPolicy({type(model.base_model.model.model.layers[0])})
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=blocks, device_id=cpu, use_orig_params=True)
    rows, _ = part_of(whole_batch("llama"), rank, "equal")
    loss_of(wrapped, rows).backward()
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        found = gradients(wrapped)
        full = {plain_name(name): gradient for name, gradient in found.items() if "tucka_" in name}
    route = last_route(wrapped)
    initialize_router(wrapped, [text(batch=4, seed=rank)], progress=False)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        saved = get_peft_model_state_dict(model, state_dict=wrapped.state_dict())
    return {"gradients": full, "route": route, "saved": saved}


def through_accelerate(rank):
    """What `accelerate launch --cpu` and the Trainer do: prepare a model and an optimizer, accumulate, step."""
    from accelerate import Accelerator

    os.environ.update(WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = whole_model("bert", "batch")
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for seed in (1, 2):
        with accelerator.accumulate(wrapped):
            rows, _ = part_of(whole_batch("bert", seed), rank, "equal")
            accelerator.backward(loss_of(wrapped, rows))
            found = gradients(model)
            optimizer.step()
    return {"gradients": found, "kind": type(wrapped).__name__, "saved": accelerator.get_state_dict(wrapped)}


def all_results(rank):
    results = {}
    for kind in ("plain", "bert"):
        for routing in ROUTINGS:
            for split in SPLITS:
                results[kind, routing, split] = ddp_gradients(rank, kind, routing, split)
    results["checkpointed"] = ddp_gradients(rank, "llama", "batch", "equal", checkpointed=True)
    results["pinned"] = ddp_gradients(rank, "plain", "batch", "equal", pinned=True)
    results["sync off"] = sync_off(rank)
    results["alone"] = one_evaluates_alone(rank)
    results["initialized"] = initialized(rank)
    results["fsdp"] = fully_sharded(rank)
    results["older fsdp"] = wrapped_by_the_older_fsdp(rank)
    results["accelerate"] = through_accelerate(rank)
    return results


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timeout)
    torch.save(all_results(rank), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
