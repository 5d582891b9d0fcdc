"""Draws that are more than their value: straight-through samples, flows that invert only their own draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.distributions.torch_transform import TransformModule
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.evaluation import references

K, D, B = 3, 4, 30
HARD, SOFT = dist.RelaxedOneHotCategoricalStraightThrough, dist.RelaxedOneHotCategorical


class ConcreteModel(PyroModule):
    """y ~ prior, x ~ Bernoulli(net(y))."""

    def __init__(self, prior):
        super().__init__()
        self.prior, self.net = prior, nn.Sequential(nn.Linear(K, D), pv.Bernoulli())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.net(pyro.sample("y", self.prior)), obs=x)


class ConcreteGuide(PyroModule):
    """q(y | x), relaxed."""

    def __init__(self, family):
        super().__init__()
        self.net, self.family = nn.Linear(D, K), family

    def posterior(self, x):
        return self.family(torch.tensor(0.7), logits=self.net(x))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", self.posterior(x))


def prior_of(family):
    return family(torch.tensor(0.7), logits=torch.zeros(K))


@pytest.fixture
def straight_through():
    return ConcreteModel(prior_of(HARD)), ConcreteGuide(HARD), torch.bernoulli(torch.full((B, D), 0.5))


def svi_of(model, guide, loss):
    return pv.SVI(model, guide, torch.optim.SGD(pv.parameters(model, guide), lr=0.0), loss=loss)


def test_every_objective_gives_a_straight_through_sample_the_loss_of_trace_elbo(straight_through):
    model, guide, x = straight_through
    losses = [Trace_ELBO(), TraceMeanField_ELBO(), pv.MeanField(), pv.STL(), pv.IWAE(1), pv.DReG(1)]
    losses += [pv.FreeBits(0.0), *(pv.CompiledELBO(loss, backend="eager") for loss in losses)]
    for step in ("evaluate_loss", "step"):
        found = []
        for loss in losses:
            svi = svi_of(model, guide, loss)
            torch.manual_seed(2)
            found.append(getattr(svi, step)(x))
        assert found == pytest.approx([found[0]] * len(found), rel=1e-5)


def test_evaluation_of_a_straight_through_sample_agrees_with_trace_elbo(straight_through):
    model, guide, x = straight_through
    torch.manual_seed(2)
    loss = Trace_ELBO().loss(model, guide, x)
    torch.manual_seed(2)
    assert pv.elbo_terms(model, guide, x).elbo.sum().item() == pytest.approx(-loss, rel=1e-5)
    # p(x) of the hard classes, uniform by symmetry
    classes = model.net(torch.eye(K)[:, None]).log_prob(x).logsumexp(0) - math.log(K)
    evidence = pv.log_evidence(model, guide, x, 4000)
    assert ((evidence.values - classes).abs() < 5 * evidence.standard_error + 0.01).all()
    mean_kl = pv.latent_terms(model, guide, x, 300)["y"].kl.mean().item()
    with torch.no_grad():
        mine = pv.elbo_terms(model, guide, x.repeat(300, 1)).kl.mean().item()
    assert mean_kl == pytest.approx(mine, abs=0.02)


@pytest.mark.parametrize(("make", "k"), [(pv.STL, 1), (lambda: pv.DReG(1), 1), (lambda: pv.DReG(2), 2)])
@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_of_a_straight_through_sample_pass_through_both_its_parts(
    make, k, vectorize, straight_through
):
    model, guide, x = straight_through
    elbo = make()
    elbo.vectorize_particles = vectorize
    trained = list(guide.parameters())
    torch.manual_seed(3)
    elbo.differentiable_loss(model, guide, x).backward()
    # sum_k w_k^2 d log w_k / dz_k dz_k / dphi, where dz is that of the hard and of the soft sample
    torch.manual_seed(3)
    q, p = guide.posterior(x), model.prior
    y = q.rsample((k,)) if vectorize else torch.stack([q.rsample() for _ in range(k)])
    assert hasattr(q.rsample(), "_unquantize")
    soft, hard = [], []
    torch.manual_seed(3)
    for _ in range(1 if vectorize else k):
        draw = q.rsample((k,)) if vectorize else q.rsample((1,))
        hard.append(draw)
        soft.append(draw._unquantize)
    hard, soft = torch.cat(hard), torch.cat(soft)
    torch.testing.assert_close(hard, y)
    fixed = SOFT(torch.tensor(0.7), logits=guide.net(x).detach())
    path = model.net(hard).log_prob(x) + SOFT(p.temperature, logits=p.logits).log_prob(soft)
    log_w = path - fixed.log_prob(soft)
    w = log_w.detach().softmax(0)
    expected = torch.autograd.grad(-(w**2 * log_w).sum(), trained)
    torch.testing.assert_close([p.grad for p in trained], list(expected))


def test_straight_through_samples_are_drawn_side_by_side(straight_through):
    model, guide, x = straight_through
    runs, forward = [], guide.forward
    guide.forward = lambda x: runs.append(forward(x))
    elbo = pv.IWAE(5)
    elbo.loss(model, guide, x)
    runs.clear()
    elbo.loss(model, guide, x)
    assert len(runs) == 1


@pytest.mark.parametrize(("prior", "family"), [(SOFT, SOFT), (HARD, SOFT), (HARD, HARD)])
def test_a_density_in_model_and_guide_is_accepted(prior, family):
    x = torch.bernoulli(torch.full((B, D), 0.5))
    assert math.isfinite(svi_of(ConcreteModel(prior_of(prior)), ConcreteGuide(family), Trace_ELBO()).step(x))


@pytest.mark.parametrize("family", [HARD, SOFT])
def test_a_mass_against_a_density_is_refused_everywhere(family):
    model = ConcreteModel(dist.OneHotCategorical(logits=torch.zeros(K)))
    guide, x = ConcreteGuide(family), torch.bernoulli(torch.full((B, D), 0.5))
    uses = [lambda loss=loss: svi_of(model, guide, loss).step(x) for loss in (Trace_ELBO(), pv.IWAE(2))]
    uses += [lambda of=of: of(model, guide, x) for of in (pv.elbo_terms, pv.log_evidence, pv.latent_terms)]
    for use in uses:
        with pytest.raises(ValueError, match="got OneHotCategorical in the model and RelaxedOneHot"):
            use()


def test_masses_of_two_families_and_a_point_under_a_mass_are_accepted():
    def model(x):
        with pyro.plate("data", len(x)):
            rates = dist.Poisson(torch.tensor([1.0, 4.0]))
            a = pyro.sample("a", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), rates))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.NegativeBinomial(torch.tensor(4.0), torch.tensor(0.3)))
            pyro.sample("b", dist.Delta(torch.ones(len(x))))

    assert pv.elbo_terms(model, guide, torch.randn(5)).elbo.isfinite().all()


@pytest.mark.parametrize("support", ["none", "not implemented"])
def test_a_family_that_does_not_say_its_support_is_accepted(support):
    class Silent(dist.Normal):
        @property
        def support(self):
            if support == "none":
                return None
            raise NotImplementedError

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Silent(torch.zeros(()), 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Silent(x / 2, 0.8, validate_args=False))

    assert pv.elbo_terms(model, guide, torch.randn(5)).elbo.isfinite().all()


class FlowGuide(PyroModule):
    """A factorised Gaussian through a flow of Pyro's."""

    def __init__(self, guide, flow):
        super().__init__()
        self.encoder, self.flow = guide.encoder, flow

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(self.encoder(x), [self.flow]))


