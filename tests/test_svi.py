import contextlib
import copy
import gc
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from registry import LIKELIHOODS, POSTERIORS, PlainVAE, data, each_once, pair
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.programs.observations import check_finite

ELBOS = {
    "trace": Trace_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
    "renyi": lambda: RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def state(*modules):
    return [copy.deepcopy(module.state_dict()) for module in modules]


def assert_same(before, after):
    torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize(("likelihood", "posterior", "elbo"), each_once(LIKELIHOODS, POSTERIORS, ELBOS))
def test_every_pair_trains_under_every_elbo(likelihood, posterior, elbo):
    model, guide = pair(likelihood, posterior)
    x = data(likelihood, 32)
    svi = pv.SVI(model, guide, adam(), loss=ELBOS[elbo]())
    before = state(model, guide)
    first = sum(svi.evaluate_loss(x) for _ in range(20))
    for _ in range(60):
        svi.step(x)
    assert sum(svi.evaluate_loss(x) for _ in range(20)) < first
    for old, module in zip(before, (model, guide), strict=True):
        for name, p in module.named_parameters():
            assert not torch.equal(p, old[name]), f"{name} never moved"
    assert not pyro.get_param_store(), "a parameter leaked into Pyro's global store"


def losses_on_both_routes(likelihood, elbo, dtype):
    model, guide = (module.to(dtype) for module in pair(likelihood))
    twins = copy.deepcopy((model, guide))
    x = data(likelihood, 32).to(dtype)

    def losses(svi):
        torch.manual_seed(5)
        return [svi.step(x) for _ in range(30)]

    ours = losses(pv.SVI(model, guide, adam(), loss=elbo()))
    theirs = losses(pyro.infer.SVI(*twins, adam(), loss=elbo()))
    assert ours[-1] != pytest.approx(ours[0], rel=1e-3)  # it did train
    return ours, theirs


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_losses_are_those_of_pyro(elbo):
    """The same pair, seed and optimiser on both routes: losses agree step by step."""
    ours, theirs = losses_on_both_routes("bernoulli", elbo, torch.float32)
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_losses_are_those_of_pyro_for_every_likelihood(likelihood, elbo):
    """In float64, since the loss of a density crosses 0, where a relative error means nothing."""
    ours, theirs = losses_on_both_routes(likelihood, elbo, torch.float64)
    assert ours == pytest.approx(theirs, rel=1e-9)


def global_level(auto):
    class Level(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.w + level, 1.0), obs=x[:, 0])

    model = Level()
    return model, auto(model)


def vectorised(**options):
    return Trace_ELBO(num_particles=2, vectorize_particles=True, **options)


def enumerating(**options):
    return TraceEnum_ELBO(strict_enumeration_warning=False, **options)


@pytest.mark.parametrize(
    ("make", "elbo", "guide_ran", "same"),
    [
        (pair, lambda: vectorised(max_plate_nesting=1), False, True),
        (pair, vectorised, False, False),
        (pair, lambda: enumerating(max_plate_nesting=1), False, True),
        (pair, enumerating, False, False),
        (lambda: global_level(AutoNormal), Trace_ELBO, True, True),
        (lambda: global_level(AutoNormal), Trace_ELBO, False, False),
        (lambda: global_level(AutoDiagonalNormal), lambda: vectorised(max_plate_nesting=1), True, True),
    ],
)
def test_where_pyro_draws_more_in_its_first_step(make, elbo, guide_ran, same):
    """The losses agree with Pyro's but where it guesses plates or initialises a guide, as SVI says."""
    x, losses = data(size=32), []
    for svi_class in (pv.SVI, pyro.infer.SVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = make()
        if guide_ran:
            guide(x)
        svi = svi_class(model, guide, adam(), loss=elbo())
        torch.manual_seed(5)
        losses.append([svi.step(x) for _ in range(5)])
    assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) == same


