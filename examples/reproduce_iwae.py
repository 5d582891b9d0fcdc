"""Reproduce a row of table 1 of Burda et al. 2015: log p(x) of MNIST.

    python examples/reproduce_iwae.py
    python examples/reproduce_iwae.py --layers 2 --objective dreg --k 5

Models, bounds and protocol are those of arXiv 1509.00519: one or two layers,
tanh, dynamic binarisation, 5,000 importance samples on all test images. The
schedule is ours: larger batches, and one cycle of the learning rate.
"""

import argparse
import time

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv
from command_line import Parser, count, learning_rate, run, several, threads
from results import machine, save_weights, write_summary

# The ELBO (two gradients of one bound), and the importance-weighted bound (two as well), of k samples.
OBJECTIVES = {"vae": pv.MeanField, "stl": pv.STL, "iwae": pv.IWAE, "dreg": pv.DReG}
# Passes over the data for each k, for one layer; two layers get half of them. Quick is ten minutes of
# training on two cores.
PASSES = {"quick": {1: 240, 5: 90, 50: 12}, "full": {1: 1000, 5: 500, 50: 100}}
Z1, Z2 = 100, 50  # widths of the two layers; a single one has the width Z2


def network(*sizes: int) -> pv.MLP:
    """Return an MLP of tanh units, with the initial weights of Glorot and Bengio."""
    mlp = pv.MLP(*sizes, activation=nn.Tanh)
    for parameter in mlp.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)
    return mlp


class TwoLayers(PyroModule):
    """z2 ~ p(z2);  z1 ~ p(z1 | z2);  x ~ p(x | z1)."""

    def __init__(self, prior: nn.Module, decoder: nn.Module, hidden: int) -> None:
        super().__init__()
        self.prior, self.decoder = prior, decoder
        self.upper = nn.Sequential(network(Z2, hidden, hidden, 2 * Z1), pv.DiagNormal())

    def forward(self, x: Tensor) -> None:
        """Sample z2, then z1, and observe x."""
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.prior())  # p(z2)
            z1 = pyro.sample("z1", self.upper(z2))  # p(z1 | z2)
            pyro.sample("x", self.decoder(z1), obs=x)  # p(x | z1)


class BottomUp(PyroModule):
    """z1 ~ q(z1 | x);  z2 ~ q(z2 | z1)."""

    def __init__(self, lower: nn.Module, upper: nn.Module) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper

    def forward(self, x: Tensor) -> None:
        """Sample z1, then z2."""
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.lower(x))  # q(z1 | x)
            pyro.sample("z2", self.upper(z1))  # q(z2 | z1)


