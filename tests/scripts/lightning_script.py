"""Lightning, which takes the ranks' variables for torchrun's."""

import os

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset


class Line(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def training_step(self, batch, index):
        (x,) = batch
        loss = (self.linear(x).squeeze(-1) - x.sum(1)).square().mean()
        mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        if self.global_rank == 0:
            print("loss", mean.item().hex(), flush=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    lightning.seed_everything(0)
    per_host = int(os.environ["LOCAL_WORLD_SIZE"])
    data = DataLoader(TensorDataset(torch.arange(128.0).reshape(64, 2) / 128), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=per_host,
        num_nodes=int(os.environ["WORLD_SIZE"]) // per_host,
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert trainer.world_size == 4
    trainer.fit(Line(), data)