def test_two_pairs_with_the_same_sites_train_side_by_side():
    pairs = [pair(), pair()]
    x = data(size=32)
    alone = copy.deepcopy(pairs[1])
    svis = [pv.SVI(*each, adam(), loss=Trace_ELBO()) for each in pairs]
    before = [state(*each) for each in pairs]
    for _ in range(5):
        for seed, svi in enumerate(svis):
            torch.manual_seed(seed)
            svi.step(x)
    for old, each in zip(before, pairs, strict=True):
        for tensors, module in zip(old, each, strict=True):
            assert all(not torch.equal(tensors[n], p) for n, p in module.named_parameters())
    # the second trains as it does alone
    svi = pv.SVI(*alone, adam(), loss=Trace_ELBO())
    for _ in range(5):
        torch.manual_seed(1)
        svi.step(x)
    assert_same(state(*alone), state(*pairs[1]))


class Scaled(PyroModule):
    """A model with PyroParams of its own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = PyroParam(torch.tensor(scale), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


class Located(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.spread = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, self.spread))


def test_pyro_params_of_two_pairs_stay_apart():
    x = 3 + torch.randn(20)
    models = [Scaled(0.5), Scaled(4.0)]
    guides = [Located(), Located()]
    svis = [pv.SVI(m, g, adam(), loss=Trace_ELBO()) for m, g in zip(models, guides, strict=True)]
    for _ in range(3):
        for svi in svis:
            svi.step(x)
    assert 0.4 < models[0].scale.item() < 0.7
    assert 3.5 < models[1].scale.item() < 4.5
    assert models[0].scale.item() != 0.5
    assert models[1].scale.item() != 4.0


@pytest.mark.parametrize("elbo", ELBOS)
def test_methods_of_a_plain_module_train(elbo):
    vae = PlainVAE()
    before = state(vae)[0]
    svi = pv.SVI(vae.model, vae.guide, adam(), loss=ELBOS[elbo]())
    assert len(pv.parameters(vae.model, vae.guide)) == len(list(vae.parameters()))
    svi.step(data())
    assert all(not torch.equal(before[name], p) for name, p in vae.named_parameters())


class Silent(nn.Module):
    """A plain module without pyro.module statements: pyro.infer.SVI trains nothing of it."""

    def __init__(self, program):
        super().__init__()
        self.program = program


@pytest.mark.parametrize("elbo", ELBOS)
def test_a_plain_module_trains(elbo):
    class PlainModel(Silent):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", self.program(z), obs=x)

    class PlainGuide(Silent):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.program(x))

    vae = PlainVAE()
    model, guide = PlainModel(vae.decoder), PlainGuide(vae.encoder)
    before = state(vae)[0]
    pv.SVI(model, guide, adam(), loss=ELBOS[elbo]()).step(data())
    assert all(not torch.equal(before[name], p) for name, p in vae.named_parameters())


def test_handlers_and_partials_around_a_module_are_seen_through():
    model, guide = pair()
    wrapped = pyro.poutine.scale(model, scale=0.5)
    other = pyro.poutine.scale(guide, scale=0.5)
    assert len(pv.parameters(wrapped, other)) == len(pv.parameters(model, guide))
    x = data()
    torch.manual_seed(0)
    half = pv.SVI(wrapped, other, adam(), loss=Trace_ELBO()).evaluate_loss(x)
    torch.manual_seed(0)
    whole = pv.SVI(model, guide, adam(), loss=Trace_ELBO()).evaluate_loss(x)
    assert half == pytest.approx(whole / 2)


def test_an_autoguide_makes_its_parameters_at_the_first_step():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    svi = pv.SVI(model, guide, adam(0.1), loss=TraceMeanField_ELBO())
    x = 2 + torch.randn(100)
    for _ in range(200):
        svi.step(x)
    assert guide.median()["z"].item() == pytest.approx(x.sum().item() / 101, abs=0.1)


def test_an_enumerated_latent_needs_no_guide_site():
    class Mixture(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

        @pyro.infer.config_enumerate
        def forward(self, x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
                pyro.sample("x", dist.Normal(self.loc[k], 1.0), obs=x)

    model = Mixture()
    svi = pv.SVI(model, lambda x: None, adam(0.1), loss=TraceEnum_ELBO(max_plate_nesting=1))
    x = torch.cat([torch.randn(50) - 3, torch.randn(50) + 3])
    for _ in range(100):
        svi.step(x)
    torch.testing.assert_close(model.loc.detach(), torch.tensor([-3.0, 3.0]), atol=0.4, rtol=0)
    # another ELBO would draw k from its prior, and Pyro says nothing while validation is off
    message = (
        r"\['k'\] of the model: expected them in the guide, since Trace_ELBO .*the prior.*TraceEnum_ELBO"
    )
    with pytest.raises(ValueError, match=message):
        pv.SVI(model, lambda x: None, adam(0.1), loss=Trace_ELBO()).step(x)


def test_a_subsampled_plate_scales_the_loss_and_is_counted():
    class Subsampled(PyroModule):
        def __init__(self, module, site):
            super().__init__()
            self.program, self.site = module, site

        def forward(self, x):
            with pyro.plate("data", 1000, subsample_size=len(x)):
                if self.site == "x":
                    z = pyro.sample("z", pv.StandardNormal(2)())
                    return pyro.sample("x", self.program(z), obs=x)
                return pyro.sample("z", self.program(x))

    model, guide = pair()
    x = data(size=10)
    svi = pv.SVI(Subsampled(model.decoder, "x"), Subsampled(guide.encoder, "z"), adam(), loss=Trace_ELBO())
    assert svi.num_data(x) == 1000
    assert pv.SVI(model, guide, adam(), loss=Trace_ELBO()).num_data(x) == 10
    torch.manual_seed(0)
    scaled = [svi.evaluate_loss(x) for _ in range(200)]
    plain = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    torch.manual_seed(0)
    unscaled = [plain.evaluate_loss(x) for _ in range(200)]
    assert sum(scaled) == pytest.approx(100 * sum(unscaled), rel=0.02)


class Normed(PyroModule):
    """An encoder with BatchNorm and Dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4), pv.DiagNormal()
        )

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.net(x))


