"""`Statistics`: what passes over a text measured of a model, in one folder.

Calibration writes it; plans, corrections and searches read it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_minitron.json_files import write_whole

RECORD, TABLES, MOMENTS = "statistics.json", "statistics.safetensors", "moments"
TOKENS = "token_counts"


@dataclass(frozen=True)
class Statistics:
    """What passes over a text measured of a model.

    Args:
        scores (`Mapping[str, Tensor]`): Axis to the importance of its indices, float32; higher matters more. `layers` and
            `hidden` have shape `(size,)`, the others `(layers, size)`, NaN where a layer lacks the axis.
        moments (`Moments`, *optional*): What corrections read. Name of a projection, or `<module>.input` and
            `<module>.output`, to E[x xᵀ] with E[x] as its last row, `(size + 1, size)`; name of a norm to the energy of every
            channel of its input, `(hidden,)`.
        sublayer_costs (`Mapping[str, Tensor]`, *optional*): `heads` and `ffn`, each `(layers,)`: what removing the
            attention, or the MLP, of each layer costs.
        token_counts (`Tensor` of shape `(vocab,)`, *optional*): How often each token is in the text, int64.
        text (`Mapping[str, Any]`, *optional*): What was read: the hash, tokens and blocks, and the source where it has a name.
        provenance (`Mapping[str, Any]`, *optional*): The model and its revision, settings and library versions.

    Example:

    ```python
    >>> statistics = calibrate(teacher, token_blocks(documents, tokenizer, block_size=512, max_tokens=32_768))
    >>> statistics.save("statistics")
    >>> Statistics.load("statistics").text["tokens"] == statistics.text["tokens"]
    True
    ```
    """

    scores: Mapping[str, Tensor]
    moments: "Moments" = field(default_factory=lambda: Moments())
    sublayer_costs: Mapping[str, Tensor] = field(default_factory=dict)
    token_counts: Tensor | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write a folder, which holds statistics once it is complete; moments that lie there already are left as they are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        stored = Moments(folder / MOMENTS)
        if self.moments.folder != stored.folder:
            for name, moment in self.moments.items():
                stored[name] = moment
        tables = {"scores": self.scores, "sublayer_costs": self.sublayer_costs}
        tensors = {
            f"{table}.{axis}": values.contiguous() for table, by_axis in tables.items() for axis, values in by_axis.items()
        }
        tensors |= {} if self.token_counts is None else {TOKENS: self.token_counts}
        save_file(tensors, folder / TABLES)
        record = {"text": dict(self.text), "provenance": dict(self.provenance), "moments": self.moments.shapes}
        write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Statistics":
        """Read what `save` wrote; a moment only when it is asked for.

        Raises:
            ValueError: for a folder without complete statistics.
        """
        folder = Path(folder)
        if not (folder / RECORD).is_file():
            raise ValueError(f"{folder} holds no statistics: {RECORD} is missing. Score the model again")
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tables: dict[str, dict[str, Tensor]] = {"scores": {}, "sublayer_costs": {}}
        stored = load_file(folder / TABLES)
        tokens = stored.pop(TOKENS, None)
        for name, values in stored.items():
            table, _, axis = name.partition(".")
            tables[table][axis] = values
        return cls(moments=Moments(folder / MOMENTS, record["moments"]), text=record["text"], provenance=record["provenance"],
                   token_counts=tokens, **tables)  # fmt: skip


class Moments(Mapping[str, Tensor]):
    """Moments by name, in memory or in a folder: there a file each, which one process writes for all when the moment is set.

    Of a folder a moment is read each time that it is asked for; who needs it twice keeps it.

    Args:
        folder (`Path`, *optional*): The folder; memory when it is left out.
        shapes (`Mapping[str, Sequence[int]]`, *optional*): The moments that lie there.
    """

    def __init__(self, folder: Path | None = None, shapes: Mapping[str, Sequence[int]] = MappingProxyType({})):
        self.folder = folder
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._held: dict[str, Tensor] = {}

    def __setitem__(self, name: str, moment: Tensor) -> None:
        self.shapes[name] = tuple(moment.shape)
        if self.folder is None:
            self._held[name] = moment
            return
        if PartialState().is_main_process:
            (self.folder.parent / RECORD).unlink(missing_ok=True)  # until all is written, the folder holds no statistics
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self._path(name).with_suffix(".part")
            save_file({name: moment.contiguous()}, part)
            part.replace(self._path(name))  # the file before it may be mapped

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        if self.folder is None:
            return self._held[name]
        if not self._path(name).is_file():
            raise ValueError(f"{self._path(name)} is missing: score the model again")
        return load_file(self._path(name))[name]

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@dataclass(frozen=True)
class Residuals:
    """What the layers that a plan drops added to the residual stream, as the MLP of the kept layer before them sees it.

    Args:
        dropped (`Mapping[int, list[int]]`): Kept layer to the dropped layers behind it.
        inputs (`Mapping[str, Tensor]`): Down projection to E[x xᵀ] with E[x] as its last row, `(ffn + 1, ffn)`, of its input x.
        added (`Mapping[str, Tensor]`): Down projection to E[x yᵀ] with E[y] as its last row, `(ffn + 1, hidden)`; y is the sum
            of what the dropped layers added.
    """

    dropped: Mapping[int, list[int]]
    inputs: Mapping[str, Tensor]
    added: Mapping[str, Tensor]
