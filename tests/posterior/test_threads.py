"""Several threads that predict get one thread's numbers, and leave the network as it was."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from pyro_sparse import guides, models
from pyro_sparse.nets import normalisations
from pyro_sparse.posterior import Posterior


def test_threads_take_turns():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(2, (60,))
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = models.SpikeSlabGaussian(net, x[:2], num_data=60)
    posterior = Posterior(model, guides.for_model(model, initial_inclusion=0.6), x)
    posterior.refresh_statistics()
    alone = posterior.masked(x)
    buffers = [b.clone() for layer in normalisations(model.net) for b in layer.buffers()]

    def work(number: int) -> torch.Tensor:
        if number % 2:
            posterior.evaluate(x, y, num_samples=2)
            assert posterior.predict(x, 3).isfinite().all()
        return posterior.masked(x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(24)))
    assert all(torch.equal(one, alone) for one in found)
    after = [b for layer in normalisations(model.net) for b in layer.buffers()]
    assert all(map(torch.equal, buffers, after))
    assert model.net.training


def test_scores_leave_the_random_state_as_it_was():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randint(2, (30,))
    model = models.SpikeSlabGaussian(
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), x[:2], num_data=30
    )
    posterior = Posterior(model, guides.for_model(model, initial_inclusion=0.6))
    state = torch.get_rng_state()
    scores = [posterior.evaluate(x, y, num_samples=3) for _ in range(2)]
    posterior.calibration(x, y, num_samples=3)
    posterior.temperature(x, y, num_samples=3)
    posterior.out_of_distribution(x, x + 1, num_samples=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores[0] == scores[1]
    # Draws are for those who ask for them: new ones each time.
    assert not torch.equal(posterior.predict(x, 1), posterior.predict(x, 1))
