"""Two processes give one process's losses, started as a user would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_minitron import Statistics, calibrate
from hf_minitron.importance.removal import removal_costs

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, json
sys.path.insert(0, {tests!r})
import tiny
from test_distillation import CONSTANT, RAGGED
from hf_minitron import DistillationArguments, DistillationTrainer
from hf_minitron.distillation.cache import write_cache
out, batch, losses = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
teacher = tiny.model()
if sys.argv[4] == "cached":
    write_cache(teacher, RAGGED, out + "-cache", {{"top_k": 9}}, batch_size=2)
    teacher = out + "-cache"
args = DistillationArguments(out, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no",
                             max_steps=4, per_device_train_batch_size=batch, train_sampling_strategy="sequential",
                             losses=losses, layer_pairs="uniform", **CONSTANT)
trainer = DistillationTrainer(tiny.model(seed=1, hidden_size=24), teacher, args, train_dataset=RAGGED)
trainer.train()
if trainer.is_world_process_zero():
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    open(out + ".json", "w").write(json.dumps([[e[key] for key in ("loss", "grad_norm", *losses)] for e in history]))
"""

ENDING = """
sys.stdout.flush()
__import__("os")._exit(0)  # gloo's threads let go of tensors late, which aborts an interpreter that ends meanwhile
"""


def script(place, text, **values):
    """Write a script for `launch`."""
    path = place / "script.py"
    path.write_text(text.format(tests=str(Path(__file__).parent), **values) + ENDING)
    return path


def launch(processes, *command):
    """Start a command as `accelerate launch` does on several GPUs, by torchrun.

    On CPUs accelerate's own launcher (1.15) starts a single process unless MPI is installed, whatever its config says.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, launcher)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize(
    ("losses", "teacher"),
    [({"forward_kl": 1.0}, "live"), ({"forward_kl": 1.0, "block": 0.5, "query_key": 0.1}, "live"), ({"jsd": 1.0}, "cached")],
)
def test_two_processes_equal_one(tmp_path, losses, teacher):
    """Rows have different lengths, so the processes hold different numbers of tokens. States are balanced over both."""
    histories = []
    for processes, batch in ((1, 2), (2, 1)):
        launch(processes, script(tmp_path, SCRIPT), tmp_path / f"out-{processes}", batch, json.dumps(losses), teacher)
        histories.append(json.loads((tmp_path / f"out-{processes}.json").read_text()))
    one, two = histories
    assert len(one) == 4
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-4)


SHARDED = """
import json, sys
sys.path.insert(0, {tests!r})
import tiny, torch
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from test_distillation import RAGGED
from hf_minitron import DistillationArguments, DistillationTrainer
from hf_minitron.distillation.trainer import collate
state, out, losses = PartialState(cpu=True), sys.argv[1], json.loads(sys.argv[2])
student, teacher = tiny.model(seed=1, hidden_size=24, tie_word_embeddings=True).train(), tiny.model()
if state.num_processes > 1:
    for model in (student, teacher):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=True)
args = DistillationArguments(out, bf16=False, report_to="none", losses=losses, layer_pairs="uniform")
trainer = DistillationTrainer(student, teacher, args)
optimizer, history = torch.optim.AdamW(student.parameters(), lr=1e-2), []
for start in (0, 2, 4, 6):
    rows = [RAGGED[start], RAGGED[start + 1]]
    count = torch.tensor(sum(len(row["input_ids"]) - 1 for row in rows))
    own = [rows[state.process_index]] if state.num_processes > 1 else rows
    loss = trainer.compute_loss(student, collate(own), num_items_in_batch=count)
    loss.backward()
    if trainer._states:
        trainer._states.step(1e-2, 0.0, state.num_processes)
    optimizer.step()
    optimizer.zero_grad()
    history.append((trainer.accelerator.reduce(loss.detach(), "mean")).item())
if state.is_main_process:
    open(out + ".json", "w").write(json.dumps(history))
