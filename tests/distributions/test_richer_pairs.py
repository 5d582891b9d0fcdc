"""Learned priors, flows and convolutions: their mathematics, and that every tool works on the pair."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from registry import STRUCTURES, data, unsettled
from torch import nn

import pyro_vae as pv

each_structure = pytest.mark.parametrize("name", STRUCTURES)


def structure(name, size=8, dtype=torch.float64):
    make, width = STRUCTURES[name]
    model, guide = make()
    return model.to(dtype), guide.to(dtype), data(size=size, width=width).to(dtype)


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def losses(svi, x, steps=20):
    torch.manual_seed(5)
    return [svi.step(x) for _ in range(steps)]


@each_structure
def test_it_trains_as_under_pyro(name):
    model, guide, x = structure(name, size=16)
    twins = copy.deepcopy((model, guide))
    before = [p.clone() for p in pv.parameters(model, guide)]
    ours = losses(pv.SVI(model, guide, adam(), loss=TraceMeanField_ELBO()), x, 40)
    assert sum(ours[-10:]) < sum(ours[:10])
    for old, p in zip(before, pv.parameters(model, guide), strict=True):
        assert not torch.equal(old, p)
    theirs = losses(pyro.infer.SVI(*twins, adam(), loss=TraceMeanField_ELBO()), x, 40)
    assert ours == pytest.approx(theirs, rel=1e-6)
    copy.deepcopy((model, guide))  # nothing of a graph is left in it


ELBOS = {
    "trace": Trace_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "renyi": lambda: RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize(
    ("name", "elbo"),
    [*((name, "trace") for name in STRUCTURES), ("flow-posterior", "renyi"), ("vamp-prior", "mean-field")],
)
def test_compiled_steps_are_those_of_eager(name, elbo):
    model, guide, x = structure(name)
    twins = copy.deepcopy((model, guide))
    eager = losses(pv.SVI(model, guide, adam(), loss=ELBOS[elbo]()), x, 4)
    compiled = pv.CompiledELBO(ELBOS[elbo](), backend="eager")
    assert losses(pv.SVI(*twins, adam(), loss=compiled), x, 4) == pytest.approx(eager, rel=1e-5)


def grid(side=161, reach=9.0):
    """A square grid over the plane, and the area of its cells."""
    line = torch.linspace(-reach, reach, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2


@each_structure
@torch.no_grad()
def test_evidence_and_elbo_are_those_of_quadrature(name):
    model, guide, x = structure(name, size=3)
    z, area = grid()
    log_prior = model.prior().log_prob(z)
    assert (log_prior.exp().sum() * area).item() == pytest.approx(1, abs=1e-3)
    joint = log_prior[:, None] + model.decoder(z[:, None]).log_prob(x)  # (grid, N)
    exact = joint.logsumexp(0) + area.log()
    estimate = pv.log_evidence(model, guide, x, 10_000)
    assert ((estimate.values - exact).abs() < 5 * estimate.standard_error + 1e-4).all()
    assert estimate.standard_error.max() < 0.05

    log_q = guide.encoder(x).log_prob(z[:, None])
    q = log_q.exp() * area
    torch.testing.assert_close(q.sum(0), torch.ones(3).double(), rtol=1e-3, atol=0)
    elbo, kl = (q * (joint - log_q)).sum(0), (q * (log_q - log_prior[:, None])).sum(0)
    many = pv.elbo_terms(model, guide, x.repeat(4000, 1))
    for ours, theirs in ((many.elbo, elbo), (many.kl, kl)):
        ours = ours.unflatten(0, (4000, 3))
        assert ((ours.mean(0) - theirs).abs() < 5 * ours.std(0) / math.sqrt(4000) + 1e-4).all()


@each_structure
def test_the_gradient_of_the_elbo_is_that_of_quadrature(name):
    model, guide, x = structure(name, size=1)
    z, area = grid(side=121)
    log_q = guide.encoder(x).log_prob(z)
    joint = model.prior().log_prob(z) + model.decoder(z).log_prob(x)
    exact = torch.autograd.grad((log_q.exp() * area * (log_q - joint)).sum(), pv.parameters(model, guide))
    draws, copies = 20, x.expand(1000, -1)
    sampled = []
    for _ in range(draws):
        loss = Trace_ELBO().differentiable_loss(model, guide, copies) / 1000
        sampled.append(torch.autograd.grad(loss, pv.parameters(model, guide)))
    for theirs, ours in zip(exact, map(torch.stack, zip(*sampled, strict=True)), strict=True):
        error = ours.std(0) / math.sqrt(draws)
        assert ((ours.mean(0) - theirs).abs() < 6 * error + 2e-3).all()


@each_structure
def test_every_objective_takes_it(name):
    """One draw of each is the same ELBO; five of IWAE are a higher bound."""
    model, guide, x = structure(name)
    optimizer = torch.optim.SGD(pv.parameters(model, guide), lr=0.0)

    def step(elbo):
        torch.manual_seed(0)
        return pv.SVI(model, guide, optimizer, loss=elbo).step(x)

    plain = step(Trace_ELBO())
    for elbo in (pv.IWAE(1), pv.STL(), pv.DReG(1)):
        assert step(elbo) == pytest.approx(plain)
    assert step(pv.MeanField()) == pytest.approx(plain, rel=0.1)
    means = [torch.tensor([pv.IWAE(k).loss(model, guide, x) for _ in range(60)]) for k in (1, 5)]
    error = sum(float(mean.var()) for mean in means) ** 0.5 / 60**0.5
    assert means[1].mean() < means[0].mean() + 3 * error
    assert step(pv.DReG(5)) == pytest.approx(step(pv.IWAE(5)))


@each_structure
def test_it_generates_and_reconstructs(name):
    model, guide, x = structure(name)
    assert pv.generate(model, x)["x"].sample().shape == x.shape
    assert pv.reconstruct(model, guide, x)["x"].mean.shape == x.shape


@each_structure
def test_what_is_saved_is_the_whole_of_it(name):
    model, guide, x = structure(name)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, file)
    torch.manual_seed(0)
    expected = pv.log_evidence(model, guide, x, 10).values
    other_model, other_guide, _ = structure(name)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_model.load_state_dict(saved["model"])
    other_guide.load_state_dict(saved["guide"])
    torch.manual_seed(0)
    found = pv.log_evidence(other_model, other_guide, x, 10).values
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Priors.


def test_a_mixture_is_torch_s():
    prior = pv.MixturePrior(3, 4)
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_sigma.normal_()
        prior.log_sigma[0] = math.log(1e-3)  # where float32 would lose nats
    z = torch.cat([torch.randn(5, 3), prior.mean[:1] + 1e-3])
    components = dist.Normal(prior.mean, prior.log_sigma.exp()).to_event(1)
    expected = dist.MixtureSameFamily(dist.Categorical(logits=prior.logits), components)
    ours, theirs = (p.log_prob(z) for p in (prior(), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(prior().mean, expected.mean)
    for p in prior.parameters():
        (a,), (b,) = (
            torch.autograd.grad(log_prob.sum(), p, retain_graph=True) for log_prob in (ours, theirs)
        )
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert prior().expand((6,)).log_prob(z).shape == (6,)
    with pytest.raises(ValueError, match="support|shape|event"):
        prior().log_prob(z[:, :2])


@pytest.mark.parametrize("family", [pv.DiagNormal, pv.FullNormal, lambda: pv.FlowNormal(2, 2, 8, 4)])
def test_a_vamp_prior_is_the_mean_of_the_posteriors_at_its_inputs(family):
    family = family()
    encoder = unsettled(nn.Sequential(pv.MLP(6, family.num_features(2)), family))
    u, z = torch.rand(4, 6), torch.randn(5, 2)
    each = torch.stack([encoder(u[k]).log_prob(z) for k in range(4)])
    expected = each.exp().mean(0).log()
    torch.testing.assert_close(pv.VampPrior(encoder, u)().log_prob(z), expected, rtol=1e-4, atol=1e-4)


def test_a_vamp_prior_shares_the_encoder_and_counts_it_once():
    model, guide, x = structure("vamp-prior")
    assert model.prior.encoder is guide.encoder
    alone = [*model.decoder.parameters(), *guide.parameters(), model.prior.pseudo_inputs]
    assert len(pv.parameters(model, guide)) == len(alone)
    assert set(map(id, pv.parameters(model, guide))) == set(map(id, alone))
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    svi.step(x)
    assert model.prior.encoder is guide.encoder
    # The gradient is that of both places.
    weight = guide.encoder[0][0].weight
    kl = guide.encoder(x).log_prob(torch.zeros(2)).sum() - model.prior().log_prob(torch.zeros(2)) * len(x)
    (both,) = torch.autograd.grad(kl, weight)
    posterior = guide.encoder(x).log_prob(torch.zeros(2)).sum()
    (one,) = torch.autograd.grad(posterior, weight)
    assert not torch.allclose(both, one)


def test_pseudo_inputs_are_a_copy():
    x = torch.rand(3, 6)
    prior = pv.VampPrior(nn.Sequential(pv.MLP(6, 4), pv.DiagNormal()), x)
    prior.pseudo_inputs.data.zero_()
    assert x.all()


# Flows.


def linear_network(network, slope, shift, log_scale):
    """Make a network of one input and two outputs linear: t = slope x + shift, s constant."""
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        first, last = network.layers
        first.weight[0, -1], first.weight[1, -1] = 1.0, -1.0  # relu(x) - relu(-x) = x
        last.weight[0, 0], last.weight[0, 1] = slope, -slope
        last.bias[0], last.bias[1] = shift, log_scale


def test_an_affine_flow_is_a_gaussian():
    """f(e): e2 <- 1.5 e2 + 0.8 e1 + 0.3, then e1 <- 0.5 e1 - 0.7 e2 - 0.2; z = mu + sigma f(e)."""
    family = pv.FlowNormal(2, steps=1, hidden=4, context=3).double()
    linear_network(family.flow.networks[0], 0.8, 0.3, math.log(1.5))
    linear_network(family.flow.networks[1], -0.7, -0.2, math.log(0.5))
    mu = torch.tensor([0.4, -1.0], dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([-1.2, 0.7], dtype=torch.float64, requires_grad=True)
    sigma = log_sigma.exp()
    first = torch.tensor([[1.0, 0.0], [0.8, 1.5]]).double()
    second = torch.tensor([[0.5, -0.7], [0.0, 1.0]]).double()
    matrix = sigma[:, None] * (second @ first)
    shift = mu + sigma * (second @ torch.tensor([0.0, 0.3]).double() + torch.tensor([-0.2, 0.0]))
    exact = dist.MultivariateNormal(shift, matrix @ matrix.T)

    q = family(torch.cat([mu, log_sigma, torch.randn(3).double()]))
    z = q.sample((20_000,))
    for ours, theirs in zip(
        torch.autograd.grad(q.log_prob(z.clone()).mean(), [mu, log_sigma], retain_graph=True),
        torch.autograd.grad(exact.log_prob(z).mean(), [mu, log_sigma], retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z))  # by the cache
    torch.testing.assert_close(q.log_prob(z.clone()), exact.log_prob(z))  # by the inverse
    assert ((z.mean(0) - shift).abs() < 5 * z.std(0) / math.sqrt(len(z))).all()
    torch.testing.assert_close(z.T.cov(), matrix @ matrix.T, rtol=0.05, atol=0.02)

    prior = pv.FlowPrior(2, steps=1, hidden=4).double()
    prior.flow.load_state_dict(
        {k: v[:, -1:] if k.endswith("layers.0.weight") else v for k, v in family.flow.state_dict().items()}
    )
    torch.testing.assert_close(prior().log_prob((z - mu) / sigma), exact.log_prob(z) + sigma.log().sum())


@pytest.mark.parametrize("dim", [2, 5])
def test_the_log_determinant_is_that_of_the_jacobian(dim):
    flow = unsettled(pv.CouplingFlow(dim, steps=2, hidden=7, context=3).double())
    context, x = torch.randn(3).double(), torch.randn(dim).double()

    def forward(x):
        for transform in flow(context):
            x = transform(x)
        return x

    total, y = torch.zeros(()).double(), x
    for transform in flow(context):
        total, y = total + transform.log_abs_det_jacobian(y, transform(y)), transform(y)
    jacobian = torch.autograd.functional.jacobian(forward, x)
    assert (jacobian.abs() > 1e-9).all()  # every dimension moves by every other
    torch.testing.assert_close(total, torch.linalg.slogdet(jacobian)[1])
    for transform in reversed(flow(context)):
        y = transform.inv(y)
    torch.testing.assert_close(y, x)


def test_flows_start_as_gaussians():
    z, features = torch.randn(4, 3), torch.randn(4, 6 + 5)
    q = pv.FlowNormal(3, context=5)(features)
    torch.testing.assert_close(q.log_prob(z), pv.DiagNormal()(features[:, :6]).log_prob(z))
    torch.testing.assert_close(pv.FlowPrior(3)().log_prob(z), pv.StandardNormal(3)().log_prob(z))


def test_a_flow_forgets_what_it_was():
    """Pyro's transforms keep the image of their last input, by its identity."""
    prior, z = pv.FlowPrior(3), torch.randn(4, 3)
    before = prior().log_prob(z)
    unsettled(prior)
    after = prior().log_prob(z)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, prior().log_prob(z.clone()))


