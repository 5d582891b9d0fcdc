"""Cluster the digits without a label: a discrete k, summed out, and a z.

    python examples/mixture.py

k ~ p(k), z ~ p(z | k), x ~ p(x | z): a VAE whose prior is a mixture of
Gaussians (Jiang et al. 2017, arXiv 1611.05148; Dilokthanakul et al. 2016, arXiv
1611.02648).
"""

import argparse
import math
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyro_vae as pv
from command_line import Parser, count, learning_rate, run
from results import save_pictures, write_summary


class Model(PyroModule):
    """k ~ p(k);  z ~ p(z | k);  x ~ p(x | z)."""

    def __init__(self, clusters: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("p", torch.ones(clusters) / clusters)
        self.mean = nn.Parameter(torch.zeros(clusters, latent))
        self.tril: Any = PyroParam(torch.eye(latent).repeat(clusters, 1, 1), dist.constraints.lower_cholesky)
        self.decoder = nn.Sequential(pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU), pv.Bernoulli())

    def forward(self, x: Tensor) -> None:
        """Sum over k, sample z and observe x."""
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(self.p), infer={"enumerate": "parallel"})  # p(k)
            z = pyro.sample("z", dist.MultivariateNormal(self.mean[k], scale_tril=self.tril[k]))  # p(z | k)
            pyro.sample("x", self.decoder(z), obs=x)  # p(x | z)


class Jitter(nn.Module):
    """In training, turn, slant, stretch and shift each image by a random map."""

    reach = torch.tensor([[0.15, 0.5, 0.2], [0.3, 0.15, 0.2]])

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, 784)`` to images ``(B, 784)``."""
        if not self.training:
            return x
        one, at_random = torch.eye(2, 3, device=x.device), torch.rand(len(x), 2, 3, device=x.device)
        maps = one + self.reach.to(x.device) * (2 * at_random - 1)
        grid = nn.functional.affine_grid(maps, [len(x), 1, 28, 28], align_corners=False)
        return nn.functional.grid_sample(x.view(-1, 1, 28, 28), grid, align_corners=False).flatten(1)


def place(z: Tensor, clusters: int, rounds: int = 60) -> tuple[Tensor, Tensor, float]:
    """Fit a Gaussian mixture to z by EM: means, Cholesky factors and the mean log density in nats."""
    seeds = z[torch.randint(len(z), (1,))]
    while len(seeds) < clusters:  # far from one another, as in k-means++ (Arthur and Vassilvitskii 2007)
        far = torch.cdist(z, seeds).amin(-1).square()
        seeds = torch.cat([seeds, z[torch.multinomial(far, 1)]])
    log_p = -torch.cdist(z, seeds).square()
    for _ in range(rounds):
        share = log_p.log_softmax(-1).softmax(0)  # p(k | z), for each k normalised over the images: (N, K)
        mean = share.T @ z
        square = [(one[:, None] * (z - m)).T @ (z - m) for one, m in zip(share.T, mean, strict=True)]
        tril = torch.linalg.cholesky(torch.stack(square) + 1e-4 * torch.eye(z.shape[1], device=z.device))
        log_p = dist.MultivariateNormal(mean, scale_tril=tril).log_prob(z[:, None]) - math.log(clusters)
    return mean, tril, log_p.logsumexp(-1).mean().item()


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Return the share of images in their digit's cluster, under the best one-to-one matching."""
    counts = torch.zeros(10, 10).index_put_((labels, found), torch.ones(len(found)), accumulate=True)
    best = {frozenset[int](): 0.0}  # set of clusters taken -> most images that the digits so far match
    for digit in counts.tolist():
        more = [(taken | {k}, n + digit[k]) for taken, n in best.items() for k in {*range(10)} - taken]
        best = dict(sorted(more, key=lambda each: each[1]))  # of equal sets, the last and best stays
    return max(best.values()) / len(found)


