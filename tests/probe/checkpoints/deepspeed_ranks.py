"""Train a small model under DeepSpeed and save it, one child process per rank.

DIRECTORY RANK SIZE CASE...; a case is `zSTAGE-DTYPE`, with `-tied`, `-accum32` or `-amsgrad`
appended. What DeepSpeed's own calls say of every parameter goes to DIRECTORY/CASE.truth.pt.
"""

import importlib.util
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

NUM_STEPS = 3


def load_small():
    spec = importlib.util.spec_from_file_location("small", Path(__file__).parent / "conftest.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    return small


def settings(case: str, size: int) -> dict:
    stage, dtype, *more = case.split("-")
    found = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(stage[1])},
    }
    if stage == "z3":
        found["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 100,
            "sub_group_size": 1200 if size == 3 else 10**9,  # three sub-groups
        }
    if dtype == "bf16":
        found["bf16"] = {"enabled": True}
    if "accum32" in more:  # DeepSpeed's BF16_Optimizer
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found


def train(deepspeed, small, case: str, size: int, directory: Path) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model = small.small_model(vocab_size=49, tie_word_embeddings="tied" in case)
    model.config.save_pretrained(directory / case)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, amsgrad="amsgrad" in case)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=adam, config=settings(case, size)
    )
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    for _ in range(NUM_STEPS):
        ids = torch.randint(0, 49, (1, 8), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    if case.startswith(("z1", "z2")):  # only the first group is linked by DeepSpeed itself
        optimizer._hp_optimizer_states_linked = False
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._lazy_init_hp_params_optimizer_state()
    truth = {
        name: {
            "weight": safe_get_full_fp32_param(p).clone(),
            "exp_avg": safe_get_full_optimizer_state(p, "exp_avg").clone(),
            "exp_avg_sq": safe_get_full_optimizer_state(p, "exp_avg_sq").clone(),
        }
        for name, p in engine.module.named_parameters()
    }
    engine.save_checkpoint(str(directory / case))
    if dist.get_rank() == 0:
        kind = type(optimizer).__name__
        torch.save({"kind": kind, "truth": truth}, directory / f"{case}.truth.pt")


def main() -> None:
    directory, rank, size, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler then
        deepspeed.init_distributed(
            "gloo",
            auto_mpi_discovery=False,
            init_method=f"file://{directory}.store",
            rank=int(rank),
            world_size=int(size),
            timeout=timedelta(seconds=60),
        )
        for case in cases:
            train(deepspeed, load_small(), case, int(size), Path(directory))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the process while Python shuts down


if __name__ == "__main__":
    main()
