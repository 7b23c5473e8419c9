"""Trainer with DeepSpeed's ZeRO-3 in one process: DIRECTORY. On the CPU it is given one rank."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
}


def train(directory: Path) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from transformers import Trainer, TrainingArguments

    spec = importlib.util.spec_from_file_location("small", Path(__file__).parent / "conftest.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    arguments = TrainingArguments(
        str(directory),
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        report_to=[],
        disable_tqdm=True,
        deepspeed=CONFIG,
    )
    ids = torch.randint(0, 48, (6, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(small.small_model(), arguments, train_dataset=rows)
    trainer.train()
    truth = {
        name: {
            "weight": safe_get_full_fp32_param(p),
            "exp_avg": safe_get_full_optimizer_state(p, "exp_avg"),
            "exp_avg_sq": safe_get_full_optimizer_state(p, "exp_avg_sq"),
        }
        for name, p in trainer.model.named_parameters()
    }
    torch.save(truth, directory / "truth.pt")


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler then
        deepspeed.init_distributed(
            "gloo",
            auto_mpi_discovery=False,
            init_method=f"file://{directory}.store",
            rank=0,
            world_size=1,
        )
        train(directory)
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


if __name__ == "__main__":
    main()
