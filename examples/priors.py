"""Train a VAE with a learned prior on MNIST, dynamically binarised; print its test log evidence.

    python examples/priors.py --prior vamp

Story: z ~ p(z), which is learned; x ~ p(x | z). The guide is the usual one, q(z | x) a factorised Gaussian.
"""

import argparse
from pathlib import Path

import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv

parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
parser.add_argument("--prior", choices=["normal", "mixture", "vamp", "flow"], default="vamp")
parser.add_argument("--components", type=int, default=500, help="of the mixtures")
parser.add_argument("--latent-dim", type=int, default=20)
parser.add_argument("--hidden-dim", type=int, default=400)
parser.add_argument("--epochs", type=int, default=14)
parser.add_argument("--images", type=int, default=2000, help="test images for log p(x)")
parser.add_argument("--num-samples", type=int, default=1000, help="importance samples for log p(x)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs/priors"))
options = parser.parse_args()
if min(options.epochs, options.num_samples) < 1:
    parser.error("--epochs, --num-samples: expected a positive whole number")
torch.manual_seed(options.seed)
torch.set_flush_denormal(True)

# The data.
protocol = pv.data.DynamicBinarisation()
train, test = pv.data.load(train=True), pv.data.load(train=False)
batches = pv.data.Batches(train, protocol, batch_size=128)
x_test = pv.data.observe(test, protocol)[: options.images]

# The guide: q(z | x) = N(mu, diag sigma^2).
latent, hidden = options.latent_dim, options.hidden_dim
encoder = nn.Sequential(pv.MLP(784, hidden, hidden, 2 * latent, activation=nn.SiLU), pv.DiagNormal())
guide = pv.Guide(encoder)

# The model: z ~ p(z), x ~ p(x | z).
prior: nn.Module
if options.prior == "normal":
    prior = pv.StandardNormal(latent)
elif options.prior == "mixture":
    prior = pv.MixturePrior(latent, options.components)
elif options.prior == "vamp":
    # p(z) = 1 / K sum_k q(z | u_k): the guide's own encoder, at pseudo-inputs that start as training images.
    prior = pv.VampPrior(encoder, pv.data.observe(train, pv.data.Grey())[: options.components])
else:
    prior = pv.FlowPrior(latent)
decoder = nn.Sequential(pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU), pv.Bernoulli())
model = pv.Model(prior, decoder)

# No learned prior has a closed form of its KL, so the plain ELBO it is.
optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=3e-3, fused=True)
steps = options.epochs * len(batches)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
svi = pv.SVI(model, guide, optimizer, loss=Trace_ELBO())
for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
    print(epoch)

# The numbers.
terms = pv.elbo_terms(model, guide, x_test)
evidence = pv.log_evidence(model, guide, x_test, options.num_samples)
z = pv.latent_terms(model, guide, x_test[:1000], num_samples=50)["z"]
print(
    f"{options.prior} prior, mnist test, {protocol}, log mass in nats a datum: ELBO "
    f"{terms.elbo.mean():.2f}, KL {terms.kl.mean():.2f}, {int(z.active.sum())} of {latent} dimensions "
    f"active, log p(x) at least {evidence.mean():.2f} ({len(x_test)} images, {options.num_samples} "
    "importance samples)"
)

# The weights and the pictures.
options.out.mkdir(parents=True, exist_ok=True)
torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, options.out / "weights.pt")
generated = pv.generate(model, x_test[:100])["x"].mean
figure = pv.plots.images(generated, title=f"E[x | z], z from the {options.prior} prior")
figure.savefig(options.out / "samples.png")
if isinstance(prior, pv.VampPrior):
    figure = pv.plots.images(prior.pseudo_inputs[:100], title="pseudo-inputs")
    figure.savefig(options.out / "pseudo_inputs.png")
