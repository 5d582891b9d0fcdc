"""Cluster the digits without a label: a discrete k, summed out exactly, and a continuous z.

    python examples/mixture.py

k ~ p(k), z ~ p(z | k), x ~ p(x | z): a variational autoencoder whose prior is a mixture of Gaussians
(Jiang et al. 2017, arXiv 1611.05148; Dilokthanakul et al. 2016, arXiv 1611.02648).
"""

import argparse
import json
import math
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv


class Model(PyroModule):
    """k ~ p(k);  z ~ p(z | k);  x ~ p(x | z)."""

    def __init__(self, clusters: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("logits", torch.zeros(clusters))
        self.mean = nn.Parameter(torch.zeros(clusters, latent))
        self.log_sigma = nn.Parameter(torch.zeros(clusters, latent))
        network = pv.MLP(latent, hidden, hidden, 784, activation=nn.SiLU)
        self.decoder = nn.Sequential(network, pv.Bernoulli())

    def clusters(self, *, trained: bool) -> None:
        """Say whether the clusters are trained."""
        self.mean.requires_grad_(trained)
        self.log_sigma.requires_grad_(trained)

    def forward(self, x: Tensor) -> None:
        """Sum over k, sample z and observe x."""
        with pyro.plate("data", len(x)):
            p = dist.Categorical(logits=self.logits)
            k = pyro.sample("k", p, infer={"enumerate": "parallel"})  # p(k)
            z = pyro.sample("z", dist.Normal(self.mean[k], self.log_sigma[k].exp()).to_event(1))  # p(z | k)
            pyro.sample("x", self.decoder(z), obs=x)  # p(x | z)


def place(z: Tensor, clusters: int, rounds: int = 60) -> tuple[Tensor, Tensor, float]:
    """Return means and standard deviations of a mixture by EM, and its mean log density in nats."""
    seeds = z[torch.randint(len(z), (1,))]
    while len(seeds) < clusters:  # far from one another, as in k-means++
        far = torch.cdist(z, seeds).amin(-1).square()
        seeds = torch.cat([seeds, z[torch.multinomial(far, 1)]])
    log_p = -torch.cdist(z, seeds).square()
    for _ in range(rounds):
        share = log_p.softmax(-1)  # p(k | z), (N, K)
        mean, square = (share.T @ power / share.sum(0)[:, None] for power in (z, z**2))
        sigma = (square - mean**2).sqrt()
        log_p = dist.Normal(mean, sigma).to_event(1).log_prob(z[:, None]) - math.log(clusters)
    return mean, sigma, log_p.logsumexp(-1).mean().item()


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Return the share of images told right, by the best one-to-one matching of clusters to digits."""
    counts = torch.zeros(10, 10).index_put_((labels, found), torch.ones(len(found)), accumulate=True)
    best = {0: 0.0}  # set of clusters, as bits -> most images that the digits so far can have in them
    for digit in counts.tolist():
        longer: dict[int, float] = {}
        for taken, count in best.items():
            for k, more in enumerate(digit):
                if not taken >> k & 1:
                    longer[taken | 1 << k] = max(longer.get(taken | 1 << k, 0.0), count + more)
        best = longer
    return max(best.values()) / len(found)


def main(options: argparse.Namespace) -> None:
    """Train without clusters, place them by EM, train on, and count the digits told right."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("medium")  # bfloat16 inside the products, where the CPU has it
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, protocol, options.batch_size)
    x_test = pv.data.observe(test, protocol)

    hidden, latent = options.hidden_dim, options.latent_dim
    model = Model(10, latent, hidden)
    encoder = pv.MLP(784, hidden, hidden, 2 * latent, activation=nn.SiLU)
    guide = pv.Guide(nn.Sequential(encoder, pv.DiagNormal()))  # q(z | x); k is nowhere in it
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def told_right() -> float:
        k = elbo.compute_marginals(model, guide, x_test)["k"]  # p(k | z), z ~ q(z | x)
        return accuracy(k.logits.argmax(-1), test.labels)

    def fit(epochs: int, lr: float) -> None:
        optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=lr, fused=True)
        svi = pv.SVI(model, guide, optimizer, loss=pv.CompiledELBO(elbo) if options.compiled else elbo)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(batches))
        for epoch in pv.fit(svi, batches, epochs, watch=x_test[:1000], scheduler=scheduler):
            print(f"{epoch}   accuracy {told_right():.2%}", flush=True)

    model.clusters(trained=False)  # all alike: p(z) = N(0, I)
    fit(options.plain_epochs, options.lr)
    with torch.no_grad():
        z = guide.encoder(pv.data.observe(train, protocol)[:20_000]).sample()
        mean, sigma, _ = max((place(z, 10) for _ in range(5)), key=lambda found: found[-1])
        model.mean.copy_(mean)
        model.log_sigma.copy_(sigma.log())
    placed = told_right()
    model.clusters(trained=True)
    fit(options.epochs, options.lr / 2)

    terms = pv.elbo_terms(model, guide, x_test)
    record = {name: value for name, value in vars(options).items() if name != "out"} | {
        "dataset": "mnist",
        "likelihood": "bernoulli",
        "protocol": str(protocol),
        "unit": "nats a datum, log mass",
        "accuracy_of_em": placed,
        "accuracy": told_right(),
        "test_elbo": terms.elbo.mean().item(),
        "test_reconstruction": terms.reconstruction.mean().item(),
        "test_kl": terms.kl.mean().item(),
        "test_log_evidence": pv.log_evidence(model, guide, x_test, options.num_samples).mean().item(),
        "seconds": time.perf_counter() - start,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"told right without a label: {record['accuracy']:.2%}; numbers are in {options.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden-dim", type=int, default=500)
    parser.add_argument("--plain-epochs", type=int, default=5, help="before EM")
    parser.add_argument("--epochs", type=int, default=20, help="after EM")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3, help="the peak of its one-cycle schedules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=1000, help="for log p(x)")
    parser.add_argument("--compiled", action="store_true", help="run the steps as a compiled graph")
    parser.add_argument("--out", type=Path, default=Path("runs/mixture"))
    main(parser.parse_args())
