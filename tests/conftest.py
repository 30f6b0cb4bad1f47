"""No network, no accelerator, no progress bars; one tiny model folder and its texts for the whole session."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import tiny  # noqa: E402
import transformers  # noqa: E402
from hub_server import TOKEN, hub_server  # noqa: E402
from huggingface_hub import constants  # noqa: E402

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A teacher folder, texts, an lm-eval task and a recipe, all tiny."""
    return tiny.make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process takes for the real one, and the seconds that anybody would have waited."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not spoken here
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.waits = []
        monkeypatch.setattr("time.sleep", server.waits.append)
        yield server
