"""Train a convolutional VAE on MNIST, dynamically binarised; print its test log evidence.

    python examples/convolutional.py

Story and guide are the plain ones. The networks see images: they take flat pixels, as all of the package
does, and any dimensions on their left, so importance samples and particles run side by side.
"""

import argparse
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv

parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
parser.add_argument("--latent-dim", type=int, default=20)
parser.add_argument("--channels", type=int, nargs=2, default=[32, 64])
parser.add_argument("--epochs", type=int, default=14)
parser.add_argument("--images", type=int, default=1000, help="test images for log p(x)")
parser.add_argument("--num-samples", type=int, default=1000, help="importance samples for log p(x)")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--out", type=Path, default=Path("runs/convolutional"))
options = parser.parse_args()
if min(options.epochs, options.num_samples) < 1:
    parser.error("--epochs, --num-samples: expected a positive whole number")
torch.manual_seed(options.seed)
torch.set_flush_denormal(True)

# The data.
protocol = pv.data.DynamicBinarisation()
train, test = pv.data.load(train=True), pv.data.load(train=False)
batches = pv.data.Batches(train, protocol, batch_size=128, device=options.device)
x_test = pv.data.observe(test, protocol)[: options.images].to(options.device)

# Networks: 28 x 28 -> 14 x 14 -> 7 x 7 -> features, and back.
latent, (wide, small), shape = options.latent_dim, options.channels, (1, 28, 28)
down = pv.ConvDown(shape, wide, small, num_features=2 * latent, activation=nn.SiLU)
up = pv.ConvUp(latent, small, wide, shape=shape, activation=nn.SiLU)

# Model and guide: z ~ N(0, I), x ~ p(x | z); z ~ q(z | x).
model = pv.Model(pv.StandardNormal(latent), nn.Sequential(up, pv.Bernoulli())).to(options.device)
guide = pv.Guide(nn.Sequential(down, pv.DiagNormal())).to(options.device)

optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=2e-3, fused=True)
steps = options.epochs * len(batches)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
svi = pv.SVI(model, guide, optimizer, loss=TraceMeanField_ELBO())
for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
    print(epoch)

# The numbers.
terms = pv.elbo_terms(model, guide, x_test)
evidence = pv.log_evidence(model, guide, x_test, options.num_samples)
z = pv.latent_terms(model, guide, x_test[:500], num_samples=50)["z"]
print(
    f"convolutional, mnist test, {protocol}, log mass in nats a datum: ELBO {terms.elbo.mean():.2f}, KL "
    f"{terms.kl.mean():.2f}, {int(z.active.sum())} of {latent} dimensions active, log p(x) at least "
    f"{evidence.mean():.2f} ({len(x_test)} images, {options.num_samples} importance samples)"
)

# The weights and the pictures: along the axes that carry most, and from one image to another.
options.out.mkdir(parents=True, exist_ok=True)
torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, options.out / "weights.pt")
with torch.no_grad():
    mean = guide.encoder(x_test[:20]).mean
    axes = z.spread.argsort(descending=True)[:8].tolist()
    lines = pv.plots.latent_lines(mean[0], axes)
    figure = pv.plots.traversals(model.decoder(lines).mean, axes)
    figure.savefig(options.out / "traversals.png")
    paths = pv.plots.latent_paths(mean[:10], mean[10:20])
    figure = pv.plots.interpolations(model.decoder(paths).mean)
    figure.savefig(options.out / "interpolations.png")
    generated = pv.generate(model, x_test[:100])["x"].mean
    figure = pv.plots.images(generated, title="E[x | z], z from the prior")
    figure.savefig(options.out / "samples.png")
