"""Host memory of each process until training begins: student and teacher loaded whole and then sharded, or by shards.

    python benchmarks/loading.py --processes 2

Makes a random model, then starts the same training twice with accelerate's FSDP2 on CPU processes, which hold their shards in
host memory too. The figure is the highest memory of a process, less what it had before the models, in bytes of both models.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import figure
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

TESTS = Path(__file__).resolve().parent.parent / "tests"
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "num_attention_heads": 16}
FSDP = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


class Peak(TrainerCallback):
    """Remembers the highest memory of the process when training begins, both models sharded."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Look."""
        self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        control.should_training_stop = True


def rank(folder: Path, whole: bool) -> None:
    """Be one process of the training."""
    sys.path.insert(0, str(TESTS))
    import gloo

    gloo.present_as_accelerators()
    from transformers import AutoConfig

    from hf_minitron.checkpoint.checkpoint import load_model
    from hf_minitron.distillation import engine, teachers
    from hf_minitron.distillation.config import DistillationArguments
    from hf_minitron.distillation.trainer import DistillationTrainer

    if whole:
        engine.sharded_loading = teachers.sharded_loading = lambda *args, **kwargs: None
    values = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, "bf16": False, "optim": "sgd"}
    args = DistillationArguments(str(folder / "out"), teacher_model_init_kwargs={"dtype": "bfloat16"}, **values, **FSDP)
    rows, peak = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8}), Peak()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sharding = engine.sharded_loading(args, AutoConfig.from_pretrained(folder), trained=True)
    student = load_model(folder, torch.float32, distributed_config=sharding).train()
    DistillationTrainer(student, str(folder), args, train_dataset=rows, callbacks=[peak]).train()
    (folder / f"peak-{dist.get_rank()}.json").write_text(json.dumps(peak.bytes - before))
    dist.destroy_process_group()


def measure(folder: Path, processes: int, how: str) -> int:
    """Return the highest memory of a process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    command = [*launcher, "--folder", str(folder), "--how", how]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return max(json.loads((folder / f"peak-{number}.json").read_text()) for number in range(processes))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figure for the README")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--how", choices=("whole", "shards"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        return rank(args.folder, args.how == "whole")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32_000)).to(torch.bfloat16)
        model.save_pretrained(folder)
        both = model.num_parameters() * (4 + 2)  # the student is trained in float32
        whole, shards = (measure(folder, args.processes, how) / both for how in ("whole", "shards"))
    result = f"{whole:.2f} whole, {shards:.2f} by shards, over the bytes of both models; {shards / whole:.2f} of it"
    print(f"{args.processes} processes: {result}")
    return figure.save(
        args.json, f"host memory of one of {args.processes} processes that load both models", "benchmarks/loading.py", result
    )


if __name__ == "__main__":
    main()