@pytest.mark.parametrize("elbo", ELBOS)
def test_evaluation_moves_nothing(elbo):
    model, _ = pair()
    guide = Normed()
    x = data(size=16)
    svi = pv.SVI(model, guide, adam(), loss=ELBOS[elbo]())
    svi.step(x)  # so that the optimiser has momentum
    guide.net[2].eval()  # a mode of its own, to be kept
    before = state(model, guide, svi.optimizer)
    grads = [None if p.grad is None else p.grad.clone() for p in svi.optimizer.param_groups[0]["params"]]
    for _ in range(5):
        svi.evaluate_loss(x)
    assert_same(before, state(model, guide, svi.optimizer))
    after = [p.grad for p in svi.optimizer.param_groups[0]["params"]]
    assert_same(grads, after)
    assert guide.training
    assert guide.net[1].training
    assert not guide.net[2].training


def test_evaluation_is_in_eval_mode():
    model, _ = pair()
    guide = Normed()
    x = data(size=16)
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    torch.manual_seed(0)
    loss = svi.evaluate_loss(x)
    guide.eval()
    torch.manual_seed(0)
    assert svi.evaluate_loss(x) == loss


def test_a_step_updates_batch_norm_once():
    model, _ = pair()
    guide = Normed()
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    for count in (1, 2):
        svi.step(data(size=16))
        assert guide.net[1].num_batches_tracked == count


def test_a_buffer_that_moves_in_eval_mode_too_is_put_back():
    class Counting(PyroModule):
        def __init__(self, guide):
            super().__init__()
            self.guide = guide
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.guide(x)

    model, guide = pair()
    counting = Counting(guide)
    svi = pv.SVI(model, counting, adam(), loss=Trace_ELBO())
    svi.step(data())
    svi.evaluate_loss(data())
    pv.log_evidence(model, counting, data(), 3)
    assert counting.calls == 1


def test_the_check_leaves_the_random_stream_alone():
    """The first step, which is checked, draws what it would draw without the check."""
    model, guide = pair()
    x = data()
    svi = pv.SVI(model, guide, adam(0.0), loss=Trace_ELBO())
    torch.manual_seed(0)
    first = svi.step(x)
    torch.manual_seed(0)
    assert svi.step(x) == first


def test_shared_modules_are_counted_once():
    model, guide = pair()
    guide.also = model.decoder
    trained = pv.parameters(model, guide)
    assert len(trained) == len({id(p) for p in trained}) == 8


