"""Bad input raises a clear error, with Pyro's validation on or off, and changes nothing."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    JitTrace_ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.nn import PyroModule
from registry import data, pair
from torch import nn

import pyro_vae as pv


def adam():
    return pyro.optim.Adam({"lr": 1e-2})


# name: (likelihood, batch, pattern of the error). The data have 6 columns.
BATCHES = {
    "grey pixels to a Bernoulli": (
        "bernoulli",
        torch.rand(4, 6),
        "'x'.*expected 0 or 1, got .*in 24 of 24 values.*binarise",
    ),
    "0..255 floats to a Bernoulli": (
        "bernoulli",
        torch.arange(24.0).view(4, 6),
        "'x'.*expected 0 or 1, got .*in 22 of 24 values, for example 2.*divide by 255",
    ),
    "0..255 floats to a continuous Bernoulli": (
        "continuous-bernoulli",
        torch.arange(24.0).view(4, 6),
        r"'x'.*expected Interval\(.*0\.0.*1\.0\), got .*in 22 of 24 values, for example 2.*divide by 255",
    ),
    "0..255 floats to a categorical": (
        "categorical",
        torch.arange(24.0).view(4, 6),
        "'x'.*expected the grid k / 4.*got .*in 22 of 24 values, for example 2.*divide by 255",
    ),
    "a grid of other levels": ("categorical", torch.full((4, 6), 1 / 7), r"k / 4.*k / \(K - 1\)"),
    "pixels below 0": ("continuous-bernoulli", torch.full((4, 6), -0.5), "outside its support"),
    "pixels above 1": ("discretized-logistic", torch.full((4, 6), 1.5), "outside its support"),
    "NaN": ("bernoulli", torch.full((4, 6), torch.nan), "got NaN (or infinity )?in 24 of 24"),
    "infinity": ("gaussian", torch.full((4, 6), torch.inf), "NaN or infinity in 24 of 24"),
    "uint8": ("bernoulli", torch.zeros(4, 6, dtype=torch.uint8), r"Site 'x'.*uint8.*x\.float\(\) / 255"),
    "bool": ("bernoulli", torch.zeros(4, 6, dtype=torch.bool), r"Site 'x'.*torch\.bool.*x\.float\(\)"),
    "float64": ("bernoulli", torch.zeros(4, 6).double(), r"float64.*x\.float\(\)"),
    "a single image": ("bernoulli", torch.zeros(6), r"'x'.*expected shape \(6, 6\).*got \(6,\).*unsqueeze"),
    "images that are not flat": ("bernoulli", torch.zeros(4, 1, 2, 3), r"flatten"),
    "one column": (
        "gaussian",
        torch.rand(4, 1),
        r"'x'.*expected shape \(4, 6\), .*without broadcasting, got \(4, 1\)",
    ),
    "an empty batch": (
        "bernoulli",
        torch.zeros(0, 6),
        r"The batch: expected at least one data point, got .*\(0, 6\)",
    ),
    "another width": ("bernoulli", torch.zeros(4, 7), r"'x'.*expected shape \(4, 6\).*got \(4, 7\)"),
    "no dimension": ("bernoulli", torch.tensor(0.0), r"guide: expected a batch.*got \(\) .*it cannot run"),
}


def everything(model, guide, svi):
    return copy.deepcopy(
        (model.state_dict(), guide.state_dict(), svi.optimizer.state_dict(), torch.get_rng_state())
    )


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("method", ["step", "evaluate_loss"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_bad_batch_is_refused_and_changes_nothing(name, method, validation):
    likelihood, batch, message = BATCHES[name]
    model, guide = pair(likelihood)
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    svi.step(data(likelihood, 4))
    before = everything(model, guide, svi)
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=f"(?s){message}"):
        getattr(svi, method)(batch)
    torch.testing.assert_close(everything(model, guide, svi), before, rtol=0, atol=0)
    svi.step(data(likelihood, 4))  # training can go on


@pytest.mark.parametrize("function", [pv.log_evidence, pv.elbo_terms, pv.reconstruct])
@pytest.mark.parametrize("name", [n for n in BATCHES if n not in ("an empty batch", "no dimension")])
def test_a_bad_batch_is_refused_by_evaluation(function, name):
    likelihood, batch, message = BATCHES[name]
    model, guide = pair(likelihood)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        function(model, guide, batch)


# Bad values in a batch whose signature was checked before. name: (likelihood, value, pattern of the error).
LATE = {
    "grey pixels to a Bernoulli": (
        "bernoulli",
        0.5,
        r"expected 0 or 1, got .*1 of 24 values.* 0\.5\..*binarise",
    ),
    "NaN": ("gaussian", torch.nan, "got NaN (or infinity )?in 1 of 24"),
    "infinity": ("gaussian-pixel", torch.inf, "NaN or infinity in 1 of 24"),
    "pixels above 1": ("continuous-bernoulli", 1.1, "outside its support in 1 of 24"),
    "another grid": ("categorical", 0.3, "outside its support in 1 of 24"),
}


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("name", LATE)
def test_a_bad_value_is_found_after_the_first_step(name, elbo, validation):
    """Its signature is known, so the step does not check the batch again.

    The loss is not finite, and a second run names the site.
    """
    likelihood, value, message = LATE[name]
    model, guide = pair(likelihood)
    svi = pv.SVI(model, guide, adam(), loss=elbo())
    x = data(likelihood, 4)
    svi.step(x)
    svi.evaluate_loss(x)
    before = everything(model, guide, svi)
    bad = x.clone()
    bad[1, 2] = value
    for method in (svi.step, svi.evaluate_loss):
        with (
            pyro.validation_enabled(validation),
            warnings.catch_warnings(action="error" if validation else "ignore"),
            pytest.raises(ValueError, match=f"('x'|The guide).*{message}"),
        ):
            method(bad)
        torch.testing.assert_close(everything(model, guide, svi), before, rtol=0, atol=0)
    svi.step(x)


def test_whole_numbers_that_look_like_an_image_warn_under_a_gaussian():
    """A Gaussian takes any real number, but pixels that nobody has divided by 255 do not train."""
    model, guide = pair("gaussian", width=64)
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    levels = torch.linspace(0, 255, 256).round().view(4, 64)
    with pytest.warns(UserWarning, match=r"'x'.*Normal: got whole numbers from 0 to 255.*divide by 255"):
        svi.step(levels)


@pytest.mark.parametrize(
    ("width", "rows"),
    [
        (64, lambda x: x / 255),
        (64, lambda x: x - 128),
        (64, lambda x: x // 4),  # below 128
        (64, lambda x: (x > 127).float()),
        (32, lambda x: x),  # a table
    ],
)
def test_other_numbers_do_not_warn_under_a_gaussian(width, rows):
    model, guide = pair("gaussian", width=width)
    torch.nn.init.zeros_(guide.encoder[0][0].weight)  # so that large numbers do not overflow
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    svi.step(rows(torch.linspace(0, 255, 256).round().view(-1, width)))


def test_a_user_s_distribution_is_validated_on_the_first_batch():
    class Rates(PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", pv.StandardNormal(2)())
                pyro.sample("x", dist.Exponential(z[..., :1].exp().expand(-1, 6)).to_event(1), obs=x)

    _, guide = pair()
    svi = pv.SVI(Rates(), guide, adam(), loss=Trace_ELBO())
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="'x'.*Exponential.*support"),
    ):
        svi.step(-torch.rand(4, 6))
    svi.step(torch.rand(4, 6))


def break_log_sigma(guide):
    guide.encoder[0][2].bias.data[2:] = -1e4


def break_weights(guide):
    guide.encoder[0][0].weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_log_sigma, "site 'z' of the guide, Normal, has a scale outside"),
        (break_weights, "NaN or infinity in 'encoder.0.0.weight'. To fix"),
    ],
)
def test_a_non_finite_loss_names_its_site(damage, message):
    model, guide = pair()
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    x = data()
    svi.step(x)
    damage(guide)
    before = everything(model, guide, svi)
    with pytest.raises(ValueError, match=f"The loss is.*{message}"):
        svi.step(x)
    torch.testing.assert_close(everything(model, guide, svi), before, rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is None for p in pv.parameters(model, guide))


def test_a_non_finite_gradient_names_its_site():
    class Root(PyroModule):
        """sqrt(w^2) has the value 0 and the gradient NaN at w = 0."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", pv.StandardNormal(2)())
                loc = z.sum(-1, keepdim=True) + (self.w * self.w).sqrt()
                pyro.sample("x", dist.Normal(loc.expand(-1, 6), 1.0).to_event(1), obs=x)

    model, guide = Root(), pair()[1]
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    x = torch.rand(4, 6)
    svi.step(x)
    model.w.data.zero_()
    before = everything(model, guide, svi)
    with pytest.raises(ValueError, match="A gradient is not finite.*site 'x' of the model, Normal"):
        svi.step(x)
    torch.testing.assert_close(everything(model, guide, svi), before, rtol=0, atol=0)


