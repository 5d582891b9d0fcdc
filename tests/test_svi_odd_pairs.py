"""Pairs that look odd and are right have to train; pairs that look right and are wrong have to be refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


class Program(PyroModule):
    """A model or guide of one function, with a parameter of its own."""

    def __init__(self, run, start=0.1):
        super().__init__()
        self.run = run
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return self.run(self.w, x)


def normal_model(likelihood):
    def run(w, x):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", likelihood(z, w), obs=x)

    return Program(run)


def normal_guide():
    return Program(lambda w, x: pyro.sample("z", dist.Normal(w, 1.0)))


# Pairs that train.


def test_counts_are_not_taken_for_grey_levels():
    model = normal_model(lambda z, w: dist.Poisson((z[:, None] + w).exp().expand(-1, 100)).to_event(1))
    x = torch.randint(0, 200, (4, 100)).float()
    x[0, 0] = 255
    pv.SVI(model, normal_guide(), adam(), loss=Trace_ELBO()).step(x)


def test_the_check_does_not_draw_from_the_prior():
    """A draw of the prior would give the scale exp(-1000) = 0. The check runs on the guide's draws."""

    def run(w, x):
        z = pyro.sample("z", dist.Normal(torch.tensor(-1000.0), 1.0))
        pyro.sample("x", dist.Normal(w, z.exp()), obs=x)

    guide = Program(lambda w, x: pyro.sample("z", dist.Normal(w, 0.1)))
    pv.SVI(Program(run), guide, adam(), loss=Trace_ELBO()).step(torch.randn(4))


def test_a_weight_for_each_data_point():
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    programs = [pyro.poutine.scale(program, scale=weights) for program in pair()]
    pv.SVI(*programs, adam(), loss=Trace_ELBO()).step(data(size=4))


def test_a_likelihood_that_cannot_be_sampled():
    class Unsampled(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        support = dist.constraints.real

        def __init__(self, loc):
            self.loc = loc
            super().__init__(loc.shape)

        def log_prob(self, value):
            return -(value - self.loc).abs()

        def expand(self, batch_shape, _instance=None):
            return Unsampled(self.loc.expand(batch_shape))

    model = normal_model(lambda z, w: Unsampled(z + w))
    pv.SVI(model, normal_guide(), adam(), loss=Trace_ELBO()).step(torch.randn(4))


def test_a_scaled_prior_under_a_delta_guide():
    def model(x):
        with pyro.poutine.scale(scale=0.1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoDelta(model)
    pv.SVI(model, guide, adam(), loss=Trace_ELBO()).step(torch.randn(4))


def test_an_empty_second_argument():
    model, guide = pair()

    class Padded(PyroModule):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x, rest):
            return self.program(x)

    pv.SVI(Padded(model), Padded(guide), adam(), loss=Trace_ELBO()).step(data(), torch.zeros(0))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_buffer():
    model, guide = pair("gaussian")
    guide.register_buffer("graph", torch.eye(3).to_sparse_csr())
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    x = data("gaussian")
    losses = [svi.step(x) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_parameters_that_thaw_or_are_replaced_train():
    model, guide = pair()
    x = data()
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    model.requires_grad_(False)
    svi.step(x)
    model.requires_grad_(True)
    before = model.decoder[0][0].weight.clone()
    svi.step(x)
    assert not torch.equal(before, model.decoder[0][0].weight)
    guide.encoder[0][0] = nn.Linear(6, 5)
    before = guide.encoder[0][0].weight.clone()
    svi.step(x)
    assert not torch.equal(before, guide.encoder[0][0].weight)


def test_a_parameter_that_thaws_trains_in_its_first_step_where_no_other_does():
    model, guide = pair()
    *frozen, last = pv.parameters(model, guide)
    for p in frozen:
        p.requires_grad_(False)
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    svi.step(data())
    last.requires_grad_(False)
    frozen[0].requires_grad_(True)
    before = frozen[0].detach().clone()
    svi.step(data())
    assert not torch.equal(frozen[0], before)


def test_a_kl_weight_that_changes_every_step_is_checked_once():
    model, guide = pair()
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))

    class Annealed(PyroModule):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x, beta):
            with pyro.poutine.scale(scale=beta):
                return self.program(x)

    svi = pv.SVI(Annealed(model), Annealed(guide), adam(), loss=Trace_ELBO())
    svi.step(data(), 0.2)
    checked = len(runs)
    assert checked > 1
    for beta in (0.4, 0.6, 0.8, 1.0):
        svi.step(data(), beta)
    assert len(runs) == checked + 4


