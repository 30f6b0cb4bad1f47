"""Pushing a finished folder to the Hub: private unless told, with the real client."""

from pathlib import Path

from huggingface_hub import HfApi

REQUIRED = ("README.md", "config.json", "report.json", "plan.json", "recipe.yaml")


def push(folder: Path, repo_id: str, private: bool = True) -> str:
    """Upload a publishable folder and return its address.

    Args:
        folder (`Path`): What the publish stage has written.
        repo_id (`str`): `owner/name`.
        private (`bool`, *optional*, defaults to `True`): Visibility of a repository that does not exist yet.

    Raises:
        ValueError: when the folder lacks its card, report, plan, recipe, config or weights.
    """
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; run the publish stage again before pushing")
    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a model compressed with hf_minitron")
    return str(address)
