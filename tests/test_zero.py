"""DeepSpeed's ZeRO-2 and ZeRO-3 give one process's losses and weights, on two CPU processes; where deepspeed is installed."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from test_accelerate import launch, script
from test_fsdp import trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed"),
]

CASES = ("plain", "accumulated", "tied", "states, checkpointed", "lora", "evaluated", "labels", "loaded", "resumed")

SCRIPT = """
import json, os, sys
from pathlib import Path
os.environ["DS_ACCELERATOR"] = "cpu"
del os.environ["ACCELERATE_USE_CPU"]
sys.path.insert(0, {tests!r})
import gloo
gloo.present_as_accelerators()
import deepspeed, test_fsdp, torch
from test_zero import CASES
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
out, stage = Path(sys.argv[1]), int(sys.argv[2])
zero = {{"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}}
auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
settings = {{"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True, **auto}}
for number, case in enumerate(CASES):
    history, state = test_fsdp.trained(case, out / str(number), 1, dtype=torch.float32, deepspeed=settings)
    if torch.distributed.get_rank() == 0:
        test_fsdp.keep(out / case, history, state)
torch.distributed.barrier()
"""


@pytest.fixture(scope="module", params=[2, 3], ids=["ZeRO-2", "ZeRO-3"])
def sharded(request, tmp_path_factory):
    """Every case, trained by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, script(folder, SCRIPT), folder, request.param)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_equals_one_process(sharded, tmp_path, case):
    history, state = trained(case, tmp_path, 2, dtype=torch.float32)
    found = json.loads((sharded / f"{case}.json").read_text())
    assert len(found) >= 3
    for own, expected in zip(found, history, strict=True):
        assert own == pytest.approx(expected, rel=1e-4)
    weights = load_file(sharded / f"{case}.safetensors")
    assert weights.keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(weights[name], value, atol=1e-4), name