"""


@pytest.mark.parametrize("losses", [{"forward_kl": 1.0}, {"forward_kl": 1.0, "block": 0.5, "query_key": 0.1}])
def test_sharded_student_and_teacher_equal_one_process(tmp_path, losses):
    """FSDP2, by torch's own fully_shard: accelerate leaves it off on a CPU."""
    histories = []
    for processes in (1, 2):
        launch(processes, script(tmp_path, SHARDED), tmp_path / "out", json.dumps(losses))
        histories.append(json.loads((tmp_path / "out.json").read_text()))
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
    assert histories[0][-1] < histories[0][0]


SCORES = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from accelerate import PartialState
from hf_minitron import calibrate
from safetensors.torch import save_file
state = PartialState(cpu=True)
for model_type in ("llama", "qwen2_moe"):
    for source in ("resident", "streamed"):
        model = tiny.model(model_type, dtype=tiny.torch.float32)
        if source == "streamed":
            if state.is_main_process:
                model.save_pretrained(sys.argv[1] + model_type)
            state.wait_for_everyone()
            model = sys.argv[1] + model_type
        folder = f"{{sys.argv[1]}}{{model_type}}-{{source}}"  # seven blocks: one process has more than the other
        statistics = calibrate(model, tiny.blocks(7), batch_size=2, moments=True, save_to=folder)
        state.wait_for_everyone()
        save_file({{**statistics.scores, **statistics.moments}}, f"{{folder}}-{{state.process_index}}.safetensors")
        state.wait_for_everyone()
"""


def test_scores_of_two_processes_equal_those_of_one(tmp_path):
    launch(2, script(tmp_path, SCORES), f"{tmp_path}/two-")
    for model_type in ("llama", "qwen2_moe"):
        one = calibrate(tiny.model(model_type, dtype=torch.float32), tiny.blocks(7), batch_size=2, moments=True)
        expected = {**one.scores, **{name: moment for name, moment in one.moments.items() if moment.dim() == 1}}
        for source in ("resident", "streamed"):
            saved = Statistics.load(tmp_path / f"two-{model_type}-{source}")
            assert saved.text == one.text
            assert saved.scores.keys() == one.scores.keys()
            assert saved.moments.keys() == one.moments.keys()
            for rank in (0, 1):
                two = load_file(tmp_path / f"two-{model_type}-{source}-{rank}.safetensors")
                for name, values in expected.items():
                    assert torch.allclose(two[name], values, rtol=1e-4, atol=0, equal_nan=True), (model_type, source, name)


COSTS = """
import json, sys
sys.path.insert(0, {tests!r})
import tiny
from accelerate import PartialState
from hf_minitron.importance.removal import METRICS, removal_costs
state = PartialState(cpu=True)
costs = {{metric: removal_costs(tiny.model(), tiny.blocks(7), metric, batch_size=2).tolist() for metric in METRICS}}
open(f"{folder}/{{state.process_index}}.json", "w").write(json.dumps(costs))  # printed lines of two processes may mix
"""


def test_costs_of_removal_in_two_processes_equal_those_of_one(tmp_path):
    launch(2, script(tmp_path, COSTS, folder=tmp_path))
    for rank in range(2):
        for metric, costs in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert costs == pytest.approx(removal_costs(tiny.model(), tiny.blocks(7), metric).tolist(), rel=1e-5), metric


MERGED = ["least_squares", "norm_ratio", "layer_merge"]  # the last one reads text once more
COMMAND = """
import sys
from pathlib import Path
from hf_minitron.__main__ import main
assert main(sys.argv[1:]) == 0
left = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in left), left
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
def test_the_command_leaves_no_thread_of_its_process_group(project, tmp_path):
    """Such a thread may let go of a tensor while the interpreter ends, which aborts the process."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**project["recipe"], "run": str(tmp_path / "run")}))
    for stage in ("score", "prune", "distill"):
        launch(2, script(tmp_path, COMMAND), stage, recipe)


def test_the_command_runs_in_two_processes(project, tmp_path):
    """What the first one does alone, such as measuring how long the run will take, waits for nobody."""
    recipe = tmp_path / "recipe.yaml"
    changes = {"run": str(tmp_path / "run"), "prune": {"target": {"ffn": 48, "hidden": 24, "layers": 2}, "corrections": MERGED}}
    recipe.write_text(yaml.safe_dump({**project["recipe"], **changes}))
    out = launch(2, "-m", "hf_minitron", "run", recipe)
    for stage in ("score", "prune", "distill", "evaluate", "publish"):
        assert out.count(f"{stage}: done in") == 1, stage
    log = json.loads((tmp_path / "run/distill/log.json").read_text())
    assert log["tokens"] == 6 * 2 * 16 * 2
    assert (tmp_path / "run/distill/student/model.safetensors").is_file()
    assert set(json.loads((tmp_path / "run/evaluate/report.json").read_text())["speed"]) == {"teacher", "distilled"}


EVALUATION = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from accelerate import PartialState
from hf_minitron import compare
state = PartialState(cpu=True)
models = {{"teacher": "{folder}/teacher", "student": "{folder}/student"}}
report = compare(models, tiny.blocks(7), ["tiny_last_word"], {tasks!r}, batch_size=2)  # seven blocks: one process has more
report.save(f"{folder}/{{state.num_processes}}-{{state.process_index}}.json")
"""


