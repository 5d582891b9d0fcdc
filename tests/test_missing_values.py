"""NaN that marks missing values: taken where the distribution takes it, else refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv

B, D, SIGMA = 12, 4, 0.7

pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's, before the error


def nan_masked(loc, x):
    return dist.NanMaskedNormal(loc, SIGMA).to_event(1), x


def nan_masked_multivariate(loc, x):
    return dist.NanMaskedMultivariateNormal(loc, SIGMA**2 * torch.eye(D)), x


def masked(loc, x):
    return dist.Normal(loc, SIGMA).mask(~x.isnan()).to_event(1), x.nan_to_num()


def plain(loc, x):
    return dist.Normal(loc, SIGMA).to_event(1), x


def masked_nan(loc, x):
    return dist.Normal(loc, SIGMA).mask(~x.isnan()).to_event(1), x


class Model(PyroModule):
    """z ~ N(0, 1), x ~ N(w z, sigma), of which some are missing."""

    def __init__(self, observe, read=torch.zeros_like):
        super().__init__()
        self.w, self.observe, self.read = nn.Parameter(torch.tensor([1.0, -0.5, 0.3, 0.8])), observe, read

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            fn, observed = self.observe(z.unsqueeze(-1) * self.w + self.read(x), x)
            pyro.sample("x", fn, obs=observed)


class Guide(PyroModule):
    """q(z | x), of networks that read zeros for missing values."""

    def __init__(self, read=torch.nan_to_num, width=D):
        super().__init__()
        self.net, self.read, self.scale = nn.Linear(width, 1), read, 1.0

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(self.read(x)).squeeze(-1), self.scale))


@pytest.fixture
def x():
    x = torch.randn(B, D)
    return x.masked_fill(torch.rand(B, D) < 0.3, math.nan).index_fill(0, torch.tensor([3]), math.nan)


def svi_of(model, guide):
    return pv.SVI(model, guide, torch.optim.SGD(pv.parameters(model, guide), lr=0.0), loss=Trace_ELBO())


TAKEN = [nan_masked, nan_masked_multivariate, masked]


@pytest.mark.parametrize("observe", TAKEN)
def test_the_evidence_is_that_of_the_observed_entries(observe, x):
    model, guide = Model(observe), Guide()
    exact = []
    for row in x:
        w = model.w.detach()[~row.isnan()]
        covariance = w[:, None] * w + SIGMA**2 * torch.eye(len(w))
        observed = dist.MultivariateNormal(torch.zeros(len(w)), covariance)
        exact.append(observed.log_prob(row[~row.isnan()]) if len(w) else torch.zeros(()))
    evidence = pv.log_evidence(model, guide, x, 4000)
    assert ((evidence.values - torch.stack(exact)).abs() < 5 * evidence.standard_error + 1e-5).all()
    assert exact[3] == 0


def test_all_ways_to_take_nan_give_the_same_loss_and_gradient(x):
    found = []
    for observe in TAKEN:
        torch.manual_seed(1)
        model, guide = Model(observe), Guide()
        svi = svi_of(model, guide)
        losses = [svi.step(x), svi.evaluate_loss(x), float(pv.elbo_terms(model, guide, x).elbo.sum())]
        found.append([*map(torch.tensor, losses), *(p.grad for p in pv.parameters(model, guide))])
        assert pv.reconstruct(model, guide, x)["x"].sample().isfinite().all()
    torch.testing.assert_close(found[1:], [found[0]] * 2)


@pytest.mark.parametrize("observe", [plain, masked_nan])
def test_elsewhere_the_message_points_to_a_mask_and_to_no_value_that_would_count(observe, x):
    model, guide = Model(observe), Guide()
    for use in (svi_of(model, guide).step, lambda x: pv.log_evidence(model, guide, x)):
        with pytest.raises(
            ValueError, match=r"got NaN or infinity in .*x\.nan_to_num\(\) under a mask"
        ) as error:
            use(x)
        assert "fill in" not in str(error.value)
    svi = svi_of(model, guide)
    svi.step(x.nan_to_num())
    with pytest.raises(ValueError, match=r"Normal\(\.\.\.\)\.mask\(~x\.isnan\(\)\)\.to_event\(1\)"):
        svi.step(x)


def test_infinity_is_no_missing_value(x):
    svi = svi_of(Model(nan_masked), Guide())
    with pytest.raises(ValueError, match=r"got NaN or infinity in .* of 48 values\. To fix: leave infinite"):
        svi.step(torch.where(x > 1, math.inf, x.nan_to_num()))


def test_a_value_outside_the_support_is_found_beside_nan(x):
    def counted(loc, x):
        return NanMaskedPoisson(loc.exp()).to_event(1), x

    counts = torch.where(x.isnan(), x, 2.0)
    svi_of(Model(counted), Guide()).step(counts)
    with pytest.raises(ValueError, match="outside its support in 1 of 48 values, for example -1"):
        svi_of(Model(counted), Guide()).step(
            counts.index_put((torch.tensor(0), torch.tensor(0)), -torch.ones(()))
        )


class NanMaskedPoisson(dist.Poisson):
    """A user's own: NaN has the log probability 0."""

    def log_prob(self, value):
        seen = ~value.isnan()
        return torch.where(
            seen, dist.Poisson(self.rate, validate_args=False).log_prob(value.nan_to_num().abs()), 0.0
        )


