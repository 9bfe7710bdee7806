"""
4. TuckerAdapter in your own model
==================================

In this lesson you put Tucker experts into your own torch model, without PEFT. You place two parts: a
:class:`~tucka.backends.torch.Router` that makes gates, and a :class:`~tucka.backends.torch.TuckerAdapter` around each
layer that is to be adapted. You pass the gates by hand, so there is no hidden state.

The task is made so that one expert does poorly and a mixture does well. Four sensors measure the same quantity, and
each sensor is mounted at another angle. A network was trained on a sensor that is mounted straight, and is frozen.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from tucka import TuckerSpec
from tucka.backends.torch import Router, TuckerAdapter

torch.manual_seed(0)
torch.set_num_threads(1)  # the tensors are small, so more threads do not help
width, sensors = 16, 4

# %%
# The data
# --------
#
# Each sensor *s* rotates its input by its own rotation and adds its own offset. The offset makes it possible to tell
# which sensor made a measurement, although no label says so.

rotations = torch.linalg.qr(torch.randn(sensors, width, width))[0]
offsets = 2.0 * torch.randn(sensors, width)


def measure(count):
    """Draw true states, sensors and the measurements that the sensors make."""
    state, sensor = torch.randn(count, width), torch.randint(sensors, (count,))
    seen = torch.einsum("nd,nde->ne", state, rotations[sensor]) + offsets[sensor]
    return state, sensor, seen


# %%
# The frozen network
# ------------------
#
# The network works on true states:

network = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 8))
teacher = nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, 8)).requires_grad_(
    False
)
optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
for _ in range(400):
    state = torch.randn(256, width)
    loss = (network(state) - teacher(state)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
network.requires_grad_(False)
state, _, seen = measure(4000)
target = network(state)
variance = target.var(dim=0).mean()
print(
    f"error on what sensors see: {(network(seen) - target).square().mean() / variance:.2f} of the variance"
)

# %%
# Adapt it
# --------
#
# Both linear layers get experts. One router serves both layers: it looks at the input, and all layers use its decision.
# An adapter only calls its base layer, so the base layer may also be quantised, sharded, or of your own class.


class Adapted(nn.Module):
    """The frozen network with Tucker experts before each of its layers."""

    def __init__(self, spec):
        super().__init__()
        self.router = Router(spec, in_features=width)
        self.first = TuckerAdapter(network[0], spec)
        self.second = TuckerAdapter(network[2], spec)

    def forward(self, x):
        """Route once, adapt twice."""
        gates = self.router(x)
        return self.second(torch.tanh(self.first(x, gates)), gates)


spec = TuckerSpec(rank=16, groups=sensors, experts_per_group=2, routing="sample")
adapted = Adapted(spec)
assert torch.equal(adapted(seen), network(seen))  # unchanged at the start

# %%
# Give the router its centroids
# -----------------------------
#
# The router subtracts a centre from the input and compares the direction of the result with a centroid for each expert.
# Here the sensor of a few measurements is known, so both experts of group *s* get the mean of sensor *s*. This route is
# right from the start, so the router is frozen. Where no sensor is known, :func:`tucka.balanced_centroids` splits
# unlabelled inputs evenly, and the router is trained further.

_, sensor, seen = measure(200)
center = seen.mean(dim=0)
means = torch.stack([seen[sensor == s].mean(dim=0) for s in range(sensors)])
adapted.router.initialize((means - center)[:, None].expand(sensors, 2, width), center)
_ = adapted.router.requires_grad_(False)

# %%
# Train
# -----
#
# The model trains like any other module. For comparison we also train a single expert with as many numbers in its core,
# which treats all sensors alike:


def train(model, steps=600):
    """Train on fresh measurements and return the error at each step, as a share of the variance."""
    optimizer = torch.optim.Adam(
        (p for p in model.parameters() if p.requires_grad), lr=1e-2
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors = []
    for _ in range(steps):
        state, _, seen = measure(256)
        loss = (model(seen) - network(state)).square().mean() / variance
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        errors.append(loss.item())
    return errors


alone = Adapted(
    TuckerSpec(rank=16, groups=1, experts_per_group=1, expert_rank=8, routing="sample")
)
curves = {"four groups of two experts": train(adapted), "one expert": train(alone)}
_, ax = plt.subplots(figsize=(6, 3.6))
for (label, errors), style in zip(curves.items(), ("-", "--"), strict=True):
    smooth = torch.tensor(errors).unfold(0, 20, 20).mean(dim=1)
    ax.plot(
        range(10, 600, 20), smooth, style, label=f"{label}: {smooth[-1]:.2f} at the end"
    )
ax.set(
    xlabel="training step",
    ylabel="error / variance",
    yscale="log",
    title="Four sensors, one frozen network",
)
legend = ax.legend(frameon=False)
last = {label: sum(errors[-20:]) / 20 for label, errors in curves.items()}
assert last["four groups of two experts"] < last["one expert"] / 2

# %%
# Which group serves which sensor
# -------------------------------
#
# Rows are sensors, columns are groups. Only the position of an input shows which sensor made it:

from tucka.plots import group_by_label

_, sensor, seen = measure(4000)
chosen = adapted.router(seen).sum(dim=-1).argmax(dim=-1)
table = {
    f"sensor {s}": torch.bincount(chosen[sensor == s], minlength=sensors).tolist()
    for s in range(sensors)
}
_, ax = plt.subplots(figsize=(4.6, 3.2))
axes = group_by_label(table, ax=ax)
assert (chosen == sensor).float().mean() > 0.9

# %%
# Finer and coarser
# -----------------
#
# The specification alone says whether the router decides for a batch, a sample or a token. The layers accept all three
# kinds of gates, because the leading axes of gates align with those of the activations:

x = torch.randn(5, 7, width)
for routing in ("batch", "sample", "token"):
    model = Adapted(TuckerSpec(rank=4, groups=3, routing=routing))
    print(
        f"{routing:7} gates {tuple(model.router(x).shape)!s:14} output {tuple(model(x).shape)}"
    )

# %%
# Convolutions
# ------------
#
# A convolution is adapted along its channels, whatever its kernel is:

convolution = TuckerAdapter(
    nn.Conv2d(8, 4, kernel_size=3, padding=1),
    TuckerSpec(rank=4, groups=2, routing="sample"),
)
images = torch.randn(6, 8, 10, 10)
router = Router(convolution.spec, in_features=8)
outputs = convolution(images, router(images.mean(dim=(2, 3))))
assert outputs.shape == (6, 4, 10, 10)
outputs.shape

# %%
# If a model is too deep to pass gates through by hand, adapt it with PEFT: the layers then find the route of the forward
# that runs. :doc:`/how-to/own-model` shows what to declare, and :doc:`/explanation/routes` which route a layer gets.
