"""Formulas against textbook ones on full tensors, and the head that changes its logits."""

import math
import weakref
from dataclasses import replace

import pytest
import tiny
import torch
from scipy.spatial.distance import cosine, jensenshannon
from scipy.stats import entropy

from hf_minitron.distillation.losses.chunked import chunked_loss
from hf_minitron.distillation.losses.states import DISTANCES, relation_kl
from hf_minitron.distillation.losses.tokens import TOKEN_LOSSES, generalized_jsd
from hf_minitron.distillation.signals import DenseSignal
from hf_minitron.distillation.states import StateLosses
from hf_minitron.head import Head, head_chunks, head_of, next_token_rows


def tables(rows=5, vocab=11):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, vocab, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))


REFERENCES = {
    "forward_kl": lambda q, p: entropy(p, q),
    "reverse_kl": lambda q, p: entropy(q, p),
    "jsd": lambda q, p: jensenshannon(p, q) ** 2,
    "mse": lambda q, p: ((p - q) ** 2).sum(),
    "cosine": lambda q, p: cosine(p, q),
    "total_variation": lambda q, p: abs(p - q).sum() / 2,
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_losses_equal_scipy(name):
    student, teacher = tables()
    found = TOKEN_LOSSES[name](student, teacher)
    expected = [REFERENCES[name](q, p) for q, p in zip(student.exp().numpy(), teacher.exp().numpy(), strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 1e-3
    assert TOKEN_LOSSES[name](teacher, teacher).abs().max() < 1e-12


def test_the_divergence_between_the_two_kl():
    student, teacher = tables()
    for beta, limit in ((0, "forward_kl"), (1, "reverse_kl")):
        assert torch.equal(generalized_jsd(student, teacher, beta), TOKEN_LOSSES[limit](student, teacher))
        near, over = (1e-6, 1e-6) if beta == 0 else (1 - 1e-6, 1e-6)
        assert torch.allclose(generalized_jsd(student, teacher, near) / over, TOKEN_LOSSES[limit](student, teacher), rtol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma2", "cohere2", "granite", "llama"])
@pytest.mark.parametrize("loss", ["forward_kl", "cosine"])
def test_a_head_that_changes_its_logits(model_type, loss):
    """Softcap and scale, in the value and in the gradient."""
    student, teacher, ids = tiny.model(model_type, seed=1).train(), tiny.model(model_type), tiny.blocks(2)["input_ids"][:]
    targets = ids[:, 1:]

    def gradients(total):
        student.zero_grad()
        total.backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    with torch.no_grad():
        teacher_logp = teacher(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        said = teacher.base_model(ids).last_hidden_state
    full = TOKEN_LOSSES[loss](student(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1), teacher_logp).mean()
    expected = gradients(full)
    signal = DenseSignal(next_token_rows(said, ids)[0], head_of(teacher))
    rows, _ = next_token_rows(student.base_model(ids).last_hidden_state, ids)

    def chunk(logits, at):
        return {loss: TOKEN_LOSSES[loss](*signal.aligned_log_probs(logits, at, 1.0))}

    total, _ = chunked_loss(rows, head_of(student), chunk, {loss: 1.0}, 7)
    ours = total / targets.numel()
    assert ours.item() == pytest.approx(full.item(), abs=1e-12)
    assert torch.allclose(gradients(ours), expected, atol=1e-12)
    assert expected.abs().max() > 1e-6


@pytest.mark.parametrize("model_type", ["gemma2", "cohere2", "llama"])
def test_the_chunks_of_a_head_are_its_logits(model_type):
    """By its weight or by calling its module; no chunk waits for the next one."""
    model, ids = tiny.model(model_type), tiny.blocks(2)["input_ids"][:]
    with torch.no_grad():
        expected, hidden = model(ids).logits.flatten(0, 1), model.base_model(ids).last_hidden_state.flatten(0, 1)
        head = head_of(model)
        for chosen in (head, replace(head, module=model.get_output_embeddings())):
            chunks, alive = [], None
            for rows, logits in head_chunks(chosen.logits, hidden, 7):
                assert alive is None or alive() is None, "the chunk before is still in memory"
                assert torch.allclose(logits, expected[rows], atol=1e-12)
                chunks.append(rows.start)
                alive = weakref.ref(logits)
                del logits
            assert chunks == [0, 7, 14, 21]


@pytest.mark.parametrize("k", [1, 5, 98])
def test_the_teachers_most_likely_tokens_and_the_rest_as_one(k):
    teacher, hidden, logits = tiny.model(), torch.randn(1, 6, 40, dtype=torch.float64), torch.randn(6, 99, dtype=torch.float64)
    found = DenseSignal(hidden[0], head_of(teacher), k).aligned_log_probs(logits, slice(0, 6), 2.0)
    p, q = ((teacher.lm_head(hidden[0]) / 2).softmax(-1), (logits / 2).softmax(-1))
    for row in range(6):
        top = p[row].argsort(descending=True)[:k]
        for table, whole in zip(found, (q, p), strict=True):
            expected = [*whole[row, top].tolist(), 1 - whole[row, top].sum().item()]
            assert table[row].exp().tolist() == pytest.approx(expected, abs=1e-9)
    whole = DenseSignal(hidden[0], head_of(teacher)).aligned_log_probs(logits, slice(0, 6), 2.0)
    all_of_them = DenseSignal(hidden[0], head_of(teacher), 99).aligned_log_probs(logits, slice(0, 6), 2.0)
    assert all(torch.equal(a, b) for a, b in zip(whole, all_of_them, strict=True))
    # what lies between the tokens of the rest is not seen: merging never adds to a divergence
    assert (TOKEN_LOSSES["forward_kl"](*found) <= TOKEN_LOSSES["forward_kl"](*whole) + 1e-9).all()


def test_distances_of_states():
    student, teacher = (torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
    found = {name: distance(student, teacher).tolist() for name, distance in DISTANCES.items()}
    assert found["cosine"] == pytest.approx([cosine(a, b) for a, b in zip(student.numpy(), teacher.numpy(), strict=True)])
    assert found["mse"] == pytest.approx([((a - b) ** 2).mean().item() for a, b in zip(student, teacher, strict=True)])


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_relations_equal_full_ones(chunk_size):
    """Student with 4 heads of 6, teacher with 6 heads of 5: two relation heads; two documents and padding in a row."""
    torch.manual_seed(0)
    student = [torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, 8, 6, 5, dtype=torch.float64) for _ in range(2)]
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 6 + [1] * 2])
    visible = document[:, :, None] == document[:, None]
    total = torch.zeros(2, 8, dtype=torch.float64)
    for b in range(2):
        for i in range(8):
            seen = [j for j in range(i + 1) if visible[b, i, j]]
            for head in range(2):
                logp = []
                for (q, k), dim in ((student, 12), (teacher, 15)):
                    query, keys = q[b, i].flatten()[head * dim :][:dim], k[b, seen].flatten(1)[:, head * dim :][:, :dim]
                    logp.append((keys @ query / dim**0.5).log_softmax(0))
                total[b, i] = total[b, i] + (logp[1].exp() * (logp[1] - logp[0])).sum() / 2
    expected = torch.autograd.grad(total.sum(), student)
    found = relation_kl(tuple(student), tuple(teacher), visible, chunk_size)
    assert torch.allclose(found, total, atol=1e-12)
    assert total.max() > 0.1
    for a, b in zip(torch.autograd.grad(found.sum(), student), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("loss", ["forward_kl", "jsd"])
@pytest.mark.parametrize("tokens", [64, 2**20])
def test_gradients_in_fp16_are_those_of_fp32(loss, tokens):
    """A step of a million tokens: divided by them before the GradScaler's scale arrives, most would round to zero."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 40, generator=generator) for size in (48, 1000))
    hidden, weight = hidden.half().float(), (weight / 6).half().float()
    teacher, scale = torch.randn(48, 1000, generator=generator).log_softmax(-1), 2.0**16
    found, expected = [], []
    for kept, dtype in ((found, torch.float16), (expected, torch.float32)):
        states, matrix = hidden.to(dtype).requires_grad_(), weight.clone().requires_grad_()

        def chunk(logits, at):
            return {loss: TOKEN_LOSSES[loss](logits.log_softmax(-1), teacher[at])}

        if dtype == torch.float16:
            total = chunked_loss(states, Head(matrix), chunk, {loss: 1.0}, 7)[0] / torch.tensor(tokens)
        else:
            total = chunk(states @ matrix.T, slice(None))[loss].sum() / tokens
        total.backward(torch.tensor(scale))
        kept += [states.grad.float() / scale, matrix.grad / scale, total.detach()]
    for ours, reference in zip(found, expected, strict=True):
        assert (ours - reference).norm() < 0.01 * reference.norm()
        lost = (ours == 0) & (reference != 0)
        assert lost.float().mean() < 0.01


def test_projections_know_the_scale_of_the_loss():
    """What the GradScaler multiplies is divided before clipping, and a step that overflowed is skipped."""
    models = [tiny.model(seed=1, hidden_size=24, dtype=torch.float32), tiny.model(dtype=torch.float32)]
    results = []
    for scale in (1.0, 2.0**16, math.inf):
        states = StateLosses(*models, ("block",), seed=3)
        before = [parameter.clone() for parameter in states.projections.parameters()]
        for number, parameter in enumerate(states.projections.parameters()):
            parameter.grad = torch.full_like(parameter, 0.5 + number) * scale
        states.step(0.1, 1.0, 1, 2.0**16 if scale > 1 else 1.0)
        results.append(list(states.projections.parameters()))
    for plain, scaled, overflowed, start in zip(*results, before, strict=True):
        assert torch.allclose(plain, scaled, atol=1e-6)
        assert not torch.equal(plain, start)
        assert torch.equal(overflowed, start)
