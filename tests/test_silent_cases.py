"""Cases where Pyro silently gives a wrong result: pyro_vae.SVI is right, or raises an error with a fix.

Other files test these cases:

- test_svi.py: a plain nn.Module trains under every ELBO, and so do methods of one (some of Pyro's
  loss_and_grads skip their gradients); a second pair trains; PyroParams of two pairs stay apart or are
  refused; a frozen encoder; evaluation that moves the optimiser;
- test_bad_input.py: a callable for a PyroOptim's arguments, clipping, an optimiser's state; a mask on one
  side, plates of two sizes; ReweightedWakeSleep, a Jit ELBO; grey pixels, 0..255, NaN, uint8, bool, one
  image, (B, 1), an empty batch; underflow of log sigma;
- elbos/test_analytic_kl.py: a bottom-up guide under an analytic KL;
- test_svi_odd_pairs.py: a Categorical guide under TraceMeanField_ELBO, a scale inside RenyiELBO;
- evaluation/test_evidence_plates.py: vectorised particles in evaluation;
- evaluation/test_explain.py: Monte Carlo where no KL is registered.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv


def adam():
    return pyro.optim.Adam({"lr": 1e-2})


class Program(PyroModule):
    def __init__(self, run, *nets):
        super().__init__()
        self.run = run
        self.w = nn.Parameter(torch.tensor(0.3))
        self.nets = nn.ModuleList(nets)

    def forward(self, x):
        return self.run(self, x)


def plate(x, size=None):
    return pyro.plate("data", size or len(x), subsample_size=len(x))


def normal_model(size=None, local=True):
    def run(self, x):
        with plate(x, size):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            if local:
                pyro.sample("x", dist.Normal(self.w + z, 1.0), obs=x)
        if not local:
            pyro.sample("x", dist.Normal(self.w + z, 1.0).to_event(1), obs=x)

    return Program(run)


def normal_guide(size=None):
    def run(self, x):
        with plate(x, size):
            pyro.sample("z", dist.Normal(self.w + x, 1.0))

    return Program(run)


def in_event_dimensions():
    def model(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.w + z, 1.0).to_event(1), obs=x)

    return Program(model), Program(lambda self, x: pyro.sample("z", dist.Normal(self.w + x, 1.0).to_event(1)))


def scaled(side, scale=4.0):
    programs = {"model": normal_model(), "guide": normal_guide()}
    programs[side] = pyro.poutine.scale(programs[side], scale=scale)
    return programs["model"], programs["guide"]


def scaled_latent(side):
    """A KL weight in only the model or only the guide."""

    def model(self, x):
        with plate(x):
            with pyro.poutine.scale(scale=4.0 if side == "model" else 1.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.w + z, 1.0), obs=x)

    guide = normal_guide()
    return Program(model), guide if side == "model" else pyro.poutine.scale(guide, scale=4.0)


def observing(value):
    """A model that observes `value`, not its argument, under a distribution of shape (B, 6)."""

    def run(self, x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal((self.w + z)[:, None].expand(-1, 6), 1.0).to_event(1), obs=value)

    return Program(run), normal_guide()


def masked_nan():
    value = torch.tensor([0.0, torch.nan, 1.0, 1.0, 0.0])

    def run(self, x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            with pyro.poutine.mask(mask=value.isfinite()):
                pyro.sample("x", dist.Normal(self.w + z, 1.0), obs=value)

    return Program(run), normal_guide()


def constrained(autoguide):
    def run(self, x):
        s = pyro.sample("s", dist.LogNormal(0.3, 0.7))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with plate(x):
            pyro.sample("x", dist.Normal(m + self.w, s), obs=x)

    model = Program(run)
    return model, autoguide(model)


def summed_out():
    @config_enumerate
    def run(self, x):
        with plate(x):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(self.w + k, 1.0), obs=x)

    return Program(run), lambda x: None


def renyi():
    return RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1)


# name: ((model, guide), ELBO, pattern of the error)
REFUSED = {
    "a scale on the model alone, Trace": (
        scaled("model"),
        Trace_ELBO(),
        "'z': expected the same scale.*got 4.0 in the model and 1.0 in the guide",
    ),
    "a scale on the model alone, MeanField": (
        scaled("model"),
        TraceMeanField_ELBO(),
        "'z': expected the same scale.*got 4.0 in the model and 1.0 in the guide",
    ),
    "a scale on the guide alone, Trace": (
        scaled("guide"),
        Trace_ELBO(),
        "'z': expected the same scale.*got 1.0 in the model and 4.0 in the guide",
    ),
    "a KL weight on the model alone": (
        scaled_latent("model"),
        TraceMeanField_ELBO(),
        "'z': expected the same scale.*got 4.0 in the model and 1.0 in the guide",
    ),
    "a KL weight on the guide alone": (
        scaled_latent("guide"),
        Trace_ELBO(),
        "'z': expected the same scale.*got 1.0 in the model and 4.0 in the guide",
    ),
    "a subsampled plate inside RenyiELBO": (
        (normal_model(100), normal_guide(100)),
        renyi(),
        "'z': expected no scale, got 20.0. RenyiELBO .*no bound.*whole plates",
    ),
    "a subsampled plate inside TraceTMC_ELBO": (
        (normal_model(100), normal_guide(100)),
        TraceTMC_ELBO(num_particles=3, max_plate_nesting=1),
        "'z': expected no scale, got 20.0. TraceTMC_ELBO .*no bound",
    ),
    "RenyiELBO and a site outside the plate": (
        (normal_model(local=False), normal_guide()),
        renyi(),
        "expected inside the plate.*got site 'x' outside.*RenyiELBO .*one importance weight.*pyro.plate",
    ),
    "RenyiELBO without a plate": (
        in_event_dimensions(),
        renyi(),
        "expected inside the plate.*got all sites outside.*RenyiELBO .*one importance weight.*pyro.plate",
    ),
    "a row (1, D) observed": (
        observing(torch.zeros(1, 6)),
        Trace_ELBO(),
        r"'x'.*expected shape \(5, 6\).*got \(1, 6\)",
    ),
    "a scalar observed": (
        observing(torch.tensor(0.0)),
        Trace_ELBO(),
        r"'x'.*expected shape \(5, 6\).*got \(\)",
    ),
    "NaN under a mask": (
        masked_nan(),
        Trace_ELBO(),
        "'x'.*finite values, also under a mask, got NaN or infinity in 1 of 5",
    ),
    "an autoguide's density, left out": (
        constrained(AutoNormal),
        TraceMeanField_ELBO(),
        "'s' of the guide: expected no point with a density.*To fix: use Trace_ELBO",
    ),
    "a joint autoguide's density, left out": (
        constrained(AutoMultivariateNormal),
        TraceMeanField_ELBO(),
        "'s' of the guide: expected no point with a density.*To fix: use Trace_ELBO",
    ),
    "a site that nobody sums out, Trace": (
        summed_out(),
        Trace_ELBO(),
        r"\['k'\] of the model: expected them in the guide, since Trace_ELBO .*prior.*TraceEnum_ELBO",
    ),
    "a site that nobody sums out, Graph": (
        summed_out(),
        TraceGraph_ELBO(),
        r"\['k'\] of the model: expected them in the guide, since TraceGraph_ELBO .*prior.*TraceEnum_ELBO",
    ),
}


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_the_step_is_refused(name, validation):
    programs, elbo, message = REFUSED[name]
    svi = pv.SVI(*programs, adam(), loss=elbo)
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=f"(?s){message}"):
        svi.step(torch.linspace(-1.0, 1.0, 5))


@pytest.mark.parametrize(
    "elbo", [JitTraceMeanField_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO, TraceTailAdaptive_ELBO]
)
def test_an_objective_is_refused(elbo):
    with pytest.raises(
        ValueError,
        match=f"loss: expected a Pyro ELBO whose loss is one number, got {elbo.__name__}: .*To fix: use",
    ):
        pv.SVI(*pair(), adam(), loss=elbo())


def test_a_scale_of_0_is_an_error():
    with pytest.raises(ValueError, match="Expected scale > 0"):
        pyro.poutine.scale(pair()[0], scale=0.0)


# Vectorised particles.

BATCH = 5


class Flat(nn.Module):
    """Apply a network for (rows, features) to a tensor with any number of batch dimensions."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z):
        return self.net(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


def convolution():
    return nn.Sequential(nn.Unflatten(-1, (1, 2)), nn.Conv1d(1, 3, 1), nn.Flatten(-2), pv.Bernoulli())


def normed(norm):
    return nn.Sequential(nn.Linear(2, BATCH), norm, nn.Linear(BATCH, 6), pv.Bernoulli())


# name: (decoder, whether vectorised particles are right for it)
DECODERS = {
    "BatchNorm, channels as many as the batch": (lambda: normed(nn.BatchNorm1d(BATCH)), False),
    "a convolution": (convolution, False),
    "BatchNorm over all rows": (lambda: normed(Flat(nn.BatchNorm1d(BATCH))), True),
    "Dropout": (lambda: nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), pv.Bernoulli()), True),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), pv.Bernoulli()), True),
}


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, lambda **options: RenyiELBO(0, **options)])
@pytest.mark.parametrize("name", DECODERS)
def test_vectorised_particles_are_independent_or_refused(name, elbo):
    make, right = DECODERS[name]
    model, guide = pv.Model(pv.StandardNormal(2), make()), pair()[1]
    x = data(size=BATCH)
    beside = pv.SVI(model, guide, adam(), loss=elbo(num_particles=3, vectorize_particles=True))
    if right:
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        beside.evaluate_loss(x)
        torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
        beside.step(x)
    else:
        for run in (beside.evaluate_loss, beside.step):  # in eval mode with fresh statistics, too
            with pytest.raises(ValueError, match="3 particles side by side.*vectorize_particles=False"):
                run(x)
    if name != "a convolution":
        pv.SVI(model, guide, adam(), loss=elbo(num_particles=3)).step(x)