def test_evaluation_in_two_processes_equals_that_in_one(project, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(project["folder"] / "teacher")
    for name, changes in {"teacher": {}, "student": {"intermediate_size": 48, "seed": 1}}.items():
        tiny.model(dtype=torch.float32, **changes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for processes in (1, 2):
        launch(processes, script(tmp_path, EVALUATION, folder=tmp_path, tasks=str(project["folder"] / "tasks")))
    one, *two = ([*numbers(json.loads((tmp_path / f"{name}.json").read_text()))] for name in ("1-0", "2-0", "2-1"))
    assert len(one) > 100
    for found in two:
        assert [key for key, _ in found] == [key for key, _ in one]
        for (key, value), (_, expected) in zip(found, one, strict=True):
            assert value == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-4, abs=1e-6)), key


SPLIT_MODEL = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from accelerate import PartialState
from hf_minitron.evaluation import compare
state = PartialState(cpu=True)
compare.best_dtype = lambda device: tiny.torch.float32  # sums in another order differ in bfloat16
models = {{"teacher": "{folder}/teacher", "student": "{folder}/student"}}
report = compare.compare(models, tiny.blocks(7), batch_size=2, tensor_parallel=state.num_processes > 1)
report.save(f"{folder}/{{state.num_processes}}-{{state.process_index}}.json")
"""


def test_a_model_split_over_two_processes_is_measured_as_a_whole_one(tmp_path):
    for name, changes in {"teacher": {}, "student": {"intermediate_size": 48, "seed": 1}}.items():
        tiny.model(dtype=torch.float32, **changes).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    for processes in (1, 2):
        launch(processes, script(tmp_path, SPLIT_MODEL, folder=tmp_path))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0"))
    assert two["models"] == one["models"]
    found, expected = ([*numbers(r["entries"])] for r in (two, one))
    for (key, value), (_, wanted) in zip(found, expected, strict=True):
        assert value == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-4)), key


def numbers(content, key=""):
    """List everything in a report by its place, but for sentences, which print numbers."""
    if isinstance(content, dict | list):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from numbers(value, f"{key}.{name}")
    elif content is not None and not key.endswith((".sentence", ".samples_needed")):
        yield key, content


def test_the_command_corrects_and_writes_in_two_processes_as_in_one(project, tmp_path):
    common = {"text": str(project["folder"] / "train.jsonl"), "block_size": 16, "max_steps": 4, "warmup_steps": 1,
              "save_steps": 2, "learning_rate": 0.003, "bf16": False, "report_to": "none", "disable_tqdm": True}  # fmt: skip
    written = {"documents": 11, "batch_size": 2, "max_new_tokens": 12, "min_tokens": 6}
    models = []
    for processes, batch in ((1, 4), (2, 2)):
        run, recipe = tmp_path / str(processes), tmp_path / f"{processes}.yaml"
        sections = {"run": str(run), "correct": {**common, "per_device_train_batch_size": batch}, "synthesize": written}
        recipe.write_text(yaml.safe_dump({**project["recipe"], **sections}))
        assert launch(processes, "-m", "hf_minitron", "correct", recipe).count("correct: done in") == 1
        models.append(load_file(run / "correct/teacher/model.safetensors"))
        del sections["correct"]  # both shall write with the very same teacher: training's rounding differs
        recipe.write_text(yaml.safe_dump({**project["recipe"], **sections}))
        assert launch(processes, "-m", "hf_minitron", "synthesize", recipe).count("synthesize: done in") == 1
    one, two = models
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    for name in ("text.jsonl", "synthesize.json"):
        assert (tmp_path / "1/synthesize" / name).read_text() == (tmp_path / "2/synthesize" / name).read_text()
    assert len((tmp_path / "2/synthesize/text.jsonl").read_text().splitlines()) == 11


PATIENT = """
import sys, time
from datetime import timedelta
from pathlib import Path
from accelerate import PartialState
from hf_minitron.waiting import from_first
state, folder = PartialState(cpu=True, timeout=timedelta(seconds=3)), Path(sys.argv[1])
for number in range(3):
    if state.is_main_process:
        time.sleep(5)  # longer than any collective call may take
    assert from_first(folder, number if state.is_main_process else None) == number