def model_and_guide(layers: int, prior: str, hidden: int, mean: Tensor) -> tuple[PyroModule, PyroModule]:
    """Return the model and the guide; both start at the mean of the data."""
    width = Z2 if layers == 1 else Z1
    to_x, from_x = network(width, hidden, hidden, 784), network(784, hidden, hidden, 2 * width)
    weight, first_bias, *_ = from_x.parameters()
    *_, last_bias = to_x.parameters()
    with torch.no_grad():
        first_bias.copy_(-weight @ mean)  # as if x came without its mean
        last_bias.copy_(mean.clamp(0.001, 0.999).logit())
    decoder = nn.Sequential(to_x, pv.Bernoulli())  # p(x | z)
    encoder = nn.Sequential(from_x, pv.DiagNormal())  # q(z | x)
    # The top latent: its q, and its p, which may be learned.
    top, inputs = encoder, mean.expand(500, -1)
    if layers == 2:
        top = nn.Sequential(network(Z1, hidden // 2, hidden // 2, 2 * Z2), pv.DiagNormal())
        inputs = torch.zeros(500, Z1)
    priors = {"normal": lambda: pv.StandardNormal(Z2), "flow": lambda: pv.FlowPrior(Z2)}
    priors["vamp"] = lambda: pv.VampPrior(top, inputs + 0.1 * torch.randn_like(inputs))
    p_z = priors[prior]()
    if layers == 1:
        return pv.Model(p_z, decoder), pv.Guide(encoder)
    return TwoLayers(p_z, decoder, hidden // 2), BottomUp(encoder, top)


def seconds_of_a_step(loss: pv.CompiledELBO, model: nn.Module, guide: nn.Module, x: Tensor) -> float:
    """Time the loss and its gradients, once captured; leave the random numbers and weights alone."""
    with torch.random.fork_rng():
        for step in range(11):
            if step == 1:
                start = time.perf_counter()
            loss.loss_and_grads(model, guide, x)
    model.zero_grad()
    guide.zero_grad()
    return (time.perf_counter() - start) / 10


def main(options: argparse.Namespace) -> None:
    """Train, evaluate and write the row."""
    if options.threads:
        torch.set_num_threads(options.threads)
    layers, k = int(options.layers), int(options.k)
    passes = options.epochs or PASSES[options.budget][k] // layers
    protocol = pv.data.DynamicBinarisation()
    train, test = pv.data.load(train=True), pv.data.load(train=False)
    x_train, x_test = (pv.data.observe(images, protocol).to(options.device) for images in (train, test))
    batches = pv.data.Batches(train, protocol, options.batch_size, device=options.device)

    pair = model_and_guide(layers, options.prior, options.hidden_dim, train.pixels.float().mean(0) / 255)
    model, guide = (part.to(options.device) for part in pair)
    backend = "inductor" if options.compiled else "eager"
    loss = pv.CompiledELBO(OBJECTIVES[options.objective](k), backend=backend)
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, passes * len(batches), pct_start=0.05, cycle_momentum=False
    )
    svi = pv.SVI(model, guide, optimizer, loss=loss)

    expected = passes * len(batches) * seconds_of_a_step(loss, model, guide, x_train[: options.batch_size])
    name = f"{layers} layer{'s' * (layers > 1)}, {options.objective}, k = {k}, {options.prior} prior"
    print(f"{name}: {passes} passes, about {expected / 60:.1f} minutes of training", flush=True)
    start = time.perf_counter()
    for epoch in pv.fit(svi, batches, passes, watch=x_test[:1000], scheduler=scheduler):
        print(epoch, flush=True)
    trained = time.perf_counter() - start
    save_weights(options.out, model, guide)

    log_p = pv.log_evidence(model, guide, x_test, options.num_samples, compiled=options.compiled)
    latents = pv.latent_terms(model, guide, x_test[:1000])
    numbers = {
        "dataset": "mnist",
        "protocol": str(protocol),
        "unit": "nats a datum, log mass",
        "passes": passes,
        "steps": passes * len(batches),
        "train_elbo": pv.elbo_terms(model, guide, x_train[:10000]).elbo.mean().item(),
        "test_elbo": pv.elbo_terms(model, guide, x_test).elbo.mean().item(),
        "train_bound": pv.log_evidence(model, guide, x_train[:10000], k).mean().item(),
        "test_bound": pv.log_evidence(model, guide, x_test, k).mean().item(),
        "test_log_evidence": log_p.mean().item(),
        # over the test images, and over the importance samples
        "standard_error": log_p.values.std().item() / len(x_test) ** 0.5,
        "monte_carlo_error": log_p.standard_error.square().sum().sqrt().item() / len(x_test),
        "active_units": {site: int(terms.active.sum()) for site, terms in latents.items()},
        "training_seconds": trained,
        "seconds": time.perf_counter() - start,
        "machine": machine(options.device),
    }
    write_summary(options, numbers)
    print(
        f"{name}; mnist test, {protocol}, seed {options.seed}: -log p(x) {-log_p.mean():.2f} ± "
        f"{numbers['standard_error']:.2f} nats a datum ({options.num_samples} importance samples), "
        f"{passes} passes in {trained:.0f} s"
    )


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--layers", choices=["1", "2"], default="1", help="of latents")
    parser.add_argument("--objective", choices=OBJECTIVES, default="stl", help="the bound and its gradient")
    parser.add_argument("--k", choices=["1", "5", "50"], default="1", help="samples of the objective")
    parser.add_argument("--budget", choices=PASSES, default="quick", help="how long to train")
    parser.add_argument("--prior", choices=["normal", "vamp", "flow"], default="normal", help="top p(z)")
    parser.add_argument("--hidden-dim", type=several, default=200, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, help="passes over the data (default: those of the budget)")
    parser.add_argument("--batch-size", type=count, default=100, help="images of a step")
    parser.add_argument("--lr", type=learning_rate, default=2e-3, help="the peak of its one-cycle schedule")
    parser.add_argument("--compiled", action="store_true", help="compile the steps: seconds, then faster")
    parser.add_argument("--threads", type=threads, help="CPU threads (default: as many as torch takes)")
    run(main, parser, num_samples=5000, out="runs/reproduce_iwae")