def test_a_failed_step_does_not_change_batch_norm():
    model, _ = pair("gaussian")
    guide = pv.Guide(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), pv.DiagNormal()))
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    x = torch.rand(4, 6)
    svi.step(x)
    before = everything(model, guide, svi)
    with pytest.raises(ValueError, match="NaN"):
        svi.step(torch.full((4, 6), torch.nan))
    torch.testing.assert_close(everything(model, guide, svi), before, rtol=0, atol=0)


# Models and guides that do not match.


def normal_guide(name="z", dim=2, scale=None, plate="data", size=None):
    class Sized(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 2 * dim), pv.DiagNormal())

        def forward(self, x):
            with pyro.plate(plate, size or len(x), subsample_size=len(x)):
                pyro.sample(name, self.net(x))

    return Sized()


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (
            normal_guide(name="w"),
            r"expected the same .*got \['z'\] only in the model and \['w'\] only in the guide.* rename",
        ),
        (
            normal_guide(dim=3),
            "'z' of the guide: expected an event of 2 .* in the model, got 3. To fix: .* DiagNormal in 4",
        ),
        (
            normal_guide(size=100),
            r"'z': expected the same scale.*got 1\.0 in the model and 12\.5 in the guide",
        ),
        (pv.Guide(nn.Sequential(pv.MLP(6, 5), pv.DiagNormal())), r"DiagNormal: expected features"),
        (pv.Guide(nn.Sequential(pv.MLP(6, 6), pv.FullNormal())), r"FullNormal: expected features"),
        (pv.Guide(nn.Sequential(pv.MLP(9, 4), pv.DiagNormal())), r"MLP\(9, 4\): expected.*\(8, 6\)"),
        (
            pv.Guide(nn.Sequential(nn.Linear(9, 4), pv.DiagNormal())),
            r"The guide: expected a batch.*got \(8, 6\) torch\.float32, on which it cannot run",
        ),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(guide, message):
    model, _ = pair()
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    with pytest.raises(ValueError, match=message):
        svi.step(data())


