"""annealed_evidence against closed forms: bounds on both sides, exact transitions, any pair, refusals."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from mixture_pairs import Mixture, components
from pyro import poutine
from pyro.distributions.transforms import planar
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from registry import POSTERIORS, data, pair

import pyro_vae as pv
from pyro_vae.evaluation import annealing, hamiltonian, references, weights
from pyro_vae.programs import Pair
from pyro_vae.programs.plates import find_layout


class Linear:
    """z ~ N(0, I), x ~ N(W z + b, s^2 I), with any Gaussian guide."""

    def __init__(self, size):
        self.model, _ = references.linear_gaussian()
        self.x, self.z = self.simulate(size)
        self.exact = references.evidence(self.model, self.x)

    def simulate(self, size):
        z = torch.randn(size, 2, dtype=torch.float64)
        return self.model.decoder(z).sample(), z

    def guide(self, shift=0.0, spread=1.0):
        """The exact posterior, off by some of its standard deviations and with others."""

        def guide(x):
            q = references.posterior(self.model, x)
            tril = q.scale_tril
            with pyro.plate("data", len(x)):
                off = tril @ torch.full((2,), shift, dtype=tril.dtype)
                pyro.sample("z", dist.MultivariateNormal(q.mean + off, scale_tril=spread * tril))

        return guide


@pytest.fixture(autouse=True)
def _short_trajectories(monkeypatch):
    monkeypatch.setattr(hamiltonian, "LEAPFROGS", 3)


def near(values, exact, gap):
    """Whether the mean over the data is near the exact one, but for the gap of a bound and noise."""
    difference = (values - exact).detach()
    return difference.mean().abs() < gap + 4 * difference.std() / math.sqrt(len(difference))


# The linear-Gaussian pair.


def test_far_off_and_too_narrow_guides_do_no_harm():
    """Plain importance weights of as many draws are wrong by many nats."""
    linear = Linear(60)
    guide = linear.guide(shift=3.0, spread=0.5)
    plain = pv.log_evidence(linear.model, guide, linear.x, 16)
    annealed = pv.annealed_evidence(linear.model, guide, linear.x, 16, 60)
    assert (plain.mean() - linear.exact.mean()) < -3
    assert near(annealed.values, linear.exact, gap=0.1)
    assert annealed.standard_error.mean() < 0.6
    assert annealed.acceptance.min() > 0.5
    assert annealed.acceptance.max() < 0.85
    assert annealed.values.shape == annealed.acceptance.shape == annealed.effective_sample_size.shape == (60,)
    assert (annealed.effective_sample_size > 1).all()
    assert (annealed.effective_sample_size <= 16).all()
    assert annealed.upper is None


def test_with_the_exact_posterior_all_weights_are_the_evidence():
    linear = Linear(20)
    found = pv.annealed_evidence(linear.model, linear.guide(), linear.x, 3, 5, latents={"z": linear.z})
    torch.testing.assert_close(found.values, linear.exact)
    torch.testing.assert_close(found.upper, linear.exact)
    torch.testing.assert_close(found.effective_sample_size, torch.full_like(linear.exact, 3.0))
    torch.testing.assert_close(found.standard_error, torch.zeros_like(linear.exact), atol=1e-6, rtol=0)
    assert found.values.dtype == torch.float64


def test_simulated_data_are_between_the_bounds():
    """With few steps, so that both gaps are many standard errors wide."""
    linear = Linear(700)
    guide = linear.guide(shift=1.5, spread=0.7)
    gaps = []
    for num_steps in (3, 30):
        found = pv.annealed_evidence(linear.model, guide, linear.x, 2, num_steps, latents={"z": linear.z})
        below, above = linear.exact - found.values, found.upper - linear.exact
        for gap in (below, above):
            assert gap.mean() > 4 * gap.std() / math.sqrt(len(gap))
        gaps.append((below + above).mean())
    assert gaps[1] < gaps[0] / 3


def test_weights_are_unbiased_in_both_directions():
    """E w = p(x) forwards, and E 1/w = 1/p(x) backwards, with as few steps as there can be."""
    linear = Linear(1)
    size = 4000
    x = linear.x.expand(size, -1).contiguous()
    z = references.posterior(linear.model, x).sample()
    guide = linear.guide(shift=0.7, spread=0.9)
    found = pv.annealed_evidence(linear.model, guide, x, 1, 3, latents={"z": z})
    forward = (found.values - linear.exact).exp()
    assert abs(forward.mean() - 1) < 4 * forward.std() / math.sqrt(size)
    # upper = log (w + w_0) / 2
    backward = 1 / (2 * (found.upper - linear.exact).exp() - forward)
    assert abs(backward.mean() - 1) < 4 * backward.std() / math.sqrt(size)
    # Not by weights that hardly vary.
    assert forward.std() > 0.3
    assert backward.std() > 0.3


def test_the_standard_error_is_the_spread_of_repetitions():
    linear = Linear(1)
    x = linear.x.expand(600, -1).contiguous()
    found = pv.annealed_evidence(linear.model, linear.guide(0.5, 0.9), x, 16, 6)
    assert 0.8 < found.standard_error.mean() / found.values.std() < 1.25
    one = pv.annealed_evidence(linear.model, linear.guide(1.0, 0.8), x, 1, 2)
    assert one.standard_error.isnan().all()
    assert (one.effective_sample_size == 1).all()


# The transitions.


def moved(model, guide, x, u, beta, step, times=1):
    """Chains at u, (chains, N, D), after some transitions with the same step size."""
    with torch.no_grad(), Pair(model, guide, (x,)).isolated(validate=False):
        one = Pair(model, guide, (x,))
        path = hamiltonian.Path(one, find_layout(one, particles=True), len(u))
        point = path.at(u)
        size, scale = torch.full((len(x),), step).to(u), torch.ones_like(u[0])
        for _ in range(times):
            point, rate = hamiltonian.transition(path, point, beta, size, scale)
    return point, rate


def test_a_transition_leaves_its_temperature_as_it_is():
    """At a step size at which it rejects a lot: between q and p, the path of two Gaussians is Gaussian."""
    linear = Linear(1)
    p = references.posterior(linear.model, linear.x)
    beta, precision = 0.4, p.precision_matrix[0]
    tril = torch.linalg.cholesky(torch.linalg.inv(precision * (beta + (1 - beta) / 0.5**2)))
    # The guide has the precision 4 P and is 2 standard deviations off.
    off = p.scale_tril[0] @ torch.full((2,), 2.0, dtype=tril.dtype)
    mean = p.mean[0] + off * 4 * (1 - beta) / (beta + 4 * (1 - beta))
    noise = torch.randn(20_000, 1, 2, dtype=tril.dtype)
    point, rate = moved(linear.model, linear.guide(2.0, 0.5), linear.x, mean + noise @ tril.T, beta, 0.6, 3)
    assert 0.2 < rate.mean() < 0.8
    after = torch.linalg.solve_triangular(tril, (point.u[:, 0] - mean).T, upper=False)
    error = 1 / math.sqrt(20_000)
    assert after.mean(1).abs().max() < 4 * error
    assert (after @ after.T / 20_000 - torch.eye(2)).abs().max() < 5 * math.sqrt(2) * error
    # And it forgets where it began: momentum is new every time.
    assert (noise[:, 0].T @ after.T / 20_000).abs().max() < 0.5


def test_chains_that_do_not_count_choose_the_step_sizes(monkeypatch):
    """The chains that count take the step sizes that the pilot run left, in both directions."""
    linear, used = Linear(5), []
    move = annealing.transition

    def noted(path, start, beta, step, scale):
        used.append((len(start.u), beta, step.clone(), scale.clone()))
        return move(path, start, beta, step, scale)

    monkeypatch.setattr(annealing, "transition", noted)
    guide = linear.guide(2.0, 0.5)
    pv.annealed_evidence(linear.model, guide, linear.x, 3, 10, latents={"z": linear.z})
    pilot, forward, backward = used[:9], used[9:18], used[18:]
    assert [{chains for chains, *_ in part} for part in (pilot, forward, backward)] == [
        {annealing.PILOTS},
        {3},
        {1},
    ]
    assert [beta for _, beta, *_ in forward] == [beta for _, beta, *_ in pilot]
    for there, back in zip(forward, reversed(backward), strict=True):
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(there[1:], back[1:], strict=True)
        )
    # A step size is that with which the pilot run began the next transition.
    for tuned, following in zip(forward, pilot[1:], strict=False):
        torch.testing.assert_close(tuned[2], following[2])
    # So other chains do not change them.
    steps = []
    for num_chains in (3, 40):
        used.clear()
        torch.manual_seed(7)
        pv.annealed_evidence(linear.model, guide, linear.x, num_chains, 10)
        steps.append(torch.stack([step for _, _, step, _ in used[9:]]))
    assert torch.equal(*steps)


def test_the_schedule_goes_from_guide_to_model_and_is_dense_at_both_ends():
    betas = annealing._sigmoidal_schedule(20)
    steps = [after - before for before, after in pairwise(betas)]
    assert (betas[0], betas[-1]) == (0.0, 1.0)
    assert max(steps) == pytest.approx(max(steps[9:11]))
    assert steps[0] == pytest.approx(steps[-1])
    assert 0 < steps[0] < max(steps) / 8


# Constrained latents.


def poisson_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 0.5))
        pyro.sample("x", dist.Poisson(z), obs=x)


def log_normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal(torch.log1p(x) / 2, 0.4))


def test_a_positive_latent():
    """z ~ Gamma(a, b), x ~ Poisson(z): x is negative binomial. The posterior is Gamma(a + x, b + 1)."""
    z = dist.Gamma(2.0, 0.5).sample((300,)).double()
    x = dist.Poisson(z).sample()
    exact = dist.NegativeBinomial(torch.tensor(2.0).double(), probs=torch.tensor(1 / 1.5).double()).log_prob(
        x
    )
    found = pv.annealed_evidence(poisson_model, log_normal_guide, x, 16, 40, latents={"z": z})
    assert found.standard_error.square().mean().sqrt() < 0.15
    assert abs((found.values - exact).mean()) < 0.02
    assert abs((found.upper - exact).mean()) < 0.02


def test_a_simplex_and_a_support_that_depends_on_another_latent():
    """a ~ U(0, 1), b ~ U(0, a), with the last count of a Dirichlet as x: against many plain samples."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(0.0, 1.0))
            b = pyro.sample("b", dist.Uniform(0.0, a))
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample("x", dist.Normal(a + 3 * b + p @ torch.tensor([1.0, 0.0, 2.0]), 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(0.0, 1.0))
            pyro.sample("b", dist.Uniform(0.0, a))
            pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 2.0, 2.0])))

    x = torch.linspace(0.5, 5.0, 60)
    exact = pv.log_evidence(model, guide, x, 20_000).values
    found = pv.annealed_evidence(model, guide, x, 32, 15)
    assert near(found.values, exact, gap=0.02)
    assert (found.values - exact).std() < 0.3


