"""Which plate is that of the data, and how many data it holds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv


class Program(PyroModule):
    """z ~ N(0, 1), x ~ N(b z, 1), in plates of the caller's; w in front, shared by all data, if asked for."""

    def __init__(self, plates, *, guide=False, shared=False, discrete=False):
        super().__init__()
        self.plates, self.guide, self.shared, self.discrete = plates, guide, shared, discrete
        self.b = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 0.5 if self.guide else 1.0)) if self.shared else 0.0
        with self.plates(x):
            if self.discrete:
                logits = self.b * x if self.guide else torch.zeros_like(x)
                z = pyro.sample("z", dist.Bernoulli(logits=logits))
            else:
                loc, scale = (self.b * x / 2, 0.8) if self.guide else (torch.zeros_like(x), 1.0)
                z = pyro.sample("z", dist.Normal(loc, scale))
            if not self.guide:
                pyro.sample("x", dist.Normal(self.b * z + w, 1.0), obs=x)


def make(plates, **options):
    return Program(plates, **options), Program(plates, guide=True, **options)


def whole(name):
    return lambda x: pyro.plate(name, len(x))


def subsampled(name):
    return lambda x: pyro.plate(name, 1000, subsample_size=len(x))


def without_size(x):
    return pyro.plate("data", dim=-1)


def svi(pair, loss=None):
    return pv.SVI(*pair, pyro.optim.SGD({"lr": 0.0}), loss=loss or Trace_ELBO())


TOOLS = {
    "log_evidence": lambda pair, x: pv.log_evidence(*pair, x, 40).values,
    "elbo_terms": lambda pair, x: torch.stack(pv.elbo_terms(*pair, x)),
    "latent_terms": lambda pair, x: pv.latent_terms(*pair, x)["z"].kl,
    "reconstruct": lambda pair, x: pv.reconstruct(*pair, x)["x"].mean,
    "IWAE": lambda pair, x: torch.tensor(svi(pair, pv.IWAE(3)).step(x)),
    "DReG": lambda pair, x: torch.tensor(svi(pair, pv.DReG(3)).step(x)),
    "Renyi": lambda pair, x: torch.tensor(svi(pair, pv.Renyi(0.5, 3)).step(x)),
    "FreeBits": lambda pair, x: torch.tensor(svi(pair, pv.FreeBits(0.1, 2)).step(x)),
    "num_data": lambda pair, x: torch.tensor(svi(pair).num_data(x)),
    "fit": lambda pair, x: torch.tensor(next(pv.fit(svi(pair), [x], 1, progress=False))[1:3]),
    "compare_elbos": lambda pair, x: torch.tensor(
        pv.compare_elbos(*pair, x, {"a": Trace_ELBO()}, 2).records[0]["value"]
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("plates", [whole, subsampled])
def test_the_plate_around_every_site_is_that_of_the_data_whatever_its_name(tool, plates):
    x, found = torch.randn(9), []
    for name in ("data", "z_minibatch"):
        torch.manual_seed(1)
        found.append(TOOLS[tool](make(plates(name)), x))
    assert torch.equal(*found)


def test_the_score_function_takes_a_plate_of_any_name():
    x, found = torch.randn(9), []
    for name in ("data", "documents"):
        torch.manual_seed(1)
        found.append(svi(make(whole(name), discrete=True), pv.MeanField(2)).step(x))
    assert found[0] == found[1]


def test_sites_to_be_summed_out_take_a_plate_of_any_name():
    def model(x):
        with pyro.plate("documents", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    x = torch.randn(4)
    exact = torch.logaddexp(
        math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x), math.log(0.3) + dist.Normal(1.0, 1.0).log_prob(x)
    )
    torch.testing.assert_close(pv.log_evidence(model, lambda x: None, x, 1).values, exact)
    torch.testing.assert_close(pv.IWAE(1).loss(model, lambda x: None, x), -exact.sum().item())


def test_other_plates_inside_of_it_or_loops_around_it_leave_it_clear():
    def model(x):
        for _ in pyro.plate("pass", 1):
            with pyro.plate("documents", len(x), dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
                with pyro.plate("words", 3, dim=-1):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        for _ in pyro.plate("pass", 1):
            with pyro.plate("documents", len(x), dim=-2):
                pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) * 0.75, 0.5))

    x = torch.randn(4, 3)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    torch.testing.assert_close(pv.log_evidence(model, guide, x, 5).values, exact)


# Where it is not clear.


class Both:
    """Two plates around every site."""

    def __init__(self, x, names=("documents", "words")):
        self.plates = [pyro.plate(names[0], len(x), dim=-2), pyro.plate(names[1], 3, dim=-1)]

    def __enter__(self):
        for plate in self.plates:
            plate.__enter__()

    def __exit__(self, *error):
        for plate in reversed(self.plates):
            plate.__exit__(*error)


def test_two_plates_around_every_site_are_to_be_told_apart_by_name():
    x = torch.randn(4, 3)
    pair = make(Both)
    message = r"'z'.*got the plates \['documents', 'words'\].*To fix: rename the plate of the data to 'data'"
    for tool in ("log_evidence", "elbo_terms", "latent_terms", "IWAE"):
        with pytest.raises(ValueError, match=message):
            TOOLS[tool](pair, x)
    for tool in ("num_data", "fit", "compare_elbos"):
        with pytest.raises(ValueError, match="To fix: rename the plate of the data to 'data'"):
            TOOLS[tool](pair, x)
    assert math.isfinite(svi(pair).step(x))  # a step divides by nothing
    named = make(lambda x: Both(x, names=("data", "words")))
    assert svi(named).num_data(x) == 4
    assert pv.log_evidence(*named, x, 2).values.shape == (4,)


@pytest.mark.parametrize("name", ["data", "batch"])
def test_beside_a_shared_latent_the_data_are_counted_in_the_plate_of_the_observations(name):
    assert svi(make(subsampled(name), shared=True)).num_data(torch.randn(9)) == 1000
    assert svi(make(whole(name), shared=True)).num_data(torch.randn(9)) == 9


def test_without_a_plate_or_a_tensor_the_data_cannot_be_counted():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.0))

        def forward(self, _):
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=torch.tensor(1.0))

    estimator = pv.SVI(Model(), lambda _: None, pyro.optim.SGD({"lr": 0.0}), loss=Trace_ELBO())
    assert estimator.num_data(torch.zeros(5)) == 5
    with pytest.raises(ValueError, match="The batch: expected one plate around every site, or a tensor"):
        estimator.num_data(None)


# A plate without a size.


@pytest.mark.parametrize("tool", TOOLS)
def test_a_plate_without_a_size_has_that_of_its_dimension(tool):
    x, found = torch.randn(9), []
    for plates in (whole("data"), without_size):
        torch.manual_seed(1)
        found.append(TOOLS[tool](make(plates), x))
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_site_without_the_dimension_of_such_a_plate_is_refused(shape):
    """Its one log probability would count for each data point."""

    def model(x):
        with without_size(x):
            pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))
            pyro.sample("x", dist.Normal(x, 1.0), obs=x)

    def guide(x):
        with without_size(x):
            pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))

    with pytest.raises(
        ValueError, match="The plate 'data': expected all 4 data points.*got a plate that draws 1"
    ):
        pv.elbo_terms(model, guide, torch.randn(4))