def main(options: argparse.Namespace) -> None:
    """Train without clusters, place them by EM, train on, and measure the clustering accuracy."""
    start = time.perf_counter()
    torch.set_float32_matmul_precision("medium")  # bfloat16 inside the products, where the CPU has it
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, protocol, options.batch_size, device=options.device)
    x_test = pv.data.observe(test, protocol).to(options.device)
    hidden, latent = options.hidden_dim, options.latent_dim
    model, encoder = Model(10, latent, hidden), pv.MLP(784, hidden, hidden, 2 * latent, activation=nn.SiLU)
    guide = pv.Guide(nn.Sequential(Jitter(), encoder, pv.DiagNormal()))  # q(z | x); it has no site k
    model, guide = model.to(options.device), guide.to(options.device)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)  # sums over k

    def test_accuracy() -> float:
        k = elbo.compute_marginals(model, guide.eval(), x_test)["k"]  # p(k | z), z ~ q(z | x); no jitter
        guide.train()
        return accuracy(k.logits.argmax(-1).cpu(), test.labels)

    def fit(program: nn.Module, loss: ELBO, epochs: int, lr: float) -> None:
        optimizer = torch.optim.Adam(pv.parameters(program, guide), lr=lr, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(batches))
        svi = pv.SVI(program, guide, optimizer, loss=pv.CompiledELBO(loss) if options.compiled else loss)
        for epoch in pv.fit(svi, batches, epochs, watch=x_test[:1000], scheduler=scheduler):
            print(f"{epoch}   accuracy {test_accuracy():.2%}", flush=True)

    with pv.scale_latents(0.1):  # a tenth of the KL: nearly an autoencoder, without clusters
        plain = pv.Model(pv.StandardNormal(latent).to(options.device), model.decoder)
        fit(plain, TraceMeanField_ELBO(), options.plain_epochs, options.lr)
    with torch.no_grad():
        z = guide.eval().encoder(pv.data.observe(train, protocol)[:20_000].to(options.device)).sample()
        model.mean.data, model.tril, _ = max((place(z, 10) for _ in range(10)), key=lambda found: found[-1])
    print(f"clusters placed by EM   accuracy {(accuracy_of_em := test_accuracy()):.2%}", flush=True)
    fit(model, elbo, options.epochs, options.lr / 2)

    terms = pv.elbo_terms(model, guide, x_test)
    numbers = {
        "protocol": str(protocol),
        "unit": "nats per data point, log mass",
        "accuracy_of_em": accuracy_of_em,
        "accuracy": test_accuracy(),
        **{f"test_{name}": term.mean().item() for name, term in terms._asdict().items()},
        "test_log_evidence": pv.log_evidence(model, guide, x_test, options.num_samples).mean().item(),
        "seconds": time.perf_counter() - start,
    }
    with torch.no_grad():
        k = torch.arange(10, device=options.device).repeat_interleave(10)
        z = dist.MultivariateNormal(model.mean[k], scale_tril=model.tril[k]).sample()  # p(z | k)
        picture = pv.plots.images(model.decoder(z).mean, title="E[x | z], z from p(z | k): a row for each k")
    save_pictures(options.out, {"clusters": picture})
    write_summary(options, numbers)
    print(f"accuracy without a label: {numbers['accuracy']:.2%}; results are in {options.out}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--latent-dim", type=count, default=10, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=500, help="units of a hidden layer")
    parser.add_argument("--plain-epochs", type=count, default=24, help="passes over the data before EM")
    parser.add_argument("--epochs", type=count, default=12, help="passes over the data after EM")
    parser.add_argument("--batch-size", type=count, default=256, help="images of a step")
    parser.add_argument("--lr", type=learning_rate, default=2e-3, help="the peak of its one-cycle schedules")
    parser.add_argument("--compiled", action="store_true", help="run the steps as a compiled graph")
    run(main, parser, num_samples=1000, out="runs/mixture")
