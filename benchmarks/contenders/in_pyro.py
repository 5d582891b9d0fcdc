"""Contenders in Pyro: Pyro's SVI and that of this package."""

import warnings
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

import pyro_vae as pv
from contenders import RATE, WIDTH, Contender, Work
from contenders.in_torch import InTorch
from contenders.recipes import Recipe


def adam() -> PyroOptim:
    """Make Pyro's Adam."""
    return PyroOptim(torch.optim.Adam, {"lr": RATE})


class Pair(InTorch):
    """Base of the contenders in Pyro: model and guide of this package, and one of Pyro's ELBOs."""

    def __init__(self, work: Work, *, elbo: str) -> None:
        super().__init__(work)
        pyro.clear_param_store()
        prior = pv.StandardNormal(work.latent).to(work.device)
        self.model = pv.Model(prior, nn.Sequential(self.decoder, pv.Bernoulli()))
        self.guide = pv.Guide(nn.Sequential(self.encoder, pv.DiagNormal()))
        self.jit = elbo.startswith("Jit")
        if self.jit:
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
        self.elbo = getattr(pyro.infer, elbo)(
            num_particles=work.particles,
            vectorize_particles=work.particles > 1,
            max_plate_nesting=1,
            **({"ignore_jit_warnings": True} if self.jit else {}),
        )


class PyroSVI(Pair):
    """Pyro's own SVI."""

    def __init__(self, work: Work, *, elbo: str) -> None:
        super().__init__(work, elbo=elbo)
        self.svi = pyro.infer.SVI(self.model, self.guide, adam(), loss=self.elbo)

    def step(self, x: Tensor) -> float:
        """Take a step."""
        return float(self.svi.step(x))

    def batches(self) -> Iterator[Tensor]:
        """Return batches in memory, without a smaller last one for a jitted ELBO, whose shapes are fixed."""
        return (x for x in super().batches() if not (self.jit and len(x) < self.work.batch))


class Tutorial(Recipe):
    """The VAE of Pyro's tutorial: Softplus, `pyro.module`, Trace_ELBO and Pyro's Adam."""

    activation = nn.Softplus

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        pyro.clear_param_store()
        optimizer = adam()
        self.svi = pyro.infer.SVI(self.model, self.guide, optimizer, loss=pyro.infer.Trace_ELBO())

    def model(self, x: Tensor) -> None:
        """Observe x given z."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = x.new_zeros(x.shape[0], self.work.latent), x.new_ones(x.shape[0], self.work.latent)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            image = self.decoder(z)
            observed = dist.Bernoulli(image, validate_args=False).to_event(1)
            pyro.sample("obs", observed, obs=x.reshape(-1, WIDTH))

    def guide(self, x: Tensor) -> None:
        """Sample z given x."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            h = self.act(self.body(x.reshape(-1, WIDTH)))
            loc, scale = self.mean(h), torch.exp(self.spread(h))
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))

    def step(self, x: Tensor) -> float:
        """Take a step."""
        return float(self.svi.step(x))


class PyroVAE(Pair):
    """This package's SVI with one of Pyro's ELBOs: as it is, or captured and then compiled or replayed."""

    def __init__(self, work: Work, *, elbo: str, backend: str | None = None, reduced: bool = False) -> None:
        super().__init__(work, elbo=elbo)
        loss = pv.CompiledELBO(self.elbo, backend=backend) if backend else self.elbo
        self.svi = pv.SVI(self.model, self.guide, adam(), loss=loss)
        self.reduced = reduced

    def step(self, x: Tensor) -> float:
        """Take a step."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.reduced):
            return self.svi.step(x)

    def epoch(self) -> float:
        """Train with `fit`, on the batches of this package. The ELBO that it reports is that of one image."""
        if self._images is None:
            self._images = torch.from_numpy(self.work.pixels()).to(self.work.device)
        batches = pv.data.Batches(self._images, pv.data.DynamicBinarisation(), self.work.batch)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.reduced):
            (record,) = pv.fit(self.svi, batches, 1, watch=self.x[:1], progress=False)
        return float(record.loss)


class Batches(Contender):
    """Only the batches of this package: shuffle, gather and binarise."""

    def __init__(self, work: Work) -> None:
        pixels = torch.from_numpy(work.pixels()).to(work.device)
        self.batches = pv.data.Batches(pixels, pv.data.DynamicBinarisation(), work.batch)
        self.rest: Iterator[Tensor] = iter(())

    def steps(self, number: int) -> None:
        """Draw batches, in a new order after each epoch."""
        for _ in range(number):
            if next(self.rest, None) is None:
                self.rest = iter(self.batches)
                next(self.rest)