def test_a_flow_under_autocast_is_a_density():
    prior, z = unsettled(pv.FlowPrior(2, 1, 8)), torch.randn(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = prior()
        draws = p.sample((5,))
        assert p.log_prob(z).dtype == draws.dtype == torch.float32
        for transform in prior.flow():
            y = transform(z)
            jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in z])
            ours = transform.log_abs_det_jacobian(z, y)
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ours, rtol=1e-3, atol=2e-3)


# Convolutions.

SHAPES = {"mnist": (1, 28, 28), "colour": (3, 32, 32)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_convolutions_take_leading_dimensions(shape):
    down = pv.ConvDown(shape, 3, 4, num_features=5)
    up = pv.ConvUp(5, 4, 3, shape=shape)
    x = torch.rand(2, 3, math.prod(shape))
    features = down(x)
    assert features.shape == (2, 3, 5)
    assert up(features).shape == x.shape
    torch.testing.assert_close(down(x[1, 2]), features[1, 2])  # no batch at all
    torch.testing.assert_close(up(features[1, 2]), up(features)[1, 2])
    assert up(features[:0]).shape == (0, 3, math.prod(shape))


def test_a_convolution_sees_the_image_as_it_lies():
    """The first layer by hand: channel, row and column of a pixel are where they should be."""
    down = pv.ConvDown((3, 4, 8), 2, num_features=1)
    x = torch.rand(96)
    plane = nn.functional.conv2d(
        x.view(1, 3, 4, 8), down.layers[1].weight, down.layers[1].bias, stride=2, padding=1
    )
    torch.testing.assert_close(down.layers[:2](x[None]), plane)


def test_a_colour_vae_on_particles():
    """Two features a pixel, plane by plane, and importance samples side by side."""
    likelihood, shape = pv.DiscretizedLogistic(256), (3, 32, 32)
    decoder = nn.Sequential(pv.ConvUp(4, 4, 3, shape=(6, 32, 32)), likelihood)
    encoder = nn.Sequential(pv.ConvDown(shape, 3, 4, num_features=8), pv.DiagNormal())
    model, guide = pv.Model(pv.StandardNormal(4), decoder), pv.Guide(encoder)
    x = torch.randint(256, (4, 3072)) / 255
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = pv.SVI(model, guide, adam(), loss=loss)
    assert math.isfinite(svi.step(x))
    assert pv.log_evidence(model, guide, x, 3).values.shape == (4,)
    assert pv.generate(model, x)["x"].sample().shape == x.shape


def test_particles_of_a_convolution_are_drawn_side_by_side(monkeypatch):
    model, guide, x = structure("convolutional")
    calls = []
    guide.register_forward_hook(lambda *_: calls.append(1))
    pv.log_evidence(model, guide, x, 60)
    assert len(calls) < 20


# What makes no sense.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.MixturePrior(2, 0), "two positive whole numbers.*components=0"),
        (lambda: pv.VampPrior(nn.Identity(), torch.rand(0, 6)), r"K > 0 pseudo-inputs.*\(0, 6\)"),
        (lambda: pv.VampPrior(nn.Identity(), torch.ones(3, 6).byte()), "torch.uint8.*pass some data"),
        (lambda: pv.FlowPrior(1), "dim >= 2"),
        (lambda: pv.FlowPrior(2, steps=0), "steps=0"),
        (lambda: pv.CouplingFlow(2, context=-1), "context=-1"),
        (lambda: pv.FlowNormal(3).num_features(2), r"an event of 3 dimensions, got 2. To fix: write FlowNormal\(2\)"),
        (lambda: pv.FlowNormal(3)(torch.zeros(5, 6)), r"\(\*batch, 38\).*got \(5, 6\)"),
        (lambda: pv.ConvDown((1, 28, 28), 2, 2, 2, num_features=3), "divisible by 2 once per layer"),
        (lambda: pv.ConvDown((28, 28), 2, num_features=3), r"shape=\(C, H, W\)"),
        (lambda: pv.ConvUp(3, shape=(1, 28, 28)), "one or more numbers of planes"),
        (lambda: pv.ConvUp(0, 2, shape=(1, 28, 28)), "num_features, all positive"),
        (lambda: pv.ConvDown((1, 4, 4), 2, num_features=3)(torch.rand(2, 9)), r"ConvDown.*\(\*batch, 16\)"),
        (lambda: pv.ConvUp(3, 2, shape=(1, 4, 4))(torch.ones(2, 3).long()), "floating-point"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
