"""One process of a training with DeepSpeed on the CPU: ``python -m clients.zero FOLDER STAGE [WHAT]``.

Stage 0 trains without DeepSpeed. The Trainer trains, or resumes if told so. With a routing, TRL does, free of padding
if told so; in stage 3 its checkpoints are reentrant. Started by ``accelerate launch``, the stage "launched" takes the
launcher's settings.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_TORCH_DEVICE="cpu")

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from torch.utils.data import DataLoader, SequentialSampler
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from clients.small import ROUTINGS, adapted, arguments, llama, tokenizer
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import RouterCallback, initialize_router
from tucka.peft.files.sharded import whole_copy

FILES = Path(__file__).parents[2] / "docs" / "how-to" / "launch"
BATCH, STEPS, SAVED = 8, 6, 3


def use_gloo():
    """Accelerate knows no backend for DeepSpeed on a CPU."""
    theirs = PartialState._prepare_backend

    def prepare(self, cpu=False, sagemaker_dp=False, backend=None):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return "gloo", DistributedType.NO
        return theirs(self, cpu, sagemaker_dp, backend)

    PartialState._prepare_backend = prepare


def rows():
    """Texts of random tokens."""
    drawn = torch.randint(5, 261, (BATCH * STEPS, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in drawn]


def settings(stage):
    """The file of the docs for a stage; ZeRO-1 differs from ZeRO-2 in the stage alone."""
    entries = json.loads((FILES / f"zero{max(stage, 2)}.json").read_text())
    entries["zero_optimization"]["stage"] = stage
    entries["zero_allow_untested_optimizer"] = True
    if stage == 3:  # all parameters in pieces, however small
        entries["zero_optimization"].update(stage3_param_persistence_threshold=0, stage3_max_live_parameters=0)
    return entries


class InOrder(Trainer):
    """Without shuffling, so that two processes see the batches of one."""

    def _get_train_sampler(self, *_args, **_kwargs):
        return SequentialSampler(self.train_dataset)


class Watching(RouterCallback):
    """Notes the centroids after the start and after each step, as all processes together hold them."""

    def __init__(self):
        super().__init__(progress=False, max_batches=1)  # of one batch, the processes put its rows in their order
        self.centroids = []

    def note(self, model):
        self.centroids.append(whole_copy(model, scope_of(model).router("default"), "centroids").cpu())

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.note(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.note(kwargs["model"])


def train(folder, stage, *, resume):
    """Train with the Trainer, and write what happened."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    base = llama()
    base.save_pretrained(f"{folder}/base{rank}")
    more = {"use_cpu": True} if stage == 0 else {"use_cpu": False, "deepspeed": settings(stage)}
    given = arguments(
        TrainingArguments, folder, max_steps=STEPS, per_device_train_batch_size=BATCH // world,
        save_strategy="steps", save_steps=SAVED, adam_epsilon=1e-2, optim="adamw_torch", **more,
    )  # fmt: skip
    if stage == 3:  # while such arguments exist, `from_pretrained` cuts the weights
        base = type(base).from_pretrained(f"{folder}/base{rank}")
        assert base.model.layers[0].self_attn.q_proj.weight.numel() == 0
    model = adapted("sample", base=base, k=3)
    cores = [value.detach().clone() for name, value in model.named_parameters() if name.endswith("cores")]
    watch = Watching()
    trainer = InOrder(
        model=model, args=given, train_dataset=rows(), data_collator=default_data_collator, callbacks=[watch]
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED}" if resume else None)
    trainer.save_model(f"{folder}/{'resumed' if resume else 'saved'}")
    found = {"history": trainer.state.log_history, "centroids": watch.centroids, "cores": cores}
    if rank == "0":
        torch.save(found, f"{folder}/{'resumed' if resume else 'trained'}.pt")


def supervised(folder, stage, routing, *, padding_free):
    """Train with TRL, and write what happened."""
    import trl
    from datasets import Dataset

    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    llama().save_pretrained(f"{folder}/base{rank}")
    more = {"use_cpu": True} if stage == 0 else {"use_cpu": False, "deepspeed": settings(stage)}
    given = arguments(
        trl.SFTConfig, folder, max_steps=STEPS, per_device_train_batch_size=BATCH // world, optim="sgd",
        learning_rate=3.0, padding_free=padding_free, max_length=None if padding_free else 64,
        gradient_checkpointing=stage > 0, bf16=False, **more,
    )  # fmt: skip
    base = LlamaForCausalLM.from_pretrained(f"{folder}/base{rank}")
    assert (base.model.layers[0].self_attn.q_proj.weight.numel() == 0) == (stage == 3)
    model, watch = adapted(routing, base=base, k=3, init_weights=False), Watching()
    scope_of(model).router("default").is_initialized.fill_(1.0)  # alike however many processes see the rows

    class SupervisedInOrder(InOrder, trl.SFTTrainer):
        """As TRL does it, without shuffling."""

    trainer = SupervisedInOrder(
        model=model, args=given, processing_class=tokenizer(), callbacks=[watch],
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()]),
    )  # fmt: skip
    trainer.train()
    reentrant = (given.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    found = {"history": trainer.state.log_history, "centroids": watch.centroids, "reentrant": reentrant}
    if rank == "0":
        torch.save(found, f"{folder}/trained.pt")


def launched(folder):
    """Train in a loop of one's own, as the launcher's file says."""
    accelerator = Accelerator()
    model = adapted("sample")
    loader = DataLoader(rows(), batch_size=BATCH // 2, collate_fn=default_data_collator)
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=5e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    initialize_router(model, loader, progress=False)
    router = scope_of(model).router("default")
    started, losses = whole_copy(model, router, "centroids"), []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    drift = float((whole_copy(model, router, "centroids") - started).norm() / started.norm())
    kind = type(model).__name__, getattr(model, "zero_optimization_stage", int)(), accelerator.mixed_precision
    torch.save({"losses": losses, "drift": drift, "kind": kind}, f"{folder}/{accelerator.process_index}.pt")


if __name__ == "__main__":
    use_gloo()
    folder, stage = sys.argv[1:3]
    if stage == "launched":
        launched(folder)
    elif sys.argv[3:] and sys.argv[3] in ROUTINGS:
        supervised(folder, int(stage), sys.argv[3], padding_free="free" in sys.argv)
    else:
        train(folder, int(stage), resume="resume" in sys.argv)
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the threads of gloo sometimes end a process that closes them with an error
