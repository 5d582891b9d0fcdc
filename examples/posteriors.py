"""Train a VAE with a richer posterior on MNIST, dynamically binarised; print its test log evidence.

    python examples/posteriors.py --posterior flow

Story: z ~ N(0, I); x ~ p(x | z). What changes is the guide, q(z | x): factorised, with any covariance, or a
normalising flow.
"""

import argparse
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv

parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
parser.add_argument("--posterior", choices=["factorised", "full", "flow"], default="flow")
parser.add_argument("--latent-dim", type=int, default=20)
parser.add_argument("--hidden-dim", type=int, default=400)
parser.add_argument("--epochs", type=int, default=14)
parser.add_argument("--images", type=int, default=2000, help="test images for log p(x)")
parser.add_argument("--num-samples", type=int, default=1000, help="importance samples for log p(x)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs/posteriors"))
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

# The guide: one network, and the family that reads its features.
latent, hidden = options.latent_dim, options.hidden_dim
family: pv.Family
if options.posterior == "factorised":
    family = pv.DiagNormal()  # z = mu + sigma e
elif options.posterior == "full":
    family = pv.FullNormal()  # z = mu + L e, L = diag(sigma) U
else:
    family = pv.FlowNormal(latent)  # z = mu + sigma f_h(e), and f_h depends on x by the context h
network = pv.MLP(784, hidden, hidden, family.num_features(latent), activation=nn.SiLU)
guide = pv.Guide(nn.Sequential(network, family))

# The model.
decoder = nn.Sequential(pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU), pv.Bernoulli())
model = pv.Model(pv.StandardNormal(latent), decoder)

# The KL in closed form for the Gaussians; a flow has none, and there this is the plain ELBO.
optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=3e-3, fused=True)
steps = options.epochs * len(batches)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
svi = pv.SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())
for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
    print(epoch)

# The numbers: log p(x) - ELBO is what the posterior misses, KL(q(z | x) || p(z | x)).
terms = pv.elbo_terms(model, guide, x_test)
evidence = pv.log_evidence(model, guide, x_test, options.num_samples)
z = pv.latent_terms(model, guide, x_test[:1000], num_samples=50)["z"]
print(
    f"{options.posterior} posterior, mnist test, {protocol}, log mass in nats a datum: ELBO "
    f"{terms.elbo.mean():.2f}, KL {terms.kl.mean():.2f}, {int(z.active.sum())} of {latent} dimensions "
    f"active, log p(x) at least {evidence.mean():.2f} ({len(x_test)} images, {options.num_samples} "
    f"importance samples), gap {(evidence.mean() - terms.elbo.mean()):.2f}"
)

# The weights and the pictures.
options.out.mkdir(parents=True, exist_ok=True)
torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, options.out / "weights.pt")
reconstructed = pv.reconstruct(model, guide, x_test[:30])["x"].mean
pv.plots.reconstructions(x_test[:30], reconstructed).savefig(options.out / "reconstructions.png")
generated = pv.generate(model, x_test[:100])["x"].mean
pv.plots.images(generated, title="E[x | z], z from the prior").savefig(options.out / "samples.png")
