"""The models of Burda et al. 2015, which reproduce_iwae.py trains, and those with more of a prior."""

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv
from hierarchical import Z1, Z2, BottomUp, Model


def network(*sizes: int) -> pv.MLP:
    """Return an MLP of tanh units, with the initial weights of Glorot and Bengio."""
    mlp = pv.MLP(*sizes, activation=nn.Tanh)
    for parameter in mlp.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)
    return mlp


def model_and_guide(layers: int, prior: str, hidden: int, mean: Tensor) -> tuple[PyroModule, PyroModule]:
    """Return the model and the guide; both start at the mean of the data."""
    width = Z2 if layers == 1 else Z1  # of the latent next to x
    to_x, from_x = network(width, hidden, hidden, 784), network(784, hidden, hidden, 2 * width)
    weight, first_bias, *_ = from_x.parameters()
    *_, last_bias = to_x.parameters()
    with torch.no_grad():
        first_bias.copy_(-weight @ mean)  # as if x came without its mean
        last_bias.copy_(mean.clamp(0.001, 0.999).logit())
    decoder = nn.Sequential(to_x, pv.Bernoulli())  # p(x | z)
    encoder = nn.Sequential(from_x, pv.DiagNormal())  # q(z | x)
    if layers == 1:
        return pv.Model(top_prior(prior, encoder, mean), decoder), pv.Guide(encoder)
    model, guide = Model(hidden), BottomUp(hidden)  # of hierarchical.py, with these parts:
    guide.lower = encoder  # q(z1 | x)
    guide.upper = nn.Sequential(network(Z1, hidden // 2, hidden // 2, 2 * Z2), pv.DiagNormal())  # q(z2 | z1)
    model.prior = top_prior(prior, guide.upper, torch.zeros(Z1))  # type: ignore[assignment]
    model.upper = nn.Sequential(network(Z2, hidden // 2, hidden // 2, 2 * Z1), pv.DiagNormal())  # p(z1 | z2)
    model.decoder = decoder
    return model, guide


def top_prior(name: str, encoder: nn.Module, mean: Tensor) -> nn.Module:
    """Return p(z) of the top latent, whose encoder takes inputs with this mean."""
    if name == "vamp":
        return pv.VampPrior(encoder, mean + 0.1 * torch.randn(500, len(mean)))
    return pv.FlowPrior(Z2) if name == "flow" else pv.StandardNormal(Z2)