state.wait_for_everyone()
assert not any(folder.iterdir()), "what the others waited for is deleted"
"""


def test_processes_that_wait_for_the_first_one_are_in_no_collective_call(tmp_path):
    launch(2, script(tmp_path, PATIENT), tmp_path / "run")


WAITING = """
import os, signal, sys, time
from pathlib import Path
from accelerate import PartialState
from hf_minitron.waiting import together, wait_for
state, folder = PartialState(cpu=True), Path(sys.argv[1])
waits = state.is_main_process == (sys.argv[2] == "first waits")
try:
    with together(folder):
        state.wait_for_everyone()
        if waits:
            wait_for(folder / "never")
        time.sleep(3)  # long enough to be seen
        os.kill(os.getpid(), signal.SIGKILL)
except ValueError as error:
    Path(folder / f"told-{{state.process_index}}").write_text(str(error))
"""


@pytest.mark.parametrize("who", ["first waits", "first ends"])
def test_a_process_that_waits_notices_the_end_of_the_other(tmp_path, who):
    """By itself: not every launcher ends the others, as torchrun does, which these are started without."""
    path, port, started = script(tmp_path, WAITING), free_port(), []
    for rank in ("0", "1"):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **group, "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([sys.executable, path, tmp_path, who], env=environment))
    codes = [process.wait(timeout=60) for process in started]
    waits = 0 if who == "first waits" else 1
    assert codes[1 - waits] == -9
    assert (tmp_path / f"told-{waits}").read_text().startswith(f"Process {1 - waits} has ended, for which this one has waited")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


FAILING = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import tiny
from test_distillation import arguments
from transformers import TrainerCallback
from hf_minitron import DistillationTrainer


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 2:
            print("failing now", flush=True)
            if sys.argv[2] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the second rank has had enough")


args = arguments(sys.argv[1], max_steps=10_000, per_device_train_batch_size=2)
teacher, student = tiny.model(), tiny.model(seed=1, hidden_size=24)
DistillationTrainer(student, teacher, args, train_dataset=tiny.blocks(), callbacks=[Fails()]).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_rank_that_fails_ends_all_within_seconds(tmp_path, how):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script(tmp_path, FAILING)), str(tmp_path / "out"), how]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert any("failing now" in line for line in started.stdout)
    _, errors = started.communicate(timeout=45)  # torchrun itself looks every few seconds
    assert started.returncode != 0
    assert "the second rank has had enough" in errors or how == "killed"
    assert "SIGKILL" in errors or "Signal 9" in errors or how == "raised"
