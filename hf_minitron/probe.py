"""Probes: what passes the modules of a model, seen and changed for as long as a context lasts.

The only module that puts hooks on modules. Nothing stays on a model afterwards, also when the context ends by an exception, and
no module's `forward` is replaced: where a module shall not run, a copy of it stands in its place that runs something else.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Visit:
    """One call of a module.

    Args:
        module (`Module`): The module.
        name (`str`): Its name.
        args (`tuple`): What it is called with.
        kwargs (`Mapping[str, Any]`): What it is called with by name.
        output (`Any`): What it gives; `None` before it has run.
        batch (`tuple[int, int]`): `(batch, seq)` of what the model is run on.
        mask (`Tensor` of shape `(batch, seq)`, *optional*): The model's attention mask.
    """

    module: Module
    name: str
    args: tuple
    kwargs: Mapping[str, Any]
    output: Any
    batch: tuple[int, int]
    mask: Tensor | None

    @property
    def input(self) -> Tensor:
        """The hidden states that the module is given."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @property
    def states(self) -> Tensor:
        """The hidden states that the module gives."""
        return self.output if isinstance(self.output, Tensor) else self.output[0]


# Called with every visit; the hidden states that it returns, if any, take the place of those that pass.
Observer = Callable[[Visit], Tensor | None]


@contextmanager
def probe(
    model: PreTrainedModel,
    after: Iterable[tuple[str, Observer]] = (),
    before: Iterable[tuple[str, Observer]] = (),
    instead: Mapping[str, Callable[[Visit], Any]] = MappingProxyType({}),
) -> Iterator[None]:
    """Call observers on every visit of some modules until the context ends.

    Args:
        model (`PreTrainedModel`): A causal language model, or its base model; modules are named as in the former.
        after (`Iterable[tuple[str, Observer]]`): Modules, and what is called when they have run.
        before (`Iterable[tuple[str, Observer]]`): Modules, and what is called before they run.
        instead (`Mapping[str, Callable]`): Modules that do not run, and what gives their output.

    Example:

    ```python
    >>> shapes = []
    >>> with probe(teacher, after=[("model.norm", lambda visit: shapes.append(tuple(visit.states.shape)))]):
    ...     _ = teacher(tokenizer("a few words", return_tensors="pt").input_ids)
    >>> shapes[0][-1] == teacher.config.hidden_size
    True
    ```
    """
    run: dict[str, Any] = {"batch": (0, 0), "mask": None}  # of the forward pass under way

    def begin(module: Module, args: tuple, kwargs: dict) -> None:
        given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        run["batch"] = next((tuple(value.shape[:2]) for value in given if value is not None), (0, 0))
        run["mask"] = kwargs.get("attention_mask")

    def enter(name: str, observer: Observer, module: Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        states = observer(Visit(module, name, args, kwargs, None, **run))
        if states is None:
            return None
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def leave(name: str, observer: Observer, module: Module, args: tuple, kwargs: dict, output: Any) -> Any:
        states = observer(Visit(module, name, args, kwargs, output, **run))
        return (states, *output[1:]) if states is not None and isinstance(output, tuple) else states

    def run_instead(name: str, module: Module) -> Callable:
        return lambda *args, **kwargs: instead[name](Visit(module, name, args, kwargs, None, **run))

    with ExitStack() as stack:
        for name in instead:
            stack.enter_context(_stand_in(model, name, run_instead(name, submodule(model, name))))
        stack.enter_context(base_model(model).register_forward_pre_hook(begin, with_kwargs=True))
        for name, observer in before:
            hook = partial(enter, name, observer)
            stack.enter_context(submodule(model, name).register_forward_pre_hook(hook, with_kwargs=True))
        for name, observer in after:
            hook = partial(leave, name, observer)
            stack.enter_context(submodule(model, name).register_forward_hook(hook, with_kwargs=True))
        yield


@contextmanager
def outputs_of(model: PreTrainedModel, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield a dict that keeps what some modules give in the last forward pass, by name, until the context ends.

    What gradient checkpointing runs again afterwards is not kept again.
    """
    outputs: dict[str, Any] = {}

    def keep(visit: Visit) -> None:
        outputs[visit.name] = visit.output

    with probe(model, after=[(name, keep) for name in dict.fromkeys(names)]):
        yield outputs


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list of the last hidden states of every forward pass, logits or not."""
    hidden: list[Tensor] = []
    decoder = base_model(model).get_decoder()  # OPT's head calls it, and not the base model that it stands in
    name = next(name for name, module in model.named_modules() if module is decoder)
    with probe(model, after=[(name, lambda visit: hidden.append(visit.states))]):
        yield hidden


def base_name(model: PreTrainedModel) -> str:
    """Return the name of the model without its head inside a causal language model; nothing where it stands alone.

    It is `base_model_prefix`, but for classes whose prefix is that of a larger model that they are a part of (Llama 4's).
    """
    if model.base_model is not model:
        return model.base_model_prefix
    inside = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    return inside[0] if inside and model.get_output_embeddings() is not None else ""


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its head, which gives last hidden states."""
    return model.get_submodule(base_name(model))


def submodule(model: PreTrainedModel, name: str) -> Module:
    """Return a module by its name in the causal language model, of that model or of its base model alone."""
    return model.get_submodule(_own_name(model, name))


def _own_name(model: PreTrainedModel, name: str) -> str:
    if base_name(model):
        return name
    return "" if name == model.base_model_prefix else name.removeprefix(f"{model.base_model_prefix}.")


@contextmanager
def _stand_in(model: PreTrainedModel, name: str, forward: Callable) -> Iterator[None]:
    """Let a copy of a module, with the same parameters and hooks, run something else where the module stands."""
    name, module = _own_name(model, name), submodule(model, name)
    substitute = copy.copy(module)
    substitute.forward = forward
    model.set_submodule(name, substitute)
    try:
        yield
    finally:
        model.set_submodule(name, module)
