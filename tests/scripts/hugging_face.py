"""Hugging Face's Trainer, which takes the ranks' variables for torchrun's."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments


class Lines(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        x = torch.tensor([index / 64, 1 - index / 64])
        return {"x": x, "labels": x.sum()}


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        y = self.linear(x).squeeze(-1)
        return {"loss": (y - labels).square().mean(), "logits": y}


class Shown(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs and state.is_world_process_zero:
            print("loss", float(logs["loss"]).hex(), float(logs["grad_norm"]).hex(), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir="trainer-output",
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        learning_rate=0.1,
    )
    assert arguments.world_size == 4
    Trainer(model=Line(), args=arguments, train_dataset=Lines(), callbacks=[Shown()]).train()
