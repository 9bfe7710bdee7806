"""Lightning: a training that is stopped and resumed ends bit for bit as one that was not."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import TuckAConfig, initialize_router

lightning = pytest.importorskip("lightning")


def data():
    torch.manual_seed(1)
    x = torch.randn(64, 8)
    return DataLoader(TensorDataset(x, x.sum(-1, keepdim=True).sin()), batch_size=8)


class Regression(lightning.LightningModule):
    def __init__(self, routing):
        super().__init__()
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.model = get_peft_model(base, TuckAConfig(r=4, k=3, routing=routing, target_modules=["0", "2"]))
        self.losses = []

    def on_fit_start(self):
        if scope_of(self.model).router("default").waits:
            initialize_router(self.model, [x for x, _ in data()], progress=False)

    def training_step(self, rows, _index):
        x, y = rows
        loss = nn.functional.mse_loss(self.model(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam((value for value in self.parameters() if value.requires_grad), lr=1e-2)


def trainer(folder, epochs):
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_a_resumed_training_is_the_whole_one(tmp_path, routing):
    whole = Regression(routing)
    trainer(tmp_path, 4).fit(whole, data())
    assert sum(whole.losses[-8:]) < sum(whole.losses[:8])
    first, path = Regression(routing), tmp_path / "half.ckpt"
    half = trainer(tmp_path, 2)
    half.fit(first, data())
    half.save_checkpoint(path)
    resumed = Regression(routing)
    trainer(tmp_path, 4).fit(resumed, data(), ckpt_path=str(path))
    assert resumed.losses == whole.losses[len(first.losses) :]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
