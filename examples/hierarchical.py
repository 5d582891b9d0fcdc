"""Two layers of latents, p(z2) p(z1 | z2) p(x | z1), and two guides.

    python examples/hierarchical.py --guide bottom-up
    python examples/hierarchical.py --guide top-down --elbo mean-field

Bottom-up is the two-layer model of Burda et al. 2015 (arXiv 1509.00519).
"""

import argparse
import time

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv
from command_line import Parser, count, learning_rate, run, several
from results import save_pictures, write_summary

Z1, Z2 = 100, 50  # widths of the two layers, as in Burda et al.


def network(*sizes: int) -> pv.MLP:
    """Return an MLP of smooth units."""
    return pv.MLP(*sizes, activation=nn.SiLU)


class Model(PyroModule):
    """z2 ~ p(z2);  z1 ~ p(z1 | z2);  x ~ p(x | z1)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.prior = pv.StandardNormal(Z2)
        self.upper = nn.Sequential(network(Z2, hidden // 2, hidden // 2, 2 * Z1), pv.DiagNormal())
        self.decoder = nn.Sequential(network(Z1, hidden, hidden, 784), pv.Bernoulli())

    def forward(self, x: Tensor) -> None:
        """Sample z2, then z1, and observe x."""
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.prior())  # p(z2)
            z1 = pyro.sample("z1", self.upper(z2))  # p(z1 | z2)
            pyro.sample("x", self.decoder(z1), obs=x)  # p(x | z1)


class BottomUp(PyroModule):
    """z1 ~ q(z1 | x);  z2 ~ q(z2 | z1): the arrows of the model, reversed."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lower = nn.Sequential(network(784, hidden, hidden, 2 * Z1), pv.DiagNormal())
        self.upper = nn.Sequential(network(Z1, hidden // 2, hidden // 2, 2 * Z2), pv.DiagNormal())

    def forward(self, x: Tensor) -> None:
        """Sample z1, then z2."""
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.lower(x))  # q(z1 | x)
            pyro.sample("z2", self.upper(z1))  # q(z2 | z1)


class TopDown(PyroModule):
    """z2 ~ q(z2 | x);  z1 ~ q(z1 | z2, x): the model's own order."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.features = nn.Sequential(network(784, hidden, hidden), nn.SiLU())
        self.upper = nn.Sequential(network(hidden, hidden // 2, 2 * Z2), pv.DiagNormal())
        self.from_x, self.from_z2 = nn.Linear(hidden, hidden), nn.Linear(Z2, hidden)
        self.lower = nn.Sequential(nn.SiLU(), network(hidden, 2 * Z1), pv.DiagNormal())

    def forward(self, x: Tensor) -> None:
        """Sample z2, then z1."""
        features = self.features(x)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.upper(features))  # q(z2 | x)
            pyro.sample("z1", self.lower(self.from_x(features) + self.from_z2(z2)))  # q(z1 | z2, x)


GUIDES = {"bottom-up": BottomUp, "top-down": TopDown}
ELBOS = {"trace": Trace_ELBO(), "mean-field": TraceMeanField_ELBO()}


def main(options: argparse.Namespace) -> None:
    """Train and evaluate."""
    start = time.perf_counter()
    torch.set_float32_matmul_precision("medium")  # bfloat16 inside the products, where the CPU has it
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    batches = pv.data.Batches(train, protocol, options.batch_size, device=options.device)
    x_test = pv.data.observe(test, protocol).to(options.device)

    model = Model(options.hidden_dim).to(options.device)
    guide = GUIDES[options.guide](options.hidden_dim).to(options.device)
    loss = pv.CompiledELBO(ELBOS[options.elbo]) if options.compiled else ELBOS[options.elbo]
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=loss)
    for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
        print(epoch, flush=True)

    elbo, reconstruction, kl = (term.mean().item() for term in pv.elbo_terms(model, guide, x_test))
    evidence = pv.log_evidence(model, guide, x_test, options.num_samples).mean().item()
    numbers = {
        "dataset": "mnist",
        "likelihood": "bernoulli",
        "protocol": str(protocol),
        "unit": "nats per data point, log mass",
        "test_elbo": elbo,
        "test_reconstruction": reconstruction,
        "test_kl": kl,
        "test_log_evidence": evidence,
        "seconds": time.perf_counter() - start,
    }
    with torch.no_grad():
        z2 = model.prior().sample((10,)).repeat_interleave(10, 0)  # ten draws of z1 for each z2
        generated = model.decoder(model.upper(z2).sample()).mean
    title = "E[x | z1]: a row is one z2, with ten draws of z1"
    save_pictures(options.out, {"samples": pv.plots.images(generated, title=title)})
    write_summary(options, numbers)
    print(
        f"{options.guide}, {options.elbo} ELBO; test, {protocol}: ELBO {elbo:.2f}, log p(x) at least "
        f"{evidence:.2f} nats per data point ({options.num_samples} importance samples)"
    )


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--guide", choices=GUIDES, default="bottom-up", help="the order in which it draws")
    parser.add_argument("--elbo", choices=ELBOS, default="trace", help="how the KL is taken")
    parser.add_argument("--hidden-dim", type=several, default=200, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=30, help="passes over the data")
    parser.add_argument("--batch-size", type=count, default=128, help="images of a step")
    parser.add_argument("--lr", type=learning_rate, default=3e-3, help="the peak of its one-cycle schedule")
    parser.add_argument("--compiled", action="store_true", help="run the steps as a compiled graph")
    run(main, parser, num_samples=1000, out="runs/hierarchical")
