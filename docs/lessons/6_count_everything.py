r"""
6. Count everything
===================

In this lesson you count what an adapter costs before you build anything. You count parameters, multiply-adds and memory
by formula, and check each formula against what PyTorch really does. You also check the paper's
:math:`\mathcal{O}(\tfrac{p}{k}M + kpr^2 + dr)` term by term.
"""

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tucka
from tucka.backends.torch import tucker_adapt
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
assert counted == by_hand

# %%
# PEFT builds and trains the same number:


def model():
    """Return a stack of linear layers of these widths."""
    return nn.Sequential(*(nn.Linear(*widths, bias=False) for widths in layers))


def trained(adapted):
    """Count the trained parameters."""
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
assert trained(adapted) == counted
assert trained(lora) == tucka.count_parameters("lora", layers, r=4)

# %%
# Term by term
# ------------
#
# With *M* = *kt* experts in all, :math:`tp = \tfrac{p}{k} M`. Now increase one size of a layer at a time, and see what
# it costs. The router is left out here (``pinned=True``), as in the paper's formula:


def layer(t=4, k=3, p=2, r=8, d=768, out=768):
    """Count one layer without a router."""
    return tucka.count_parameters("tucka", [(d, out)], t=t, k=k, p=p, r=r, pinned=True)


print("one more expert in each group:", layer(t=5) - layer(), "= p")
print("one more group:               ", layer(k=4) - layer(), "= p r²")
print("one more unit of width:       ", layer(d=769) - layer(), "= r")
print("a wider output:               ", layer(out=3072) - layer())
assert layer(t=5) - layer() == 2
assert layer(k=4) - layer() == 2 * 8**2
assert layer(d=769) - layer() == 8
assert layer(out=3072) == layer()

# %%
# Two sizes are not linear: the rank enters as a square, and the number of slices multiplies this square. So we check
# the whole polynomial on a grid:

assert all(
    layer(t=t, k=k, p=p, r=r, d=d) == t * p + k * p * r**2 + d * r
    for t in (1, 2, 5)
    for k in (1, 3)
    for p in (1, 2, 4)
    for r in (1, 8, 16)
    for d in (64, 768)
)

# %%
# The next figure is the paper's Figure 1(b). Separate experts cost their full price each, groups cost a core each, and
# experts within a group cost very little.

_, ax = plt.subplots(figsize=(6, 4))
axes = parameter_scaling(ax=ax)

# %%
# Multiply-adds
# -------------
#
# For each token a layer takes :math:`2dr + r^2` multiply-adds. PyTorch can count the operations that it executes; it
# counts two operations for each multiply-add:

x, basis, mixed_core = torch.randn(10, 768), torch.randn(768, 8), torch.randn(8, 8)
with FlopCounterMode(display=False) as counter:
    tucker_adapt(x, basis, mixed_core)
print(counter.get_total_flops() // 2, 10 * (2 * 768 * 8 + 8 * 8))
assert counter.get_total_flops() // 2 == 10 * (2 * 768 * 8 + 8 * 8)

# %%
# Mixing the cores and routing cost once for each decision, and not for each token. With a few tokens their share is
# already small:

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
# Training keeps tensors from the forward to the backward. PyTorch can show which tensors these are:


def kept_bytes(module, x):
    """Sum the bytes that a forward keeps: each storage once, without the module's own tensors."""
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
pin_route(one_layer, group=0)  # no routing, so that the layer alone is measured
x = torch.randn(512, 768)
formula = tucka.count_activation_bytes(
    "tucka", [(768, 768)], tokens=512, r=8, k=4, pinned=True
)
watched = kept_bytes(one_layer, x)
assert abs(watched - formula) < 0.001 * formula
print(f"watched {watched:,}, by formula {formula:,}; the input alone is {x.nbytes:,}")

# %%
# The layer keeps the input, the thin product *xU* and the mixed core. LoRA keeps the input and its thin product.
#
# The size of a file is counted as well:

print(
    f"{tucka.count_file_bytes('tucka', layers, r=4, k=3):,} bytes beside {4 * counted:,} of parameters"
)

# %%
# Side by side
# ------------
#
# The last table shows all counts for the layers of a BERT-base and a batch of 16 texts of 128 tokens. HRA is PEFT's,
# which forms d × d matrices. ``tucka count`` prints such a table in a terminal.

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
for row in tucka.compare_methods(base, methods, tokens=16 * 128, samples=16):
    print(
        f"{row.method:8}{row.parameters:12,}{row.share:8.2%}{row.forward / 1e9:9.2f}G{row.backward / 1e9:9.2f}G"
        f"{row.file_bytes / 1e6:9.2f}{row.activation_bytes / 1e6:9.0f}"
    )
