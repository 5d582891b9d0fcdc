"""What looks odd about a pair and is right must train; what looks right and is not must be refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from registry import FAMILIES, data, pair
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.pair import Inside


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


# Right.


def test_counts_are_no_grey_levels():
    model = normal_model(lambda z, w: dist.Poisson((z[:, None] + w).exp().expand(-1, 100)).to_event(1))
    x = torch.randint(0, 200, (4, 100)).float()
    x[0, 0] = 255
    pv.SVI(model, normal_guide(), adam(), loss=Trace_ELBO()).step(x)


def test_a_prior_that_the_likelihood_could_not_bear_is_never_drawn_from():
    """A scale of exp(-1000) from the prior would be 0: the check runs on the guide's draws."""

    def run(w, x):
        z = pyro.sample("z", dist.Normal(torch.tensor(-1000.0), 1.0))
        pyro.sample("x", dist.Normal(w, z.exp()), obs=x)

    guide = Program(lambda w, x: pyro.sample("z", dist.Normal(w, 0.1)))
    pv.SVI(Program(run), guide, adam(), loss=Trace_ELBO()).step(torch.randn(4))


def test_a_weight_for_every_datum():
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


def test_parameters_that_thaw_or_are_exchanged_train():
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


def test_a_kl_weight_that_changes_every_step_is_checked_once():
    model, guide = pair()

    class Annealed(PyroModule):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x, beta):
            with pyro.poutine.scale(scale=beta):
                return self.program(x)

    svi = pv.SVI(Annealed(model), Annealed(guide), adam(), loss=Trace_ELBO())
    for step in range(1, 6):
        svi.step(data(), step / 5)
    assert len(svi._checked) == 1


def test_sixteen_bits_are_widened_before_a_log_probability():
    for name, make in FAMILIES.items():
        family = make(5)
        features = torch.randn(2, family.num_features(5))
        for dtype in (torch.bfloat16, torch.float16):
            narrow = features.to(dtype)
            p = family(narrow)
            x = p.sample()
            assert x.dtype == torch.float32, name
            torch.testing.assert_close(p.log_prob(x), family(narrow.float()).log_prob(x))


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


# Wrong.


def test_a_guide_that_is_not_reparameterised_is_refused_by_the_mean_field_elbo():
    """Its gradient would be about 0: Pyro checks this only while validation is on."""
    probs = torch.tensor([0.3, 0.7])

    def joint(w, x):
        k = pyro.sample("k", dist.Categorical(probs))
        pyro.sample("x", dist.Normal(k + w, 1.0), obs=x)

    guide = Program(lambda w, x: pyro.sample("k", dist.Categorical(logits=torch.stack([w, -w]))))
    x = torch.randn(4)
    pv.SVI(Program(joint), guide, adam(), loss=Trace_ELBO()).step(x)
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="TraceMeanField_ELBO.*reparameterized"),
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
    with pytest.raises(ValueError, match=r"shape \(6,.*belongs to no module.*close over"):
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
        ValueError, match="2 parameters were made at the first use.*before making the optimiser"
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
    with pytest.raises(ValueError, match="scaled by 10.0, and RenyiELBO.*no bound"):
        pv.SVI(*programs, adam(), loss=elbo).step(data())


def test_a_baseline_in_the_global_store_is_refused():
    def joint(w, x):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    options = {"baseline": {"use_decaying_avg_baseline": True}}
    guide = Program(lambda w, x: pyro.sample("k", dist.Bernoulli(logits=w), infer=options))
    with pytest.raises(ValueError, match="'k' asks for a decaying average"):
        pv.SVI(Program(joint), guide, adam(), loss=TraceGraph_ELBO()).step(torch.randn(4))


def test_the_modules_inside_come_once_and_in_torch_s_order():
    shared = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    first = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 1)))
    second = nn.Sequential(nn.Linear(2, 2), shared)
    found = Inside(first, second.forward).modules
    assert found == list(nn.ModuleList([first, second]).modules())[1:]
    expected = list(nn.ModuleList([first, second]).parameters())
    assert list(map(id, pv.parameters(first, second))) == list(map(id, expected))


def test_a_parameter_that_two_modules_share_is_trained_once():
    model, guide = nn.Linear(2, 3), nn.Linear(2, 3, bias=False)
    guide.weight = model.weight
    assert list(map(id, pv.parameters(model, guide))) == [id(model.weight), id(model.bias)]


def test_a_parameter_that_becomes_a_buffer_is_another_state():
    net = nn.Linear(2, 3, bias=False)
    before = Inside(net).state
    weight = net.weight
    del net.weight
    net.register_buffer("weight", weight)
    assert Inside(net).state != before


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


def test_the_state_of_modules_tells_what_a_graph_depends_on():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))
    states = [Inside(network).state]
    for change in (
        lambda: network[0].double(),  # the parameters are the same objects
        lambda: network[0].requires_grad_(False),
        lambda: network[2].eval(),
        lambda: setattr(network, "1", nn.Tanh()),
        lambda: setattr(network[2], "running_mean", torch.ones(3)),
    ):
        change()
        states.append(Inside(network).state)
    assert all(states[i] != states[j] for i in range(len(states)) for j in range(i))
    assert Inside(network).state == states[-1]


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:Lazy modules are a new feature")
def test_a_sparse_buffer_and_a_lazy_parameter_have_no_strides():
    model, guide = pair("gaussian")
    guide.register_buffer("graph", torch.eye(3).to_sparse_csr())
    svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    x = data("gaussian")
    losses = [svi.step(x) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert len(Inside(nn.LazyLinear(5)).parameters) == 2