# Any pair.


class TwoLayers(PyroModule):
    """z2 ~ N(0, 1), z1 ~ N(z2, 1) twice, x ~ N(z1, 1): x ~ N(0, [[3, 1], [1, 3]])."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2[..., None].expand(*z2.shape, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)


class BottomUp(PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x, 0.5).to_event(1))
            pyro.sample("z2", dist.Normal(z1.sum(-1), 0.4))


def test_two_layers_in_whatever_order():
    covariance = 2 * torch.eye(2).double() + torch.ones(2, 2).double()
    p_x = dist.MultivariateNormal(torch.zeros(2).double(), covariance)
    x = p_x.sample((120,))
    found = pv.annealed_evidence(TwoLayers(), BottomUp(), x, 16, 20)
    assert near(found.values, p_x.log_prob(x), gap=0.05)


def test_enumerated_sites_are_summed_out_beside_a_latent():
    x = torch.linspace(-6.0, 6.0, 60)

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    found = pv.annealed_evidence(Mixture(), narrow, x, 32, 15)
    assert near(found.values, components(x).logsumexp(-1), gap=0.05)


def test_masks_are_kept_and_scales_left_out():
    linear = Linear(60)
    mask = torch.arange(60) % 3 > 0
    masked = [poutine.mask(program, mask) for program in (linear.model, linear.guide(1.0, 0.7))]
    scaled = [poutine.scale(program, 7.0) for program in masked]
    found = pv.annealed_evidence(*scaled, linear.x, 16, 15)
    assert not found.values[~mask].any()
    assert near(found.values[mask], linear.exact[mask], gap=0.05)


def test_a_masked_latent_stays_where_the_guide_drew_it():
    """With its mask alone, p(x) is that of z from the guide: what importance weights estimate."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=x < 0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x < 0):
            pyro.sample("z", dist.Normal(0.5, 0.5))

    x = torch.linspace(-2.0, 2.0, 200)
    exact = torch.where(
        x < 0, dist.Normal(0.0, math.sqrt(2)).log_prob(x), dist.Normal(0.5, math.sqrt(1.25)).log_prob(x)
    )
    found = pv.annealed_evidence(model, guide, x, 64, 10)
    assert near(found.values, exact, gap=0.02)


