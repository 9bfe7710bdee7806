"""What each of several processes does in the tests of distributed training: ``python -m support.ranks FOLDER``."""

import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support.adapting import adapt, gradients
from support.tiny_models import inputs_for, loss_of, make, text
from support.upstream import checkpoint_layers
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import TuckaError
from tucka.peft import TuckAConfig, initialize_router, last_route, pin_route, set_routing_group
from tucka.peft.files.keys import plain_name

WORLD = 2
UNCUT = ["q_proj", "v_proj", "gate_proj"]  # transformers cuts these along their output
ROUTINGS = ("batch", "sample", "token")
SPLITS = {"equal": (2, 2), "unequal": (3, 1)}


def whole_model(kind, routing, *, started=True, **options):
    """The model that all processes start with; a router that is not started starts itself where that is right."""
    given = {"dtype": torch.float64, "init_weights": False, "affinity": "dot", "k": 4, **options}
    model = adapt(kind, routing=routing, **given).train()
    for router in scope_of(model).routers("default").values() if started else ():
        router.initialize(router.centroids.detach().clone())
    return model


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


def ddp_gradients(rank, kind, routing, split, *, checkpointed=False, reentrant=False, pinned=False):
    model = whole_model(kind, routing, started=False)
    if pinned:
        pin_route(model, group=1)
    if checkpointed:
        checkpoint_layers(model, reentrant=reentrant)
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


def message_of(action):
    """The message that an action is refused with; "" if it is not."""
    try:
        action()
    except TuckaError as error:
        return str(error)
    return ""


def in_a_group_of_its_own(rank):
    """One of two process groups, in which the process is alone: the other's batch has no part in its route."""
    groups = [dist.new_group([other]) for other in range(WORLD)]
    model = whole_model("plain", "batch")
    rows, _ = part_of(whole_batch("plain"), rank, "equal")
    set_routing_group(model, groups[rank])
    loss_of(model, rows)
    return last_route(model)


def tensor_parallel(rank, folder, routing):
    """Layers that transformers cuts along their output; those that it cuts along their input are refused."""
    from transformers.distributed import DistributedConfig

    base = make("llama", dtype=torch.float64, num_key_value_heads=2)
    base.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    cut = type(base).from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=WORLD, tp_plan="auto"), dtype=torch.float64
    )
    refused = message_of(lambda: whole_model("llama", routing, model=cut, target_modules=["o_proj"]))
    model = whole_model("llama", routing, model=cut, target_modules=UNCUT).eval()
    inputs = inputs_for("llama", batch=4)
    output = model(**inputs)
    output.loss.backward()
    return {"logits": output.logits.detach(), "gradients": gradients(model), "refused": refused}


class Stages(nn.Module):
    """Two layers, one for each stage."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleDict({str(number): nn.Linear(6, 6, dtype=torch.float64) for number in range(WORLD)})

    def forward(self, x):
        for stage in self.stages.values():
            x = stage(x).tanh()
        return x


def staged_model(**options):
    torch.manual_seed(0)
    config = TuckAConfig(r=2, k=3, routing="sample", target_modules=["0", "1"], init_weights=False, **options)
    return get_peft_model(Stages(), config, autocast_adapter_dtype=False)


def in_stages(rank):
    """A pipeline of torch's: each process deletes the other's layer. Only the first one has the router."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    def scheduled(model, **targets):
        del model.base_model.model.stages[str(1 - rank)]
        stage = PipelineStage(model, rank, WORLD, torch.device("cpu"))
        losses = {"loss_fn": lambda y, target: (y * target).sum()} if targets else {}
        schedule = ScheduleGPipe(stage, n_microbatches=2, scale_grads=False, **losses)
        first = (torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6),) if rank == 0 else ()
        return schedule.step(*first, **(targets if rank == WORLD - 1 else {}))

    model = staged_model()
    pin_route(model, group=1)
    output = scheduled(model, target=torch.ones(4, 6, dtype=torch.float64))
    routed = staged_model()
    del routed.base_model.model.stages[str(1 - rank)]
    refused = message_of(lambda: routed(torch.ones(4, 6, dtype=torch.float64)))
    return {"output": output, "gradients": gradients(model), "refused": refused}


def all_results(rank, folder):
    results = {}
    for kind in ("plain", "bert"):
        for routing in ROUTINGS:
            for split in SPLITS:
                results[kind, routing, split] = ddp_gradients(rank, kind, routing, split)
    for reentrant in (False, True):
        options = {"checkpointed": True, "reentrant": reentrant}
        results["checkpointed", reentrant] = ddp_gradients(rank, "llama", "batch", "equal", **options)
    results["pinned"] = ddp_gradients(rank, "plain", "batch", "equal", pinned=True)
    results["sync off"] = sync_off(rank)
    results["alone"] = one_evaluates_alone(rank)
    results["initialized"] = initialized(rank)
    results["group"] = in_a_group_of_its_own(rank)
    results["tensor parallel"] = {
        routing: tensor_parallel(rank, f"{folder}/{routing}", routing) for routing in ROUTINGS
    }
    results["stages"] = in_stages(rank)
    results["fsdp"] = fully_sharded(rank)
    results["older fsdp"] = wrapped_by_the_older_fsdp(rank)
    results["accelerate"] = through_accelerate(rank)
    return results


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    os.environ.update(WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timeout)
    torch.save(all_results(rank, folder), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
