"""The projections of a layer that sequential least squares fits: which outputs stay, and which of them write to the stream."""

from collections import defaultdict

from torch import Tensor

from hf_minitron import axes
from hf_minitron.architecture.architecture import HIDDEN, Architecture
from hf_minitron.plan import Plan


class LayerProjections:
    """What of a layer is fitted, by the names that a model of this layer alone has."""

    def __init__(self):
        self.rows: dict[str, Tensor | slice] = {}  # of a projection's output, that stay
        self.moments: dict[str, str] = {}  # what a projection reads
        self.last: dict[str, bool] = {}  # whether its weight has the input last
        self.anchored: dict[str, str] = {}  # one that writes to the stream: the norm that its sublayer reads
        self.stream: Tensor | slice = slice(None)  # the channels of the stream that stay
        self.order: list[str] = []  # of the projections, as they run

    @property
    def norms(self) -> list[str]:
        """The norms whose input is the stream before a sublayer."""
        return list(dict.fromkeys(self.anchored.values()))

    def groups(self) -> list[list[str]]:
        """Return the projections that read the same, in the order in which they run."""
        found = defaultdict(list)
        for name in self.order:
            found[self.moments[name]].append(name)
        return list(found.values())

    @classmethod
    def of(cls, teacher: Architecture, student: Architecture, plan: Plan, old: int, new: int) -> "LayerProjections":
        """Return what is fitted of a layer of the teacher that stays."""
        made, sizes, keep = cls(), plan.before.at(old), plan.keep_at(old)
        if "hidden" in keep:
            made.stream = keep["hidden"]
        own = [[norm for norm in norms if f".{old}." in norm] for norms in teacher.norms[:2]]
        read_by = {role: norms[0] for role, norms in zip(("output", "down"), own, strict=True) if norms}
        added = teacher.supports("layer_merge") and len(set(read_by.values())) == len(read_by)
        for module, read in teacher.reads.items():
            weight = teacher.weights[module]
            if read.layer != old or name_in_student(module, old, new) not in student.weights:
                continue
            position, _ = weight.dim_of(read.axis)
            out = weight.dims[1 - position]
            name, kept = name_in_student(module, old, 0), axes.dim_index(out, keep, sizes)
            made.rows[name] = slice(None) if kept is None else kept
            made.moments[name], made.last[name] = read.moment, position == 1
            if added and out == HIDDEN and weight.role in read_by:
                made.anchored[name] = name_in_student(read_by[weight.role], old, 0)
        return made


def name_in_student(module: str, old: int, new: int) -> str:
    """Return the name in a student of a teacher's module."""
    return module.replace(f".{old}.", f".{new}.", 1)