def test_under_autocast():
    model, guide = pair("continuous-bernoulli")
    svi = pv.SVI(model, guide, adam(), loss=TraceMeanField_ELBO())
    x = data("continuous-bernoulli", 64)
    plain = sum(svi.evaluate_loss(x) for _ in range(50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sum(svi.evaluate_loss(x) for _ in range(50)) == pytest.approx(plain, abs=0.05 * 50 * 64)
        svi.step(x)


def test_an_interrupt_leaves_all_as_it_was():
    model, _ = pair()
    norm = nn.BatchNorm1d(4)
    guide = pv.Guide(nn.Sequential(nn.Linear(6, 4), norm, pv.DiagNormal()))
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    x = data()
    svi.step(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.decoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        svi.step(x)
    assert norm.num_batches_tracked == 1
    hook.remove()
    svi.step(x)


# Pairs that are refused.


def test_a_guide_that_is_not_reparameterised_is_refused_by_the_mean_field_elbo():
    """Its gradient would be about 0, and Pyro checks this only under validation."""
    probs = torch.tensor([0.3, 0.7])

    def joint(w, x):
        k = pyro.sample("k", dist.Categorical(probs))
        pyro.sample("x", dist.Normal(k + w, 1.0), obs=x)

    guide = Program(lambda w, x: pyro.sample("k", dist.Categorical(logits=torch.stack([w, -w]))))
    x = torch.randn(4)
    pv.SVI(Program(joint), guide, adam(), loss=Trace_ELBO()).step(x)
    with (
        pyro.validation_enabled(False),
        pytest.raises(
            ValueError, match="'k' of the guide, Categorical.*TraceMeanField_ELBO.*not reparameterised"
        ),
    ):
        pv.SVI(Program(joint), guide, adam(), loss=TraceMeanField_ELBO()).step(x)


def test_event_dimensions_that_were_forgotten_are_refused():
    model = normal_model(lambda z, w: dist.Normal((z[:, None] + w).expand(-1, 6), 1.0))
    with pyro.validation_enabled(False), pytest.raises(ValueError):  # noqa: PT011 (Pyro's own words)
        pv.SVI(model, normal_guide(), adam(), loss=Trace_ELBO()).step(torch.randn(4, 6))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_network_in_a_closure_is_refused(elbo):
    decoder = nn.Linear(2, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.StandardNormal(2)())
            pyro.sample("x", pv.Bernoulli()(decoder(z)), obs=x)

    svi = pv.SVI(model, pair()[1], adam(), loss=elbo())
    with pytest.raises(
        ValueError,
        match=r"shape \(6,.*: expected it in a module.*got one .* to no module.*close over",
    ):
        svi.step(data())
    # unless the optimiser holds it
    _, guide = pair()
    optimizer = torch.optim.SGD([*guide.parameters(), *decoder.parameters()], lr=0.1)
    before = decoder.weight.clone()
    pv.SVI(model, guide, optimizer, loss=elbo()).step(data())
    assert not torch.equal(before, decoder.weight)


def test_an_optimiser_older_than_an_autoguide_s_parameters_is_refused():
    model = normal_model(lambda z, w: dist.Normal(z + w, 1.0))
    guide = AutoNormal(model)
    optimizer = torch.optim.Adam(pv.parameters(model, guide))
    with pytest.raises(
        ValueError,
        match="expected all parameters.*got .* lacks 2 of them.*before making the optimiser",
    ):
        pv.SVI(model, guide, optimizer, loss=Trace_ELBO()).step(torch.randn(4))


def test_an_autoguide_has_no_optimiser_before_its_parameters():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    svi = pv.SVI(model, AutoNormal(model), adam(), loss=Trace_ELBO())
    with pytest.raises(ValueError, match="run guide"):
        _ = svi.optimizer


def test_a_scale_inside_a_logarithm_is_refused():
    programs = [pyro.poutine.scale(program, scale=10.0) for program in pair()]
    elbo = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="'z': expected no scale, got 10.0. RenyiELBO .*no bound"):
        pv.SVI(*programs, adam(), loss=elbo).step(data())


def test_a_baseline_in_the_global_store_is_refused():
    def joint(w, x):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    options = {"baseline": {"use_decaying_avg_baseline": True}}
    guide = Program(lambda w, x: pyro.sample("k", dist.Bernoulli(logits=w), infer=options))
    with pytest.raises(ValueError, match="'k': expected a baseline in a module, got a decaying average"):
        pv.SVI(Program(joint), guide, adam(), loss=TraceGraph_ELBO()).step(torch.randn(4))


# Parts of log q, masks and tensors that a gradient would leave out.


def guide_by_a_factor(has_rsample):
    """q(z) = N(w, 1), drawn as a point beside a factor of its log density."""

    def run(w, x):
        q = dist.Normal(w, 1.0).expand([len(x)])
        z = pyro.sample("z", dist.Delta(q.rsample() if has_rsample else q.sample()))
        pyro.factor("log q", q.log_prob(z), has_rsample=has_rsample)

    return Program(run)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), pv.MeanField(), pv.IWAE(2), pv.STL(), pv.FreeBits(0.1)])
