"""Small models and texts for the libraries that use tucka."""

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tucka.peft import TuckAConfig, initialize_router, pin_route

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|eos|>"
    "{% endgeneration %}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
TEXTS = ["how do I reset my password", "the cat sat on the mat", "stock prices fell", "best pasta recipe"]
ROUTINGS = ("batch", "sample", "token")
SIZES = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokenizer(side="right"):
    """Bytes, and five special tokens."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, **names, additional_special_tokens=SPECIAL[3:], padding_side=side
    )
    wrapped.chat_template = CHAT
    return wrapped


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options)).eval()


def reward_model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval()


def config(routing="sample", **options):
    """All linear layers of a block, four groups."""
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    given = {"r": 8, "k": 4, "routing": routing, "target_modules": layers, "task_type": "CAUSAL_LM", **options}
    return TuckAConfig(**given)


def adapted(routing="sample", base=None, **options):
    model = llama() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(model, config(routing, **options))


def arguments(kind, folder, **options):
    """Arguments of a Trainer: a few steps on the CPU."""
    given = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "seed": 0, **options,
    }  # fmt: skip
    return kind(**given)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Logits(torch.nn.Module):
    """Two tensors in, one out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def classifier(routing):
    """An encoder whose logits come from ids and mask, in evaluation, with a router that uses all groups."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = BertForSequenceClassification(BertConfig(vocab_size=261, attn_implementation="eager", **sizes)).eval()
    options = {"routing": "sample" if routing == "pinned" else routing, "target_modules": ["query", "value"]}
    adapted = get_peft_model(base, TuckAConfig(r=8, k=3, init_weights=False, **options)).eval()
    if routing == "pinned":
        pin_route(adapted, group=1)
    else:  # so that all groups are used
        batches = [dict(zip(("input_ids", "attention_mask"), padded(seed, 8, 9), strict=True)) for seed in range(8)]
        initialize_router(adapted, batches, progress=False)
    return Logits(adapted).eval().requires_grad_(False)


def padded(seed, rows, tokens):
    """Ids and mask, of which one row has padding."""
    ids = torch.randint(5, 261, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return ids, mask