class NanMaskedDirichlet(dist.Dirichlet):
    """A user's own, of vectors: one that holds NaN has the log probability 0."""

    def log_prob(self, value):
        seen = ~value.isnan().any(-1)
        even = torch.full_like(value, 1 / value.shape[-1])
        inside = torch.where(seen[:, None], value, even).clamp(min=1e-3)
        return torch.where(
            seen, dist.Dirichlet(self.concentration, validate_args=False).log_prob(inside), 0.0
        )


def test_a_vector_of_which_some_is_missing_is_missing():
    def shares(loc, x):
        return NanMaskedDirichlet(loc.exp()), x

    x = torch.full((3, D), 0.25)
    x[1, :2] = x[2] = math.nan
    assert math.isfinite(svi_of(Model(shares), Guide()).step(x))
    x[0] = 0.3
    with pytest.raises(ValueError, match="expected Simplex.*outside its support in 1 of 3 values"):
        svi_of(Model(shares), Guide()).step(x)


def reads(x):
    return x


def reads_total(x):
    return x.sum(-1, keepdim=True)


@pytest.mark.parametrize("observe", TAKEN)
def test_nan_that_a_network_reads_has_a_message_of_its_own(observe, x):
    message = (
        r"The {}: expected its networks to read numbers, got NaN.* x\.nan_to_num\(\), and .*x\.isnan\(\)"
    )
    for model, guide, program in (
        (Model(observe), Guide(reads), "guide"),
        (Model(observe, reads_total), Guide(), "model"),
    ):
        svi = svi_of(model, guide)
        for use in (svi.step, lambda x, pair=(model, guide): pv.elbo_terms(*pair, x)):
            with pytest.raises(ValueError, match=message.format(program)):
                use(x)
        svi.step(x.nan_to_num())
        with pytest.raises(ValueError, match=message.format(program)):
            svi.step(x)


def test_another_fault_is_not_put_down_to_nan(x):
    with pytest.raises(ValueError, match=r"The guide: expected a batch that fits its networks"):
        svi_of(Model(nan_masked), Guide(width=7)).step(x)

    def without_slope(loc, x):
        return nan_masked(loc + (0 * loc).sqrt(), x)

    with pytest.raises(ValueError, match="'x' of the model, .* but its gradient is not finite"):
        svi_of(Model(without_slope), Guide()).step(x)
    guide = Guide()
    guide.scale = nn.Parameter(torch.tensor(1.0))
    svi = svi_of(Model(nan_masked), guide)
    svi.step(x)
    nn.init.constant_(guide.scale, -1.0)
    with pytest.raises(ValueError, match="'z' of the guide, Normal, has a scale outside .* learning rate"):
        svi.step(x)


def test_a_fault_that_comes_and_goes_is_not_put_down_to_nan():
    class Unlucky(Guide):
        def forward(self, x):
            self.runs = getattr(self, "runs", 0) + 1
            if self.runs == 1:
                raise ValueError("no luck")
            super().forward(x)

    with pytest.raises(ValueError, match="^no luck"):
        svi_of(Model(nan_masked), Unlucky()).step(torch.randn(B, D))