class Bent(TransformModule):
    """A user's own, z + a z^3."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, _):
        super().__init__(cache_size=1)
        self.a = nn.Parameter(torch.tensor(0.0))

    def _call(self, x):
        return x + self.a**2 * x**3

    def log_abs_det_jacobian(self, x, y):
        return (1 + 3 * self.a**2 * x**2).log()


@pytest.fixture(params=[transforms.planar, transforms.radial, Bent], ids=["planar", "radial", "own"])
def no_inverse(request):
    model, guide = references.linear_gaussian(width=3)
    references.set_to_posterior(model, guide, spread=1.3)
    flow = request.param(2).double()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.1)
    return model, FlowGuide(guide, flow), torch.randn(6, 3, dtype=torch.float64)


def test_what_needs_no_inverse_works_without_one(no_inverse):
    model, guide, x = no_inverse
    exact = references.evidence(model, x)
    evidence = pv.log_evidence(model, guide, x, 2000)
    assert ((evidence.values - exact).abs() < 5 * evidence.standard_error).all()
    torch.manual_seed(2)
    losses = [Trace_ELBO().loss(model, guide, x) for _ in range(3)]
    torch.manual_seed(2)
    three = pv.MeanField(3).loss(model, guide, x)  # as one draw after the other
    assert three == pytest.approx(sum(losses) / 3)
    assert pv.latent_terms(model, guide, x)["z"].kl.isfinite().all()
    for loss in (pv.IWAE(4), pv.Renyi(0.5, 3), pv.FreeBits(0.1, 3), pv.MeanField(3)):
        assert math.isfinite(svi_of(model, guide, loss).step(x))


@pytest.mark.parametrize("loss", [pv.STL(), pv.DReG(2)])
def test_what_needs_an_inverse_says_so(loss, no_inverse):
    model, guide, x = no_inverse
    with pytest.raises(ValueError, match="expected transforms that have an inverse, since STL and DReG"):
        loss.differentiable_loss(model, guide, x)
    with pytest.raises(ValueError, match="To fix: use another flow, or MeanField or IWAE"):
        svi_of(model, guide, loss).step(x)


@pytest.mark.parametrize("loss", [pv.STL(), pv.DReG(2)])
def test_a_flow_that_another_run_changes_is_refused(loss):
    model, guide = references.linear_gaussian(width=3)
    net = nn.Sequential(
        nn.Linear(1, 20), nn.Dropout(0.5), nn.Linear(20, 2), nn.Unflatten(-1, (2, 1))
    ).double()

    def shift_and_log_scale(z):
        return net(z).unbind(-2)

    flow = transforms.AffineCoupling(1, shift_and_log_scale)
    guide = FlowGuide(guide, flow)
    guide.net = net
    x = torch.randn(6, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected the same log q of the same draw in a second run"):
        loss.differentiable_loss(model, guide, x)
    guide.eval()
    loss.differentiable_loss(model, guide, x)


class BrokenNormal(dist.Normal):
    def log_prob(self, value):
        return math.nan * super().log_prob(value)


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's, before the error
@pytest.mark.parametrize("loss", [pv.STL(), pv.DReG(2)])
def test_a_density_that_is_nan_is_no_other_density(loss):
    model, guide = references.linear_gaussian(width=3)

    class Broken(PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = guide.encoder

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", BrokenNormal(self.encoder(x).mean, 1.0).to_event(1))

    with pytest.raises(ValueError, match="'z' of the guide, BrokenNormal, has a log probability that is NaN"):
        svi_of(model, Broken(), loss).step(torch.randn(6, 3, dtype=torch.float64))


def test_latent_terms_refuses_a_kl_that_is_not_finite():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.tensor(-4.0), 4.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.3))

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="The KL is not finite: site 'z' of the model, Uniform"):
        pv.latent_terms(model, guide, torch.zeros(4), 1000)
