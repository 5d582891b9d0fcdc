"""Learn the digits from a few labels: y is observed or else summed out.

    python examples/semi_supervised.py --labels 100

The model M2 of Kingma et al. 2014 (arXiv 1406.5298), a conditional VAE.
"""

import argparse
import math
import time
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_vae as pv
from command_line import Parser, count, learning_rate, positive, run
from results import save_pictures, write_summary


class Both(nn.Module):
    """An MLP of two inputs. It begins with W a + V b, so that W a is computed once for ten labels b."""

    def __init__(self, a: int, b: int, hidden: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(a, hidden), nn.Linear(b, hidden, bias=False)
        self.out = nn.Sequential(nn.SiLU(), pv.MLP(hidden, hidden, out, activation=nn.SiLU))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Map ``(*batch, a)`` and ``(*batch, b)`` to ``(*batch, out)``."""
        return self.out(self.a(a) + self.b(b))


class Model(PyroModule):
    """y ~ p(y);  z ~ p(z);  x ~ p(x | z, y).  Images (B, 784), labels (B, 10) or none."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.prior = pv.StandardNormal(latent)
        self.network, self.likelihood = Both(latent, 10, hidden, 784), pv.Bernoulli()

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """Observe x, and y where it is known."""
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(10)), obs=y)  # p(y)
            z = pyro.sample("z", self.prior())  # p(z)
            pyro.sample("x", self.likelihood(self.network(z, y)), obs=x)  # p(x | z, y)


class Guide(PyroModule):
    """y ~ q(y | x) where it is not known;  z ~ q(z | x, y)."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.classifier = pv.MLP(784, hidden, hidden, 10, activation=nn.SiLU)
        self.network, self.posterior = Both(784, 10, hidden, 2 * latent), pv.DiagNormal()

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """Sum over y or take it as known; sample z."""
        with pyro.plate("data", len(x)):
            if y is None:
                q = dist.OneHotCategorical(logits=self.classifier(x))
                y = pyro.sample("y", q, infer={"enumerate": "parallel"})  # q(y | x)
            pyro.sample("z", self.posterior(self.network(x, y)))  # q(z | x, y)


class Classified(PyroModule):
    """The model, and alpha log q(y | x) of the known labels: the ELBO alone would not train it."""

    def __init__(self, model: Model, guide: Guide, alpha: float) -> None:
        super().__init__()
        self.model, self.guide, self.alpha = model, guide, alpha

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """Run the model; classify the images that have a label."""
        self.model(x, y)
        if y is not None:
            with pyro.plate("labelled", len(x)), pyro.poutine.scale(scale=self.alpha):
                pyro.sample("label", dist.OneHotCategorical(logits=self.guide.classifier(x)), obs=y)


class AlternatingBatches:
    """Batches without and with labels, in turn: (x,), (x, y), (x,), ..."""

    def __init__(self, images: pv.data.Images, labelled: Tensor, device: torch.device) -> None:
        self.unlabelled = pv.data.Batches(images, pv.data.DynamicBinarisation(), 200, device=device)
        self.labelled, self.labels = labelled, torch.eye(10, device=device)[images.labels]

    def __len__(self) -> int:
        return 2 * len(self.unlabelled)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for x in self.unlabelled:
            yield (x,)
            rows = self.labelled[torch.randperm(len(self.labelled))[:100]]
            yield self.unlabelled.protocol.read(self.unlabelled.dataset[rows]), self.labels[rows]


def main(options: argparse.Namespace) -> None:
    """Train, and measure the accuracy of q(y | x) and the bounds on log p(x) and log p(x | y)."""
    start = time.perf_counter()
    torch.set_float32_matmul_precision("medium")  # bfloat16 inside the products, where the CPU has it
    protocol = pv.data.DynamicBinarisation()
    train, test, device = pv.data.load(train=True), pv.data.load(train=False), options.device
    x_test, y_test = pv.data.observe(test, protocol).to(device), torch.eye(10)[test.labels].to(device)
    n, most = options.labels, 10 * int(train.labels.bincount(minlength=10).min())
    if n % 10 or n > most:  # as many of each digit
        raise ValueError(f"--labels: expected a multiple of 10 up to {most}, got {n}. To fix: write 100.")
    order = torch.randperm(len(train.labels))
    labelled = torch.cat([order[train.labels[order] == y][: n // 10] for y in range(10)])
    batches = AlternatingBatches(train, labelled, device)

    sizes, elbo = (options.latent_dim, options.hidden_dim), TraceEnum_ELBO(max_plate_nesting=1)
    model, guide = Model(*sizes).to(device), Guide(*sizes).to(device)
    classified = Classified(model, guide, options.alpha)
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(batches))
    svi = pv.SVI(classified, guide, optimizer, loss=pv.CompiledELBO(elbo) if options.compiled else elbo)
    for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
        accuracy = (guide.classifier(x_test).argmax(-1) == y_test.argmax(-1)).float().mean().item()
        print(f"{epoch}   accuracy {accuracy:.2%}", flush=True)

    log_p_x = pv.log_evidence(model, guide, x_test, options.num_samples).mean().item()
    log_p_x_y = pv.log_evidence(model, guide, (x_test, y_test), options.num_samples).mean().item()
    numbers = {"protocol": str(protocol), "unit": "nats per data point, log mass", "accuracy": accuracy}
    numbers |= {"test_log_evidence": log_p_x, "test_log_evidence_given_y": log_p_x_y - math.log(0.1)}
    with torch.no_grad():
        z = guide.posterior(guide.network(x_test[:10], y_test[:10])).mean  # the style of each image
        digits = [model.likelihood(model.network(z, y)).mean for y in torch.eye(10, device=device)]
    rows, title = torch.stack([x_test[:10], *digits], 1).flatten(0, 1), "x, and E[x | z, y] for y = 0, ..., 9"
    save_pictures(options.out, {"styles": pv.plots.images(rows, columns=11, title=title)})
    write_summary(options, numbers | {"seconds": time.perf_counter() - start})
    print(f"accuracy with {options.labels} labels: {accuracy:.2%}; results are in {options.out}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--labels", type=count, default=100, help="images that have one, a multiple of 10")
    parser.add_argument("--alpha", type=positive, default=50.0, help="weight of log q(y | x) of a label")
    parser.add_argument("--latent-dim", type=count, default=50, help="dimensions of z")
    parser.add_argument("--hidden-dim", type=count, default=500, help="units of a hidden layer")
    parser.add_argument("--epochs", type=count, default=20, help="passes over the data")
    parser.add_argument("--lr", type=learning_rate, default=1e-3, help="the peak of its one-cycle schedule")
    parser.add_argument("--compiled", action="store_true", help="run the steps as a compiled graph")
    run(main, parser, num_samples=1000, out="runs/semi_supervised")