def test_a_factor_of_the_guide_without_a_path_is_refused(elbo):
    model = normal_model(lambda z, w: dist.Normal(z + w, 1.0))
    svi = pv.SVI(model, guide_by_a_factor(False), adam(), loss=elbo)
    with pytest.raises(ValueError, match="'log q' of the guide: expected has_rsample=True, got False"):
        svi.step(torch.randn(4))


def test_a_kl_weight_would_leave_out_a_factor_of_the_guide():
    model, guide = normal_model(lambda z, w: dist.Normal(z + w, 1.0)), guide_by_a_factor(True)
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    svi.step(torch.randn(4))
    with pv.scale_latents(0.5), pytest.raises(ValueError, match="'log q' of the guide: expected none under"):
        svi.step(torch.randn(4))


@pytest.mark.parametrize("elbo", [Trace_ELBO(), pv.MeanField(), pv.IWAE(2)])
@pytest.mark.parametrize("side", ["model", "guide", "other"])
def test_a_latent_masked_inside_its_distribution_on_one_side_is_refused(side, elbo):
    mask = torch.arange(4) < 2

    def of_model(w, x):
        prior = dist.Normal(torch.zeros(len(x)), 1.0)
        z = pyro.sample("z", prior if side == "guide" else prior.mask(mask))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def of_guide(w, x):
        q = dist.Normal(w, 1.0).expand([len(x)])
        pyro.sample("z", q if side == "model" else q.mask(~mask if side == "other" else mask))

    svi = pv.SVI(Program(of_model), Program(of_guide), adam(), loss=elbo)
    with pytest.raises(ValueError, match="Site 'z': expected the same mask in model and guide"):
        svi.step(torch.randn(4))


def test_a_latent_masked_alike_inside_both_distributions_trains():
    mask = torch.arange(4) < 2

    def of_model(w, x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).mask(mask))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def of_guide(w, x):
        pyro.sample("z", dist.Normal(w, 1.0).expand([len(x)]).mask(mask))

    pv.SVI(Program(of_model), Program(of_guide), adam(), loss=Trace_ELBO()).step(torch.randn(4))


def test_a_plain_tensor_that_requires_gradients_is_refused():
    model = normal_model(lambda z, w: dist.Normal(z + w, model.log_sigma.exp()))
    model.log_sigma = torch.zeros((), requires_grad=True)
    svi = pv.SVI(model, normal_guide(), adam(), loss=Trace_ELBO())
    with pytest.raises(ValueError, match=r"A tensor of shape \(\) that requires gradients.*nn.Parameter"):
        svi.step(torch.randn(4))
    trained = [*pv.parameters(svi.model, svi.guide), model.log_sigma]
    svi = pv.SVI(model, svi.guide, torch.optim.SGD(trained, lr=0.1), loss=Trace_ELBO())
    svi.step(torch.randn(4))
    assert model.log_sigma != 0


def test_a_batch_may_require_gradients():
    model = normal_model(lambda z, w: dist.Normal(z + w, 1.0))
    pv.SVI(model, normal_guide(), adam(), loss=Trace_ELBO()).step(torch.randn(4, requires_grad=True))


def test_a_side_that_is_thawed_after_the_optimiser_was_made_warns():
    model, guide = pair()
    guide.requires_grad_(False)
    optimizer = torch.optim.Adam(pv.parameters(model, guide))
    svi = pv.SVI(model, guide, optimizer, loss=Trace_ELBO())
    svi.step(data(size=4))
    guide.requires_grad_(True)
    with pytest.warns(UserWarning, match="optimiser without a parameter of the guide"):
        svi.step(data(size=4))