class Ordered(PyroModule):
    """Sample the sites in the given order, each with the sum of the earlier ones as its mean."""

    def __init__(self, *names, observe=False):
        super().__init__()
        self.names, self.observe = names, observe
        self.loc = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            total = self.loc
            for name in self.names:
                total = total + pyro.sample(name, dist.Normal(total, 1.0))
            if self.observe:
                pyro.sample("x", dist.Normal(total, 1.0), obs=x)


def test_an_analytic_kl_against_the_model_s_order_is_refused():
    """With a bottom-up guide it would give 1.993; 1.681 is exact. Trace_ELBO is right there."""
    model, top_down, bottom_up = (
        Ordered("z2", "z1", observe=True),
        Ordered("z2", "z1"),
        Ordered("z1", "z2"),
    )
    x = torch.randn(4)
    pv.SVI(model, top_down, adam(), loss=TraceMeanField_ELBO()).step(x)
    pv.SVI(model, bottom_up, adam(), loss=Trace_ELBO()).step(x)
    with pytest.raises(
        ValueError, match="'z1' depends on 'z2' in the model, and 'z2' on 'z1' in the guide.*Trace_ELBO"
    ):
        pv.SVI(model, bottom_up, adam(), loss=TraceMeanField_ELBO()).step(x)


@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_mask_on_one_side_is_refused(side):
    programs = dict(zip(("model", "guide"), pair(), strict=True))
    mask = torch.tensor([True, False] * 4)
    masked = {**programs, side: pyro.poutine.mask(programs[side], mask=mask)}
    with pytest.raises(ValueError, match="'z': expected the same mask in model and guide, got different"):
        pv.SVI(masked["model"], masked["guide"], adam(), loss=Trace_ELBO()).step(data())
    both = [pyro.poutine.mask(program, mask=mask) for program in programs.values()]
    pv.SVI(*both, adam(), loss=Trace_ELBO()).step(data())


def test_a_decoder_for_another_latent_is_refused():
    model = pv.Model(pv.StandardNormal(3), nn.Sequential(pv.MLP(2, 6), pv.Bernoulli()))
    svi = pv.SVI(model, pair(dim=3)[1], adam(), loss=Trace_ELBO())
    with pytest.raises(ValueError, match=r"MLP\(2, 6\): expected features.*\(8, 3\)"):
        svi.step(data())