def test_frozen_parameters_stay():
    model, guide = pair()
    model.requires_grad_(False)
    before = state(model)[0]
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    svi.step(data())
    assert_same(before, model.state_dict())


class OwnParameter(PyroModule):
    """A guide that reads a parameter of its own, which is a statement to Pyro."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 2), 1.0).to_event(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_parameter_that_a_program_reads_stays_frozen(compiled):
    model, guide = (
        pv.Model(pv.StandardNormal(2), nn.Sequential(nn.Linear(2, 3), pv.Gaussian(1.0))),
        OwnParameter(),
    )
    guide.loc.requires_grad_(False)
    loss = pv.CompiledELBO(Trace_ELBO(), backend="eager") if compiled else Trace_ELBO()
    svi = pv.SVI(model, guide, torch.optim.SGD(pv.parameters(model, guide), lr=0.1), loss=loss)
    x = torch.randn(4, 3)
    for use in (svi.step, svi.evaluate_loss, lambda x: pv.log_evidence(model, guide, x, 2)):
        use(x)
        assert not guide.loc.requires_grad
        assert guide.loc.grad is None
    assert not guide.loc.any()
    assert len(pv.parameters(model, guide)) == 2


def test_a_torch_optimiser_over_some_parameters_trains_those():
    model, guide = pair()
    before = state(model, guide)
    optimizer = torch.optim.SGD(guide.parameters(), lr=0.1)
    svi = pv.SVI(model, guide, optimizer, loss=Trace_ELBO())
    assert svi.optimizer is optimizer
    with pytest.warns(UserWarning, match=r"without a parameter of the model.*model.requires_grad_\(False\)"):
        svi.step(data())
    svi.step(data())  # warns once
    assert_same(before[0], model.state_dict())
    assert not torch.equal(before[1]["encoder.0.0.weight"], guide.encoder[0][0].weight)


@pytest.mark.parametrize("frozen", ["model", "guide"])
def test_a_frozen_side_trains_without_a_warning(frozen):
    sides = dict(zip(("model", "guide"), pair(), strict=True))
    sides[frozen].requires_grad_(False)
    (other,) = sides.keys() - {frozen}
    optimizer = torch.optim.SGD(sides[other].parameters(), lr=0.1)
    pv.SVI(**sides, optim=optimizer, loss=Trace_ELBO()).step(data())


def test_the_optimiser_of_the_model_alone_leaves_the_guide_with_a_warning():
    model, guide = pair()
    svi = pv.SVI(model, guide, torch.optim.SGD(model.parameters(), lr=0.1), loss=Trace_ELBO())
    svi.evaluate_loss(data())  # trains nothing, so it does not warn
    with pytest.warns(UserWarning, match="without a parameter of the guide, so the guide does not train"):
        svi.step(data())


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        (pyro.optim.Adam({"lr": 0.1, "betas": (0.8, 0.9)}), torch.optim.Adam),
        (pyro.optim.Adam({"lr": 0.1, "amsgrad": True}), torch.optim.Adam),
        (pyro.optim.SGD({"lr": 0.1, "momentum": 0.9}), torch.optim.SGD),
        (pyro.optim.ClippedAdam({"lr": 0.1, "clip_norm": 1.0}), None),
        (pyro.optim.RMSprop({"lr": 0.1}), torch.optim.RMSprop),
    ],
)
def test_a_pyro_optimiser_becomes_one_torch_optimiser(optim, kind):
    model, guide = pair()
    svi = pv.SVI(model, guide, optim, loss=Trace_ELBO())
    svi.step(data())
    (group,) = svi.optimizer.param_groups
    assert group["lr"] == 0.1
    assert len(group["params"]) == len(pv.parameters(model, guide))
    if kind:
        assert type(svi.optimizer) is kind
    if kind is torch.optim.Adam:
        assert group["fused"]


def test_training_resumes_bit_by_bit():
    model, guide = pair()
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    x = data()
    svi.step(x)
    saved = state(model, guide, svi.optimizer), torch.get_rng_state()
    expected = [svi.step(x) for _ in range(3)]

    model, guide = pair()
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    for each, tensors in zip((model, guide, svi.optimizer), saved[0], strict=True):
        each.load_state_dict(tensors)
    torch.set_rng_state(saved[1])
    assert [svi.step(x) for _ in range(3)] == expected


@pytest.mark.parametrize("wrap", [lambda elbo: elbo, lambda elbo: pv.CompiledELBO(elbo, backend="eager")])
def test_one_long_autocast_does_not_hold_on_to_old_parameters(wrap):
    """Autocast keeps reduced copies of the parameters until it ends, and a step changes them."""
    x = data(width=64, size=32)
    programs = pair(width=64, hidden=40)
    found = []
    for long in (True, False):
        model, guide = copy.deepcopy(programs)
        svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=wrap(Trace_ELBO()))
        torch.manual_seed(0)
        losses = []
        # Even an outer one that is switched off would keep what the inner ones cache.
        outer, inner = (contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16))[
            :: 1 - 2 * long
        ]
        with outer():
            for run in [svi.step] * 5 + [lambda x, svi=svi: pv.elbo_terms(svi.model, svi.guide, x).elbo]:
                with inner():
                    losses.append(float(torch.as_tensor(run(x)).sum()))
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_pyro_s_store_is_left_as_it_was():
    """Also by a step that fails, and by programs that clear the store themselves."""

    class Clearing(PyroModule):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x):
            pyro.clear_param_store()
            return self.program(x)

    pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    store = pyro.get_param_store()
    before = {name: dict(held) for name, held in vars(store).items()}
    assert all(before.values())
    model, guide = pair()
    svi = pv.SVI(Clearing(model), guide, adam(), loss=Trace_ELBO())
    for x in (data(), torch.full((4, 6), torch.nan)):
        with contextlib.nullcontext() if x.isfinite().all() else pytest.raises(ValueError, match="NaN"):
            svi.step(x)
        after = vars(store)
        assert after.keys() == before.keys()
        for name, held in before.items():
            assert after[name].keys() == held.keys()
            assert all(after[name][key] is value for key, value in held.items())


def test_a_pair_can_be_pickled_after_a_step():
    """Pyro's store hangs weak references on parameters, which pickle refuses."""

    class Scaled(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), self.scale).to_event(1))

    guide = Scaled()
    pv.SVI(pair()[0], guide, adam(), loss=Trace_ELBO()).step(data())
    pickle.dumps(guide.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [(), (5,), (4, 3), (2, 3, 4)])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(size, bad):
    for where in range(torch.zeros(size).numel()):
        gradient = torch.zeros(size)
        gradient.view(-1)[where] = bad
        with pytest.raises(FloatingPointError, match="gradient"):
            check_finite(0.0, [torch.zeros(2), gradient])


