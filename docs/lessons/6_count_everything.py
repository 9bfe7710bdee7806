r"""
6. Count everything
===================

What an adapter costs follows from its sizes, so it can be known before anything is built. This lesson counts
parameters, multiply-adds and memory by formula, and checks each of them against what PyTorch really does. At the end
it checks the paper's :math:`\mathcal{O}(\tfrac{p}{k}M + kpr^2 + dr)` term by term.
"""

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tucka
from tucka.backends.torch import tucker_adapt
from tucka.core.counts import compare_methods
from tucka.peft import TuckAConfig, pin_route
from tucka.plots import parameter_scaling

# %%
# Parameters
# ----------
#
# A layer holds :math:`tp` numbers in the expert factor, :math:`kpr^2` in the cores and :math:`dr` in the basis. The
# router holds :math:`ktd`, once for the whole model. The functions take the layers as pairs of widths:

layers = [(64, 64)] * 3 + [(64, 256), (256, 64)]
counted = tucka.count_parameters("tucka", layers, r=4, k=3, t=2, p=2)
by_hand = sum(2 * 2 + 3 * 2 * 4 * 4 + d * 4 for d, _ in layers) + 3 * 2 * 64
print(counted, by_hand)

# %%
# And this is what PEFT builds and trains:


def model():
    """Return a stack of linear layers of these widths."""
    return nn.Sequential(*(nn.Linear(*widths, bias=False) for widths in layers))


def trained(adapted):
    """Count the numbers that are trained."""
    return sum(
        parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad
    )


names = [str(index) for index in range(len(layers))]
adapted = get_peft_model(
    model(), TuckAConfig(r=4, k=3, routing="sample", target_modules=names)
)
lora = get_peft_model(model(), LoraConfig(r=4, target_modules=names))
print(
    "tucka",
    trained(adapted),
    "lora",
    trained(lora),
    tucka.count_parameters("lora", layers, r=4),
)

# %%
# Term by term
# ------------
#
# With *M* = *kt* experts in all, :math:`tp = \tfrac{p}{k} M`. Now add one of each thing to a layer, and look at what it
# costs. The router is left out here (``pinned=True``), as in the paper's formula:


def layer(t=4, k=3, p=2, r=8, d=768, out=768):
    """Count one layer without a router."""
    return tucka.count_parameters("tucka", [(d, out)], t=t, k=k, p=p, r=r, pinned=True)


print("one more expert in each group:", layer(t=5) - layer(), "= p")
print("one more group:               ", layer(k=4) - layer(), "= p r²")
print("one more unit of width:       ", layer(d=769) - layer(), "= r")
print("a wider output:               ", layer(out=3072) - layer())

# %%
# Two sizes are not linear. The rank enters as a square and the number of slices multiplies it, so check the whole
# polynomial on a grid:

all(
    layer(t=t, k=k, p=p, r=r, d=d) == t * p + k * p * r**2 + d * r
    for t in (1, 2, 5)
    for k in (1, 3)
    for p in (1, 2, 4)
    for r in (1, 8, 16)
    for d in (64, 768)
)

# %%
# Drawn, that is the paper's Figure 1(b): separate experts cost their full price each, groups a core each, and experts
# within a group next to nothing.

_, ax = plt.subplots(figsize=(6, 4))
axes = parameter_scaling(ax=ax)

# %%
# Multiply-adds
# -------------
#
# For each token a layer takes :math:`2dr + r^2`. PyTorch can count what it executes; it counts two operations for each
# multiply-add:

x, basis, mixed_core = torch.randn(10, 768), torch.randn(768, 8), torch.randn(8, 8)
with FlopCounterMode(display=False) as counter:
    tucker_adapt(x, basis, mixed_core)
print(counter.get_total_flops() // 2, 10 * (2 * 768 * 8 + 8 * 8))

# %%
# Mixing the cores, and routing, are paid once for each decision, not for each token. So they vanish as soon as there
# are a few tokens:

tokens = (1, 10, 100, 1000)
total = [
    tucka.count_flops("tucka", [(768, 768)], tokens=count, r=8, k=4) for count in tokens
]
for count, ours in zip(tokens, total, strict=True):
    print(
        f"{count:5} tokens: {ours / count:10,.0f} multiply-adds a token, beside the layer's own {768 * 768:,}"
    )

# %%
# Memory
# ------
#
# Training keeps tensors from the forward to the backward. PyTorch lets one watch which:


def kept_bytes(module, x):
    """Sum the bytes that a forward keeps, each storage once, beside the module's own tensors."""
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*module.parameters(), *module.buffers())
    }
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = module(x)
        return sum(size for place, size in storages.items() if place not in own)


one_layer = get_peft_model(
    nn.Sequential(nn.Linear(768, 768)), TuckAConfig(r=8, k=4, target_modules=["0"])
)
pin_route(one_layer, group=0)  # without its router, to see the layer alone
x = torch.randn(512, 768)
formula = tucka.count_activation_bytes(
    "tucka", [(768, 768)], tokens=512, r=8, k=4, pinned=True
)
print(
    f"watched {kept_bytes(one_layer, x):,}, by formula {formula:,}; the input alone is {x.nbytes:,}"
)

# %%
# What it keeps is the input, the thin product *xU* and the mixed core. LoRA keeps the input and its thin product.
#
# A file is counted as well:

print(
    f"{tucka.count_file_bytes('tucka', layers, r=4, k=3):,} bytes beside {4 * counted:,} of parameters"
)

# %%
# Side by side
# ------------
#
# All of it at once, for the layers of a BERT-base and a batch of 16 texts of 128 tokens; HRA is PEFT's, which forms
# d × d matrices. ``tucka count`` prints such a table in a terminal.

base = ([(768, 768)] * 4 + [(768, 3072), (3072, 768)]) * 12
methods = {
    "lora": {"r": 8},
    "dora": {"r": 8},
    "hra": {"r": 8},
    "tucka": {"r": 8, "k": 4},
}
print(
    f"{'':8}{'parameters':>12}{'share':>8}{'forward':>10}{'backward':>10}{'file MB':>9}{'kept MB':>9}"
)
for row in compare_methods(base, methods, tokens=16 * 128, samples=16):
    print(
        f"{row.method:8}{row.parameters:12,}{row.share:8.2%}{row.forward / 1e9:9.2f}G{row.backward / 1e9:9.2f}G"
        f"{row.file_bytes / 1e6:9.2f}{row.activation_bytes / 1e6:9.0f}"
    )
