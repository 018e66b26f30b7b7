"""Messages of a chain of 12 against enumeration of its 4,096 states, in float64."""

import itertools
import math

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_sparse.distributions import MarkovChain

LENGTH = 12
STATES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=LENGTH))).double()


def chain(batch=(), length=LENGTH, spread=2.0, dtype=torch.float64):
    initial = spread * torch.randn(batch, dtype=dtype)
    return MarkovChain(initial, spread * torch.randn(*batch, length - 1, 2, dtype=dtype))


def enumerated(law):
    """log p of every state, by the definition, ``(4096,)``."""
    total = torch.zeros(len(STATES), dtype=torch.float64)
    for row, state in enumerate(STATES.long()):
        p = torch.sigmoid(law.initial_logits)
        total[row] = (p if state[0] else 1 - p).log()
    for j in range(LENGTH - 1):
        p = torch.sigmoid(law.transition_logits[j])[STATES[:, j].long()]
        total = total + torch.where(STATES[:, j + 1] > 0, p, 1 - p).log()
    return total


def test_probabilities_sum_to_one():
    law = chain()
    assert torch.allclose(law.log_prob(STATES), enumerated(law), atol=1e-12)
    assert law.log_prob(STATES).logsumexp(0).item() == pytest.approx(0, abs=1e-12)


def test_marginals_and_pairs():
    law = chain()
    p = enumerated(law).exp()
    assert torch.allclose(law.mean, p @ STATES, atol=1e-12)
    assert torch.allclose(law.variance, law.mean * (1 - law.mean), atol=1e-12)
    assert torch.allclose(law.marginal_logits.sigmoid(), p @ STATES, atol=1e-12)
    pairs = law.log_pair_marginals().exp()
    for j, i, k in itertools.product(range(LENGTH - 1), (0, 1), (0, 1)):
        expected = p[(STATES[:, j] == i) & (STATES[:, j + 1] == k)].sum()
        assert pairs[j, i, k].item() == pytest.approx(expected.item(), abs=1e-12)
    assert law.any_logits.sigmoid().item() == pytest.approx(1 - p[0].item(), abs=1e-12)


def test_entropy_and_kl():
    law, other = chain(), chain()
    log_p, log_q = enumerated(law), enumerated(other)
    assert law.entropy().item() == pytest.approx(-(log_p.exp() @ log_p).item(), rel=1e-11)
    expected = (log_p.exp() @ (log_p - log_q)).item()
    assert kl_divergence(law, other).item() == pytest.approx(expected, rel=1e-11)
    assert kl_divergence(law, law).item() == 0
    with pytest.raises(ValueError, match="lengths 12 and 5"):
        kl_divergence(law, chain(length=5))


def test_condition_and_normaliser():
    prior = chain()
    evidence = 3 * torch.randn(LENGTH, dtype=torch.float64)
    joint = enumerated(prior) + STATES @ evidence
    normaliser = joint.logsumexp(0)
    assert prior.log_normaliser(evidence).item() == pytest.approx(normaliser.item(), rel=1e-12)
    posterior = prior.condition(evidence)
    assert torch.allclose(enumerated(posterior), joint - normaliser, atol=1e-10)
    # KL from the prior is the mean evidence less the normaliser.
    expected = posterior.mean @ evidence - normaliser
    assert kl_divergence(posterior, prior).item() == pytest.approx(expected.item(), rel=1e-10)


def test_fixed_nodes():
    prior = chain()
    fixed = torch.zeros(LENGTH, dtype=torch.float64)
    fixed[[0, 4, 5, 11]] = -math.inf
    allowed = STATES[:, [0, 4, 5, 11]].sum(1) == 0
    p = torch.where(allowed, enumerated(prior).exp(), 0.0)
    law = prior.condition(fixed)
    assert torch.allclose(law.mean, p @ STATES / p.sum(), atol=1e-12)
    assert (law.sample((50,))[:, [0, 4, 5, 11]] == 0).all()
    assert law.entropy().isfinite()
    evidence = torch.randn(LENGTH, dtype=torch.float64)
    # A fixed node stays fixed, and pays nothing.
    posterior = law.condition(evidence)
    joint = torch.where(allowed, enumerated(prior) + STATES @ evidence, -math.inf).softmax(0)
    assert torch.allclose(posterior.mean, joint @ STATES, atol=1e-12)
    reference = torch.where(allowed, joint * (joint / (p / p.sum())).log(), 0.0).sum()
    assert kl_divergence(posterior, law).item() == pytest.approx(reference.item(), rel=1e-10)


