"""No network, no accelerator, no progress bars; one tiny model folder and its texts for the whole session."""

import gc
import os
import shutil
import tempfile

# Models this small leave nothing for a second thread to do, and threads that wait spin on the core of another worker.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
HOME = tempfile.TemporaryDirectory(prefix="hf_home_")  # one for each worker: they write modules of the same name
os.environ.update(HF_HOME=HOME.name)
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import tiny  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from hub_server import hub_server, use  # noqa: E402
from torch.utils import collect_env  # noqa: E402

transformers.utils.logging.disable_progress_bar()
collect_env.get_pretty_env_info = str  # lm-eval asks pip for all packages at every evaluation, and nobody reads its answer
TEACHER_CARD = "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: USE_POLICY.md\n---\n# Teacher\n"


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish():
    """Spare collections of garbage, which every trainer asks for, the million objects of the imported libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A teacher folder, texts, an lm-eval task and a recipe, all tiny."""
    return tiny.make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def whole(project, tmp_path_factory):
    """A finished run with every optional stage, a nonuniform student, two losses, and a teacher with a card and a licence."""
    from hf_minitron.__main__ import main

    folder = tmp_path_factory.mktemp("whole")
    teacher, train = folder / "teacher", str(project["folder"] / "train.jsonl")
    shutil.copytree(project["folder"] / "teacher", teacher)
    (teacher / "README.md").write_text(TEACHER_CARD)
    (teacher / "LICENSE").write_text("Do what you like.\n")
    recipe = {**project["recipe"], "model": str(teacher), "run": str(folder / "run"), "seed": 3}
    training = {**recipe["distill"], "max_steps": 2}
    recipe["correct"] = {**training, "text": train, "warmup_steps": 1, "lora": {}}
    recipe["synthesize"] = {"documents": 6, "max_new_tokens": 24, "batch_size": 4, "min_tokens": 2}
    recipe["score"] = {**recipe["score"], "sublayers": True}
    recipe["prune"] = {"target": {}, "nonuniform": 0.5}
    recipe["cache"] = {"method": "top_k", "k": 8}
    text = {"synthesized": 0.25, train: 0.75}
    recipe["distill"] = {**training, "text": text, "losses": {"forward_kl": 0.75, "cross_entropy": 0.25}}
    recipe["evaluate"] = {**recipe["evaluate"], "generate": ["w5 w6 w7", "w8"], "max_new_tokens": 5}
    recipe["publish"] = {"base_model": "owner/teacher", "repo_id": "me/small", "language": "en"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub that this process takes for the real one, and the seconds that anybody would have waited."""
    with hub_server() as server:
        use(server, monkeypatch, tmp_path_factory.mktemp("cache"))
        server.waits = []
        monkeypatch.setattr("time.sleep", server.waits.append)
        yield server