def test_a_prior_for_another_latent_is_refused():
    model = pv.Model(pv.StandardNormal(3), pair()[0].decoder)
    message = "'z' of the guide: expected an event of 3 .* in the model, got 2. To fix: .* DiagNormal in 6 "
    with pytest.raises(ValueError, match=message):
        pv.SVI(model, pair()[1], adam(), loss=Trace_ELBO()).step(data())


def test_a_parameter_that_pyro_would_copy_is_refused():
    model, guide = pair()
    weight = next(p for p in guide.parameters() if p.dim() == 2)
    weight.data = weight.data.mT.contiguous().mT
    svi = pv.SVI(model, guide, adam(), loss=Trace_ELBO())
    with pytest.raises(
        ValueError, match=r"weight': expected it contiguous.*copy.*p\.data = p\.data\.contiguous"
    ):
        svi.step(data())
    weight.data = weight.data.contiguous()
    svi.step(data())


def loose_model(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", pv.StandardNormal(2)())
        pyro.sample("x", dist.Normal(loc + z[..., :1].expand(-1, 6), 1.0).to_event(1), obs=x)


USERS_OF_PARAMETERS = {
    "SVI": lambda guide, x: pv.SVI(loose_model, guide, adam(), loss=Trace_ELBO()).step(x),
    "generate": lambda guide, x: pv.generate(loose_model, x),
    "reconstruct": lambda guide, x: pv.reconstruct(loose_model, guide, x),
    "log_evidence": lambda guide, x: pv.log_evidence(loose_model, guide, x, 5),
    "elbo_terms": lambda guide, x: pv.elbo_terms(loose_model, guide, x),
    "latent_terms": lambda guide, x: pv.latent_terms(loose_model, guide, x, 2),
    "explain": lambda guide, x: pv.explain(loose_model, guide, Trace_ELBO(), x),
    "compare_elbos": lambda guide, x: pv.compare_elbos(loose_model, guide, x, {"a": Trace_ELBO()}, 2),
}


@pytest.mark.parametrize("user", USERS_OF_PARAMETERS)
def test_a_parameter_outside_modules_is_refused(user):
    pyro.param("loc", torch.tensor(5.0))  # trained by pyro.infer.SVI, say
    message = (
        r"(?s)'loc': expected it in a module.*got a pyro\.param.*To fix: .*self\.p = PyroParam\(init.*'loc'"
    )
    with pytest.raises(ValueError, match=message):
        USERS_OF_PARAMETERS[user](pair()[1], data())
    assert dict(pyro.get_param_store().items()) == {"loc": 5.0}


# Constructors.


def frozen():
    model, guide = pair()
    return model.requires_grad_(False), guide.requires_grad_(False)


def stepped():
    optim = adam()
    pyro.infer.SVI(*pair(), optim, loss=Trace_ELBO()).step(data())
    pyro.clear_param_store()
    return optim


PyroExponential = pyro.optim.ExponentialLR

SVIS = {
    "a function for a loss": (
        lambda: pv.SVI(*pair(), adam(), loss=lambda model, guide, x: 0.0),
        "loss: expected a Pyro ELBO whose loss is one number, got function",
    ),
    "frozen": (
        lambda: pv.SVI(*frozen(), torch.optim.Adam(pair()[0].parameters()), loss=Trace_ELBO()),
        "optim: expected an optimiser with trainable parameters.*got one that holds none",
    ),
    "an optimiser of another pair": (
        lambda: pv.SVI(*pair(), torch.optim.Adam(pair()[0].parameters()), loss=Trace_ELBO()),
        r"expected .*trainable parameters of this model and guide, got .*none.*pyro_vae\.parameters",
    ),
    "a callable": (
        lambda: pv.SVI(*pair(), pyro.optim.Adam(lambda name: {"lr": 0.1}), loss=Trace_ELBO()),
        "got a callable.*parameter groups",
    ),
    "clipping": (
        lambda: pv.SVI(*pair(), pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), loss=Trace_ELBO()),
        "does not clip.*clip_grad_norm_",
    ),
    "a scheduler": (
        lambda: pv.SVI(
            *pair(),
            PyroExponential({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}),
            loss=Trace_ELBO(),
        ),
        r"got PyroLRScheduler.*torch\.optim\.lr_scheduler",
    ),
    "a PyroOptim that has stepped": (
        lambda: pv.SVI(*pair(), stepped(), loss=Trace_ELBO()),
        "fresh PyroOptim",
    ),
    "a closure's optimiser": (
        lambda: pv.SVI(*(p := pair()), torch.optim.LBFGS(p[0].parameters()), loss=Trace_ELBO()),
        "got LBFGS",
    ),
    "two losses in one": (
        lambda: pv.SVI(*pair(), adam(), loss=ReweightedWakeSleep(num_particles=2)),
        "expected a Pyro ELBO whose loss is one number, got ReweightedWakeSleep",
    ),
    "a class for a loss": (
        lambda: pv.SVI(*pair(), adam(), loss=Trace_ELBO),
        "got <class 'pyro.infer.trace_elbo.Trace_ELBO'>",
    ),
    "a jitted loss": (
        lambda: pv.SVI(*pair(), adam(), loss=JitTrace_ELBO()),
        "got JitTrace_ELBO: .*without Jit",
    ),
    "no optimiser": (
        lambda: pv.SVI(*pair(), {"lr": 0.1}, loss=Trace_ELBO()),
        "optim: expected a torch optimiser, or a PyroOptim.*got dict",
    ),
}