# Cases that are right.


class SameName(PyroModule):
    """A program for model and guide, which both call their network `net`."""

    def __init__(self, net, observe):
        super().__init__()
        self.net = net
        self.observe = observe

    def forward(self, x):
        with plate(x):
            if not self.observe:
                return pyro.sample("z", self.net(x))
            return pyro.sample("x", self.net(pyro.sample("z", pv.StandardNormal(2)())), obs=x)


def assert_trains(model, guide, elbo=None):
    before = [(name, p.clone(), p) for program in (model, guide) for name, p in program.named_parameters()]
    pv.SVI(model, guide, adam(), loss=elbo or Trace_ELBO()).step(data())
    for name, old, p in before:
        assert not torch.equal(old, p), name


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_model_and_guide_with_an_attribute_of_the_same_name_train(elbo):
    model, guide = pair()
    assert_trains(SameName(model.decoder, True), SameName(guide.encoder, False), elbo())


def test_module_local_parameters_train():
    with pyro.settings.context(module_local_params=True):
        assert_trains(*pair())


def test_a_bound_method_of_one_module_trains():
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(pair())

        def model(self, x):
            return self.parts[0](x)

        def guide(self, x):
            return self.parts[1](x)

    vae = VAE()
    before = [p.clone() for p in vae.parameters()]
    pv.SVI(vae.model, vae.guide, adam(), loss=Trace_ELBO()).step(data())
    assert not any(map(torch.equal, before, vae.parameters()))


def test_a_global_latent_under_renyi_is_right():
    """With a global latent, one importance weight for all data is the right bound."""

    def model(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with plate(x):
            pyro.sample("x", dist.Normal(m + self.w, 1.0), obs=x)

    guide = Program(lambda self, x: pyro.sample("m", dist.Normal(self.w, 1.0)))
    pv.SVI(Program(model), guide, adam(), loss=renyi()).step(torch.randn(5))


def test_an_unconstrained_autoguide_under_an_analytic_kl_is_right():
    """Its point sites add no density, so the loss is that of Trace_ELBO for the same draws."""

    def run(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with plate(x):
            pyro.sample("x", dist.Normal(m + self.w, 1.0), obs=x)

    model = Program(run)
    guide = AutoNormal(model)
    x = torch.randn(5)
    losses = []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        svi = pv.SVI(model, guide, adam(), loss=elbo)
        svi.num_data(x)  # makes the guide's parameters
        torch.manual_seed(0)
        losses.append(svi.evaluate_loss(x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
