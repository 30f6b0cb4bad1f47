"""What a download of a model shows: nothing of its small files, one bar of its weights."""

from huggingface_hub import constants
from tqdm.auto import tqdm


class NoBar(tqdm):
    """The bar of small files, which is not shown."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"disable": True})


class WeightsBar(tqdm):
    """The bytes of weights, while there are some to fetch. The Hub's bars of files and of the network are not shown."""

    def __init__(self, *args, **kwargs):
        counts = kwargs.get("unit") == "B" and not str(kwargs.get("desc")).startswith("Downloading")
        hidden = not counts or constants.HF_HUB_DISABLE_PROGRESS_BARS
        super().__init__(*args, **kwargs | {"disable": hidden or None, "desc": "Weights"})  # None: on a terminal only

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """Keep the label, which the Hub's client would change, and show the last bytes."""
        self.refresh()

    def display(self, *args, **kwargs) -> bool | None:
        """Show the bar where something is fetched: not for what lies in the cache."""
        return super().display(*args, **kwargs) if self.total else None