@pytest.mark.parametrize("name", SVIS)
def test_an_svi_that_cannot_train_is_refused(name):
    make, message = SVIS[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pair_without_trainable_parameters_is_refused_at_the_first_step():
    svi = pv.SVI(*frozen(), adam(), loss=Trace_ELBO())
    with pytest.raises(ValueError, match="optim: expected .*trainable parameters.*got one that holds none"):
        svi.step(data())


def test_a_loss_without_gradients_is_refused():
    class Detached(PyroModule):
        def __init__(self, family):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 4), family)

        def forward(self, x):
            with pyro.plate("data", len(x)), torch.no_grad():
                pyro.sample("z", self.net(x))

    model, _ = pair()
    model.requires_grad_(False)
    for elbo in (Trace_ELBO(), TraceGraph_ELBO()):
        svi = pv.SVI(model, Detached(pv.DiagNormal()), adam(), loss=elbo)
        with pytest.raises(ValueError, match="nothing would train"):
            svi.step(data())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.MLP(5), "two or more positive widths"),
        (lambda: pv.MLP(5, 0), "two or more positive widths"),
        (lambda: pv.StandardNormal(0), "positive whole number"),
        (lambda: pv.Gaussian(0.0), "sigma: expected a positive number"),
        (lambda: pv.Gaussian(float("inf")), "sigma: expected a positive number"),
        (lambda: pv.LearnedSigma(100.0), "initial: expected a sigma between"),
        (lambda: pv.LearnedSigma(0.5, bounds=(1.0, 0.0)), "low < high"),
        (lambda: pv.PixelSigma(bounds=(-float("inf"), 0.0)), "two finite numbers"),
        (lambda: pv.Categorical(1), "at least 2"),
        (lambda: pv.DiscretizedLogistic(1), "at least 2"),
        (lambda: pv.DiscretizedLogistic(bounds=(0.0, 0.0)), "low < high"),
        (lambda: pv.MLP(2, 3)(torch.zeros(4, 5)), r"expected features of shape \(\*batch, 2\)"),
        (lambda: pv.MLP(2, 3)(torch.zeros(4, 2, dtype=torch.int64)), "floating-point"),
    ],
)
def test_wrong_constructor_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optim": torch.optim.Adam},
            r"its class Adam. To fix: make one, torch.optim.Adam\(pyro_vae.param",
        ),
        ({"loss": Trace_ELBO}, r"got .*Trace_ELBO.*To fix: make an object, Trace_ELBO\(\)"),
    ],
)
def test_a_class_for_its_object_is_refused(options, message):
    model, guide = pair()
    with pytest.raises(ValueError, match=message):
        pv.SVI(model, guide, **({"optim": adam(), "loss": Trace_ELBO()} | options))


def test_single_data_under_double_parameters_are_refused():
    model, guide = pair()
    svi = pv.SVI(model.double(), guide.double(), adam(), loss=Trace_ELBO())
    with pytest.raises(ValueError, match=r"expected a batch .* torch.float64, got .*x.double\(\)"):
        svi.step(data())


def test_no_images_are_no_images_of_another_form():
    with pytest.raises(ValueError, match=r"uint8 of shape \(0, 6\). To fix: add images"):
        pv.data.Batches(torch.zeros(0, 6, dtype=torch.uint8), pv.data.Grey(), 4)


def test_a_batch_without_all_its_parts_is_refused():
    model, guide = pair()

    class Conditional(PyroModule):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x, y):
            return self.program(x)

    svi = pv.SVI(Conditional(model), Conditional(guide), adam(), loss=Trace_ELBO())
    with pytest.raises(ValueError, match=r"expected 2 parts, as the guide takes \(x, y\), got 1.*watch"):
        svi.step(data())
