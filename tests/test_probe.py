"""Probes: what they see, what they change, and that nothing stays."""

import pytest
import tiny
import torch

from hf_minitron.probe import last_hidden_states, outputs_of, probe, submodule

LAYER = "model.layers.1"
IDS = tiny.blocks(2)["input_ids"][:]


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def marks(model):
    """All that a probe could leave behind: hooks, own attributes and the very modules in their places."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [(name, module, sorted(vars(module)), [len(vars(module)[kind]) for kind in hooks])
            for name, module in model.named_modules()]  # fmt: skip


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, use_cache=False, **inputs).logits


def test_a_visit_knows_the_module_what_passes_it_and_the_mask(model):
    seen, mask = [], torch.ones_like(IDS)
    with probe(model, after=[(LAYER, seen.append)], before=[(LAYER, seen.append)]):
        logits(model, attention_mask=mask)
    before, after = seen
    assert before.module is after.module is model.model.layers[1]
    assert before.name == after.name == LAYER
    assert before.output is None
    assert after.states is after.output
    assert after.input is before.input
    assert after.batch == tuple(IDS.shape)
    assert after.mask is mask


def test_a_base_model_goes_by_the_same_names(model):
    seen = []
    with probe(model.model, after=[("model", seen.append), (LAYER, seen.append)]):
        model.model(input_ids=IDS)
    assert [visit.module for visit in seen] == [model.model.layers[1], model.model]
    assert seen[1].mask is None
    assert submodule(model.model, "model.norm") is model.model.norm


def test_what_an_observer_returns_takes_the_place_of_what_passes(model):
    zeros = torch.zeros(2, 12, 40, dtype=torch.float64)
    with probe(model, after=[("model.embed_tokens", lambda visit: zeros)]):
        after = logits(model)
    with probe(model, before=[("model.layers.0", lambda visit: zeros)]):
        before = logits(model)
    assert torch.equal(after, before)
    assert not torch.equal(after, logits(model))


def test_a_module_that_something_stands_in_for_does_not_run(model):
    runs, plain = [], logits(model)
    inner = model.model.layers[1].mlp.register_forward_hook(lambda *_: runs.append("mlp"))
    outer = model.model.layers[1].register_forward_hook(lambda *_: runs.append("layer"))
    with probe(model, instead={LAYER: lambda visit: visit.input}):
        with probe(model, instead={LAYER: lambda visit: 0 * visit.input}):
            zeroed = logits(model)
        without = logits(model)
    assert runs == ["layer", "layer"], "the user's hooks on the module see that it is called, its children are not"
    assert torch.equal(logits(model), plain)
    assert runs[2:] == ["mlp", "layer"]
    assert not torch.equal(without, plain)
    assert not torch.equal(zeroed, without)
    inner.remove()
    outer.remove()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays(model, fails):
    before = marks(model)
    forward = model.model.layers[1].forward

    def fail(visit):
        raise RuntimeError("stop")

    observer = fail if fails else (lambda visit: None)
    with pytest.raises(RuntimeError, match="stop"):  # in a forward pass, or in the context
        with probe(model, [("model.norm", observer)], [(LAYER, observer)], {"model.layers.0": lambda visit: visit.input}):
            logits(model)
            raise RuntimeError("stop")
    assert marks(model) == before
    assert model.model.layers[1].forward == forward


def test_a_name_that_does_not_exist_leaves_nothing(model):
    before = marks(model)
    with pytest.raises(AttributeError, match="nothing"), probe(model, [(LAYER, print), ("model.nothing", print)]):
        pass
    assert marks(model) == before


def test_outputs_are_those_of_the_last_pass_and_not_of_a_later_one(model):
    with outputs_of(model, ["model.norm", LAYER]) as outputs:
        logits(model)
        found = dict(outputs)
    logits(model)
    assert outputs == found
    assert set(found) == {"model.norm", LAYER}
    with last_hidden_states(model) as hidden:
        logits(model)
    assert torch.equal(hidden.pop(), found["model.norm"])
    assert not hidden
