"""The closed form of the evidence against scikit-learn: a trained linear VAE is probabilistic PCA.

Lucas et al. 2019, arXiv 1911.02469: a linear VAE reaches the maximum likelihood of probabilistic PCA.
"""

import pyro
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references


def test_a_trained_linear_vae_reaches_the_likelihood_of_probabilistic_pca():
    width, dim, size = 8, 2, 500
    x = torch.randn(size, dim) @ torch.randn(dim, width) + 0.3 * torch.randn(size, width) + 1.0
    best = PCA(n_components=dim).fit(x.numpy()).score(x.numpy())

    decoder = nn.Sequential(nn.Linear(dim, width), pv.Gaussian(pv.LearnedSigma(0.5)))
    model = pv.Model(pv.StandardNormal(dim), decoder)
    guide = pv.Guide(nn.Sequential(nn.Linear(width, 2 * dim), pv.DiagNormal()))
    before = references.evidence(model, x).mean().item()
    elbo = pv.CompiledELBO(pv.MeanField(4), backend="eager")
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=elbo)
    schedule = torch.optim.lr_scheduler.LinearLR(svi.optimizer, 1.0, 0.01, total_iters=1500)
    for _ in pv.fit(svi, 150 * [x], 10, scheduler=schedule, progress=False):
        pass

    evidence = references.evidence(model, x).mean().item()
    assert before < best - 5  # there was something to learn
    assert best - 0.05 < evidence < best + 1e-3
    # The guide has reached the posterior: the bound is tight.
    with torch.no_grad():
        elbo = references.elbo(model, guide, x)
    assert abs(elbo.mean().item() - evidence) < 0.05


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.5])
def test_the_importance_weighted_bound_by_quadrature(spread):
    model, guide = references.linear_gaussian(dim=1)
    references.set_to_posterior(model, guide, spread)
    x = torch.randn(6, 5, dtype=torch.float64)

    def bound(k):
        return references.importance_weighted_bound(model, guide, x, k)

    torch.testing.assert_close(bound(1), references.elbo(model, guide, x), atol=1e-9, rtol=0)
    trained = pv.parameters(model, guide)
    by_quadrature = torch.autograd.grad(bound(1).sum(), trained)
    exact = torch.autograd.grad(references.elbo(model, guide, x).sum(), trained)
    torch.testing.assert_close(by_quadrature, exact, atol=1e-8, rtol=0)
    evidence = references.evidence(model, x)
    if spread == 1:  # every weight is p(x)
        torch.testing.assert_close(bound(7), evidence, atol=1e-9, rtol=0)
        return
    drawn = pv.log_evidence(model, guide, x.repeat(400, 1), 4).values.view(400, -1)
    assert ((drawn.mean(0) - bound(4)).abs() < 5 * drawn.std(0) / 20).all()
    assert (bound(1) < bound(4)).all()
    assert (bound(4) < bound(50)).all()
    assert (bound(50) < evidence).all()


def test_the_quadrature_is_over_one_dimension():
    x = torch.randn(6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="model: expected one latent dimension, got 2"):
        references.importance_weighted_bound(*references.linear_gaussian(dim=2), x, 5)