def test_without_particles_chains_run_one_after_another():
    linear = Linear(20)

    class Flat(PyroModule):
        def __init__(self):
            super().__init__()
            self.model = linear.model

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.model.prior())
                if z.dim() > 2:
                    raise RuntimeError("one chain at a time")
                pyro.sample("x", self.model.decoder(z), obs=x)

    guide = linear.guide(0.5, 0.8)
    found = pv.annealed_evidence(Flat(), guide, linear.x, 3, 8, latents={"z": linear.z})
    assert near(found.values, linear.exact, gap=0.05)
    assert near(found.upper, linear.exact, gap=0.05)
    assert (found.values - linear.exact).std() > 0.03
    assert 0.4 < found.acceptance.mean() < 1


def test_a_plate_on_the_left_of_the_data():
    """Three latents of a data point lie in a plate on the left: x is their sum."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("three", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z.sum(-2), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("three", 3, dim=-2):
            pyro.sample("z", dist.Normal(x / 3, 0.5))

    z = torch.randn(3, 150).double()
    x = z.sum(0) + torch.randn(150).double()
    found = pv.annealed_evidence(model, guide, x, 16, 20, latents={"z": z})
    exact = dist.Normal(0.0, 2.0).log_prob(x)
    assert near(found.values, exact, gap=0.05)
    assert near(found.upper, exact, gap=0.05)
    assert found.upper.dtype == torch.float64


def test_inference_mode_around_it_does_not_matter():
    linear = Linear(3)
    with torch.inference_mode():
        found = pv.annealed_evidence(linear.model, linear.guide(), linear.x, 2, 2)
    torch.testing.assert_close(found.values, linear.exact)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_nothing_moves_but_the_random_state(posterior):
    model, guide = pair(posterior=posterior)
    guide.encoder.insert(0, torch.nn.BatchNorm1d(6))
    x = data()
    modules = torch.nn.ModuleList([model, guide])
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    torch.manual_seed(3)
    found = pv.annealed_evidence(model, guide, x, 3, 4)
    torch.manual_seed(3)
    again = pv.annealed_evidence(model, guide, x, 3, 4)
    assert torch.equal(found.values, again.values)
    assert found.values.dtype == torch.float32
    assert not found.values.requires_grad
    torch.testing.assert_close(modules.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in pv.parameters(model, guide))
    assert all(module.training for module in modules.modules())
    assert not pyro.get_param_store()


def test_chunks_do_not_show(monkeypatch):
    linear = Linear(22)
    monkeypatch.setattr(weights, "ROWS", 64)
    sizes = []

    def guide(x):
        sizes.append(len(x))
        linear.guide(0.5, 0.8)(x)

    found = pv.annealed_evidence(linear.model, guide, linear.x, 16, 8, latents={"z": linear.z})
    assert set(sizes) == {22, 4, 2}  # all are checked first
    assert near(found.values, linear.exact, gap=0.02)
    assert near(found.upper, linear.exact, gap=0.02)
    assert (found.values - linear.exact).std() < 0.3


# What is refused.


def test_what_cannot_be_finite_is_refused_and_changes_nothing():
    model, guide = pair()
    x = data(size=40)
    x[-1, 0] = 0.5
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'x'.*outside its support.*0\.5"):
        pv.annealed_evidence(model, guide, x, 4, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


@pytest.mark.parametrize("name", ["num_chains", "num_steps"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_other_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a .*whole number.*, got {value}. To fix:"):
        pv.annealed_evidence(*pair(), data(), **{name: value})


def test_a_single_step_is_refused():
    with pytest.raises(ValueError, match="num_steps: expected a whole number of at least 2, got 1"):
        pv.annealed_evidence(*pair(), data(), num_steps=1)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ({}, r"latents: expected a dict of draws of the sites \['z'\], got a dict of \[\]. To fix: pass"),
        ({"y": torch.zeros(8, 2)}, r"latents: expected .*\['z'\], got a dict of \['y'\].*latents={'z': ...}"),
        (torch.zeros(8, 2), r"latents: expected .*\['z'\], got a tensor of shape"),
        ({"z"}, r"latents: expected .*\['z'\], got set"),
        ({"z": None}, r"latents\['z'\]: expected a tensor, got None"),
        (
            {"z": torch.zeros(8, 3)},
            r"latents\['z'\]: expected floats of shape \(8, 2\), got torch.float32 of",
        ),
        ({"z": torch.zeros(8, 2, dtype=torch.long)}, r"latents\['z'\]: expected floats .* got torch.int64"),
        (
            {"z": torch.full((8, 2), torch.nan)},
            "latents: expected the draws that the batch was simulated with",
        ),
    ],
)
def test_other_latents_are_refused(latents, message):
    with pytest.raises(ValueError, match=message):
        pv.annealed_evidence(*pair(), data(), 2, 2, latents=latents)


def test_latents_outside_their_support_are_refused():
    x = torch.ones(4)
    with pytest.raises(ValueError, match="latents: expected the draws that the batch was simulated with"):
        pv.annealed_evidence(poisson_model, log_normal_guide, x, 2, 2, latents={"z": -x})


def normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def drawing(q):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return guide


def discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def relaxed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample(
            "z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), torch.full((2,), 0.5)).to_event(1)
        )
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def circle(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.VonMises(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def without(program):
    return poutine.block(program, hide=["x"])


FLOW = planar(2)


@pytest.mark.parametrize(
    ("model", "guide", "got"),
    [
        (discrete, without(discrete), "discrete values"),
        (relaxed, without(relaxed), "discrete values"),
        (circle, without(circle), "a density on a circle"),
        (normal, AutoDelta(normal), "a point"),
        (normal, AutoNormal(normal), "an auxiliary site, as autoguides draw"),
        (
            normal,
            drawing(lambda x: dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), [FLOW])),
            "an error .*expected to find key",
        ),
        (
            normal,
            drawing(
                lambda x: dist.MixtureSameFamily(
                    dist.Categorical(torch.ones(2)), dist.Normal(x[:, None].expand(-1, 2, 2), 1.0).to_event(1)
                )
            ),
            "an error .*MixtureSameFamilyConstraint",
        ),
    ],
    ids=["discrete", "straight-through", "circle", "point", "auxiliary", "flow", "support"],
)
def test_latents_that_chains_cannot_move_are_refused(model, guide, got):
    x = torch.randn(6, 2)
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=rf"(?s)of the guide, .*: expected a continuous latent.*got {got}.*To fix: use"
    ):
        pv.annealed_evidence(model, guide, x, 2, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_latent_outside_the_plate_of_the_data_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="Site 'z': expected it inside the plate 'data'"):
        pv.annealed_evidence(model, guide, torch.randn(6), 2, 2)


def test_a_pair_without_latents_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="Latent sites: expected at least one.*log_evidence"):
        pv.annealed_evidence(model, lambda x: None, torch.randn(6), 2, 2)


def test_a_notebook_shows_both_bounds():
    below, error = torch.tensor([-1.0, -2.0, -3.0, -2.0]), torch.full((4,), 0.2)
    shown = pv.AnnealedEvidence(below, error, error, error, below + 1)._repr_html_()
    assert "annealed lower bound on log p(x)</th><td>-2.000 ± 0.408" in shown
    assert "annealed upper bound on log p(x)</th><td>-1.000 ± 0.408" in shown
    assert "Monte Carlo error of the mean, lower bound</th><td>0.100" in shown
    assert "upper" not in pv.AnnealedEvidence(below, error, error, error, None)._repr_html_()
