"""MeanField and FreeBits."""

import torch
from exact_bounds import flat, weighted_loss
from gaussian_pairs import Plated, outer, subsampled

import pyro_vae as pv


def test_free_bits_are_free():
    x = torch.randn(4, 3, dtype=torch.float64)
    pair = Plated(outer, inner=True)
    torch.manual_seed(2)
    pair.guide(x)
    q = torch.distributions.Normal(pair.w * x + pair.loc, 0.8)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean(0)
    for nats in (0.0, kl.median().item() + 1e-3, 5.0):
        torch.manual_seed(2)
        with pv.scale_latents(0.7):
            found = pv.FreeBits(nats).differentiable_loss(pair.model, pair.guide, x)
        torch.manual_seed(2)
        z = q.rsample()
        reconstruction = torch.distributions.Normal(z, 0.7).log_prob(x).sum()
        expected = 0.7 * 4 * kl.clamp(min=nats).sum() - reconstruction
        trained = list(pair.parameters())
        torch.testing.assert_close(flat(found, trained), flat(expected, trained))
    # subsampled, masked and with several draws: the mean is over the data that are there
    mask = torch.tensor([True, False, True, True])
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)[mask].mean()
    losses = [
        weighted_loss(Plated(subsampled, mask=mask), pv.FreeBits(nats, 3), x, beta=1)[0]
        for nats in (0.0, 5.0)
    ]
    torch.testing.assert_close(losses[1] - losses[0], 10 / 4 * 3 * (5 - kl.detach()))