def test_a_jit_elbo_inside_a_compiled_one_is_refused():
    with pytest.raises(ValueError, match=r"loss: expected a Pyro ELBO.*Jit"):
        pv.SVI(*pair(), adam(), loss=pv.CompiledELBO(JitTrace_ELBO()))


# One PyroOptim for two SVIs.


def test_a_pyro_optim_with_which_another_svi_trains_is_refused():
    """Pyro would share Adam's averages."""
    optim, x = adam(), data()
    first, second = (pv.SVI(*pair(), optim, loss=Trace_ELBO()) for _ in range(2))
    assert second.evaluate_loss(x)  # which needs no optimiser
    first.step(x)
    message = (
        "a PyroOptim that only this SVI uses, got a PyroOptim that another.*To fix: make a new PyroOptim"
    )
    before = state(second.model, second.guide), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        second.step(x)
    assert_same(before, (state(second.model, second.guide), torch.get_rng_state()))
    with pytest.raises(ValueError, match=message):
        pv.SVI(*pair(), optim, loss=Trace_ELBO())
    first.step(x)
    with pytest.raises(ValueError, match="NaN"):
        second.evaluate_loss(x * torch.nan)
    second = pv.SVI(first.model, first.guide, first.optimizer, loss=TraceMeanField_ELBO())  # the fix
    second.step(x)
    assert all(each["step"] == 3 for each in second.optimizer.state.values())


def test_a_pyro_optim_keeps_no_svi_alive():
    optim = adam()
    svi = pv.SVI(*pair(), optim, loss=Trace_ELBO())
    svi.step(data())
    gone = weakref.ref(svi)
    del svi
    gc.collect()
    assert gone() is None
