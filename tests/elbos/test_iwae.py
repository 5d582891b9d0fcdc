"""IWAE and Renyi: the order of their bounds, and discrete sites that they sum out of the model."""

from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from every_objective import EVERY
from exact_bounds import flat
from pyro.infer import TraceEnum_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references


def test_bounds_are_in_order():
    model, guide = references.linear_gaussian(width=3, dim=1)
    references.set_to_posterior(model, guide, spread=2.0)
    x = torch.randn(4, 3, dtype=torch.float64)
    copies = x.repeat(3000, 1)
    evidence = references.evidence(model, x).sum().item()
    bounds = [-elbo.loss(model, guide, copies) / 3000 for elbo in map(pv.IWAE, (1, 2, 4, 8, 16))]
    assert all(low + 0.02 < high for low, high in pairwise([*bounds, evidence]))
    # falling in alpha, through the ELBO at 1
    renyi = [-pv.Renyi(a, 4).loss(model, guide, copies) / 3000 for a in (-1, 0, 0.5, 1, 2)]
    assert all(low + 0.02 < high for high, low in pairwise(renyi))
    assert renyi[3] == pytest.approx(references.elbo(model, guide, x).sum().item(), abs=0.05)


# Sites that only the model has.


class Clusters(PyroModule):
    """y ~ p(y); z ~ N(m_y, 1); x ~ N(z + shift_y, 0.5): y is summed out of prior and likelihood at once."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3).double())
        self.means, self.shift = (nn.Parameter(torch.randn(3).double()) for _ in range(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            p_y = dist.Categorical(logits=self.logits)
            y = pyro.sample("y", p_y, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.means[y], 1.0))
            loc = (z + self.shift[y]).unsqueeze(-1).expand(*(z + self.shift[y]).shape, 3)
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


class Summed(Clusters):
    """The same by hand: one factor."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            log_p = self.logits.log_softmax(-1) + dist.Normal(self.means, 1.0).log_prob(z.unsqueeze(-1))
            shifted = z.unsqueeze(-1) + self.shift
            likelihood = dist.Normal(shifted.unsqueeze(-1), 0.5).log_prob(x.unsqueeze(-2)).sum(-1)
            prior = dist.Normal(torch.zeros(()).double(), 1.0).log_prob(z)
            pyro.factor("x", (log_p + likelihood).logsumexp(-1) - prior)


class Encoder(PyroModule):
    def __init__(self, has_rsample):
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.has_rsample = has_rsample

    def forward(self, x):
        with pyro.plate("data", len(x)):
            q = dist.Normal(self.linear(x).squeeze(-1), 0.6)
            pyro.sample("z", q.has_rsample_(self.has_rsample))


@pytest.mark.parametrize(
    ("name", "has_rsample"),
    [(name, True) for name in ("IWAE", "IWAE, one by one", "Renyi", "DReG", "DReG, one by one")]
    + [(name, False) for name in ("IWAE", "IWAE, one by one", "Renyi")],
)
def test_a_discrete_site_of_the_model_alone_is_summed_out(name, has_rsample):
    elbo, model, guide = EVERY[name], Clusters(), Encoder(has_rsample)
    by_hand = Summed()
    by_hand.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    found = []
    for each in (model, by_hand):
        torch.manual_seed(1)
        found.append(flat(elbo.differentiable_loss(each, guide, x), pv.parameters(each, guide)))
    torch.testing.assert_close(*found)
    with (
        pv.scale_latents(0.5),
        pytest.raises(ValueError, match=r"'y', to be summed out.*no KL weight.*got the weight 0\.5"),
    ):
        elbo.differentiable_loss(model, guide, x)
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
    losses = [svi.step(x) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_mixture_is_summed_out_without_a_guide():
    model = references.Mixture()
    x = torch.randn(5, 2, dtype=torch.float64)
    exact = flat(-model.evidence(x).sum(), list(model.parameters()))
    for elbo in (pv.IWAE(1), pv.IWAE(3), TraceEnum_ELBO(max_plate_nesting=1)):
        found = elbo.differentiable_loss(model, lambda x: None, x)
        torch.testing.assert_close(flat(found, list(model.parameters())), exact)
    torch.testing.assert_close(references.mixture_elbo(model, model.posterior(x), x), model.evidence(x))