def test_stationary():
    density, persistence = torch.tensor([0.2, 0.6], dtype=torch.float64)
    law = MarkovChain.stationary(density, persistence, LENGTH)
    assert torch.allclose(law.mean, density.expand(LENGTH), atol=1e-12)
    p = law.log_prob(STATES).exp()
    for k in (1, 3):
        product = (p * STATES[:, 2] * STATES[:, 2 + k]).sum()
        correlation = (product - density**2) / (density * (1 - density))
        assert correlation.item() == pytest.approx(0.6**k, rel=1e-10)
    # Run lengths of ones are geometric.
    stays = law.transition_logits[0, 1].sigmoid()
    assert (1 / (1 - stays)).item() == pytest.approx(1 / ((1 - 0.6) * (1 - 0.2)), rel=1e-10)


def test_samples_follow_the_law():
    law = chain((2,), length=7, spread=1.0)
    draws = law.sample((40_000,))
    assert draws.shape == (40_000, 2, 7)
    assert torch.allclose(draws.mean(0), law.mean, atol=0.015)
    together = (draws[..., :-1] * draws[..., 1:]).mean(0)
    assert torch.allclose(together, law.log_pair_marginals()[..., 1, 1].exp(), atol=0.015)


def test_gradients():
    initial = torch.randn(2, dtype=torch.float64, requires_grad=True)
    transition = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    evidence = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    other = chain((2,), length=6)

    def kl(initial, transition, evidence):
        return kl_divergence(MarkovChain(initial, transition).condition(evidence), other)

    assert torch.autograd.gradcheck(kl, (initial, transition, evidence))
    law = MarkovChain(initial, transition)
    assert not law.has_rsample
    assert law.expand((3, 2)).batch_shape == (3, 2)
    with pytest.raises(NotImplementedError, match="carry no gradient"):
        law.rsample()
    # Constant logits have no gradient to lose.
    assert other.has_rsample
    assert other.rsample().shape == (2, 6)


@pytest.mark.parametrize("length", [1, 2, 3, 500])
def test_float32_at_extremes(length):
    prior = MarkovChain.stationary(torch.tensor(1e-4), torch.tensor(0.9), length)
    for size in (0.0, 30.0, 1e4):
        evidence = size * torch.randn(3, length)
        law = prior.condition(evidence)
        for value in (law.mean, law.entropy(), law.marginal_logits, prior.log_normaliser(evidence)):
            assert value.isfinite().all()
        kl = kl_divergence(law, prior)
        assert kl.isfinite().all()
        assert (kl > -1e-4).all()
        assert law.log_prob(law.sample()).isfinite().all()


@pytest.mark.parametrize(
    ("initial", "transition", "match"),
    [
        (torch.zeros(()), torch.zeros(4, 3), "transition_logits"),
        (torch.zeros(3), torch.zeros(2, 4, 2), "broadcast"),
    ],
)
def test_errors(initial, transition, match):
    with pytest.raises(ValueError, match=match):
        MarkovChain(initial, transition)


@pytest.mark.parametrize("node", [0, 2, 3])
def test_infinite_evidence_fixes_a_node(node: int) -> None:
    chain = MarkovChain.stationary(torch.tensor(0.3).double(), torch.tensor(0.7).double(), 4)
    evidence = torch.zeros(4, dtype=torch.float64)
    for value, sign in ((0.0, -1), (1.0, 1)):
        evidence[node] = sign * math.inf
        fixed = chain.condition(evidence).mean
        evidence[node] = sign * 40.0
        assert float(fixed[node]) == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(fixed, chain.condition(evidence).mean, rtol=1e-9, atol=1e-12)
