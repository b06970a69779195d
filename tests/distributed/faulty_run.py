"""A run of several ranks in which one fails: `python faulty_run.py FOLDER HOW RANK ITERATION`.

With HOW "resume" nothing fails. Every rank writes its process's number to FOLDER.pids.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import tiny_training

from pyloss import optim
from pyloss.distributed import init

folder, how, who, when = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
group = init()
with open(f"{folder}.pids", "a") as pids:
    pids.write(f"{group.rank()} {os.getpid()}\n")
tiny_training.install()
calls = 0


def loss(model, batch, lengths):
    global calls
    calls += model.training
    value, weight = tiny_training.tiny_loss(model, batch, lengths)
    if calls == when and model.training and group.rank() == who:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "term":
            signal.raise_signal(signal.SIGTERM)
        if how == "memory":
            raise MemoryError("no room for the batch")
        if how == "record":
            raise ValueError("sample 7 has no answer")
        if how == "nan":
            value = np.nan
    return value, weight


class Printing(tiny_training.Recorder):
    def on_train_loss_report(self, info):
        print(info["iteration"], repr(info["train_loss"]), flush=True)


data = tiny_training.samples(24)  # every rank has rows in every batch of 12
if how == "data" and group.rank() == who:
    data[3] = ([1, 2, 3, 4], 1)
seed = 1 if how == "model" and group.rank() == who else 0
tiny_training.run(
    folder,
    tiny_training.Tiny(seed),
    optim.AdamW(0.05),
    loss=loss,
    data=data,
    callback=Printing(),
    batch_size=12 // group.size(),
    iters=int(os.environ.get("ITERS", "14")),
    steps_per_save=2,
    steps_per_eval=3,
    resume=(folder / "trainer_state.safetensors").exists(),
    grad_accumulation_steps=2,
)
print("end", flush=True)
