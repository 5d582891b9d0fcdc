"""Latents that all data share: what fit, evaluation and reconstruction say of them."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoCallable, AutoDelta, AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv

NUM_DATA, W = 60, 0.3


class Model(PyroModule):
    """w ~ N(0, 1), once; z_n ~ N(0, 1), x_n ~ N(w + z_n, 1)."""

    def __init__(self, mask=None):
        super().__init__()
        self.mask = mask

    def plate(self, x):
        return pyro.plate("data", NUM_DATA, subsample_size=len(x))

    def forward(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with self.plate(x), pyro.poutine.mask(mask=True if self.mask is None else self.mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)).double(), 1.0))
            pyro.sample("x", dist.Normal(w + z, 1.0), obs=x)


class Guide(Model):
    """w is a point, and q(z | w, x) is the posterior: each draw of the ELBO is log p(w) + log p(x | w)."""

    def __init__(self, mask=None):
        super().__init__(mask)
        self.point = nn.Parameter(torch.tensor(W).double())

    def forward(self, x):
        w = pyro.sample("w", dist.Delta(self.point))
        with self.plate(x), pyro.poutine.mask(mask=True if self.mask is None else self.mask):
            pyro.sample("z", dist.Normal((x - w) / 2, 0.5**0.5))


def log_px(x):
    return dist.Normal(torch.tensor(W).double(), 2**0.5).log_prob(x)


PRIOR = dist.Normal(0.0, 1.0).log_prob(torch.tensor(W)).item()


def svi(pair, loss=None):
    return pv.SVI(*pair, torch.optim.SGD(pv.parameters(*pair), lr=0.0), loss=loss or Trace_ELBO())


@pytest.mark.parametrize("loss", [Trace_ELBO, pv.STL, pv.MeanField])
def test_fit_records_the_elbo_of_all_data_per_data_point(loss):
    """On two batches of a third each, with another weight of the KL."""
    x = 2 * torch.randn(40).double()
    with pv.scale_latents(0.5):
        (record,) = pv.fit(svi((Model(), Guide()), loss()), [x[:20], x[20:]], 1, progress=False)
    assert record.elbo == pytest.approx(log_px(x).mean().item() + PRIOR / NUM_DATA)
    assert record.elbo == pytest.approx(record.reconstruction - record.kl)
    assert record.kl > -PRIOR / NUM_DATA
    loss = pv.fit(svi((Model(), Guide())), [x[:20], x[20:]], 1, progress=False)
    assert next(loss).loss == pytest.approx(-record.elbo)


def test_masked_data_count_for_nothing():
    x = torch.randn(20).double()
    mask = torch.arange(20) % 4 > 0
    (record,) = pv.fit(svi((Model(mask), Guide(mask))), [x], 1, progress=False)
    expected = NUM_DATA / 20 * log_px(x)[mask].sum().item() + PRIOR
    assert record.elbo == pytest.approx(expected / NUM_DATA)


def test_what_has_no_number_per_data_point_names_the_alternative():
    pair, x = (Model(), Guide()), torch.randn(20).double()
    message = r"'w': expected it inside the plate 'data', got the plates none.*fit and svi\.evaluate_loss"
    for tool in (pv.log_evidence, pv.elbo_terms, pv.latent_terms, pv.IWAE(2).loss):
        with pytest.raises(ValueError, match=message):
            tool(*pair, x)


@pytest.mark.filterwarnings("ignore:.*compil")
def test_compiled_evidence_says_the_same():
    with pytest.raises(ValueError, match="'w': expected it inside the plate 'data', got the plates none"):
        pv.log_evidence(Model(), Guide(), torch.randn(20).double(), 2, compiled=True)


def test_an_elbo_of_all_data_that_is_not_finite_is_refused():
    guide = Guide()
    nn.init.constant_(guide.point, 1e200)
    with pytest.raises(ValueError, match="The ELBO is not finite: site 'w' of the model, Normal"):
        next(pv.fit(svi((Model(), guide)), [torch.randn(20).double()], 1, progress=False))


def test_it_is_located_at_the_draw_at_which_it_is_not_finite():
    class Bounded(dist.Normal):
        def log_prob(self, value):
            return torch.where(value > 1, -math.inf, super().log_prob(value))  # 1.54 is drawn first

    class Program(PyroModule):
        def __init__(self, family):
            super().__init__()
            self.family, self.loc = family, nn.Parameter(torch.zeros(()))

        def forward(self, x):
            w = pyro.sample("w", self.family(self.loc, 1.0))
            if self.family is Bounded:
                with pyro.plate("data", len(x)):
                    pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    pair = Program(Bounded), Program(dist.Normal)
    with pytest.raises(ValueError, match="The ELBO is not finite: site 'w' of the model, Bounded"):
        next(pv.fit(svi(pair), [torch.randn(20)], 1, progress=False))


def test_reconstruct_needs_no_number_per_data_point():
    x = torch.randn(20).double()
    assert pv.reconstruct(Model(), Guide(), x)["x"].mean.shape == (20,)


def test_a_batch_that_does_not_fit_is_refused_before_training():
    pair = Model(), Guide()
    with pytest.raises(ValueError, match="'x' of the model, Normal: expected finite values"):
        next(pv.fit(svi(pair), [torch.full((3,), math.nan).double()], 1, progress=False))


def test_fit_records_the_elbo_under_a_subsampled_plate_inside_a_data_point():
    class Parts(PyroModule):
        """z_n = 0.3; x_nj ~ N(z_n, 1), of which 2 of 6 are in the batch."""

        def __init__(self, guide):
            super().__init__()
            self.guide, self.point = guide, nn.Parameter(torch.tensor(W))

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-2):
                if self.guide:
                    return pyro.sample("z", dist.Delta(self.point.expand(len(x), 1)))
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
                with pyro.plate("parts", 6, subsample=torch.arange(2), dim=-1):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5, 2)
    (record,) = pv.fit(svi((Parts(False), Parts(True))), [x], 1, progress=False)
    expected = 3 * dist.Normal(W, 1.0).log_prob(x).sum(-1).mean().item()
    assert record.reconstruction == pytest.approx(expected, rel=1e-5)
    assert record.kl == pytest.approx(-PRIOR, rel=1e-5)


def test_fit_trains_and_warns_once_where_there_is_no_elbo():
    """Beside the shared latents of a mixture its components are summed out."""

    def model(x):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[k.long()], 1.0), obs=x)

    guide = AutoDelta(pyro.poutine.block(model, expose=["locs"]))
    x = torch.randn(8)
    guide(x)
    training = pv.fit(svi((model, guide), TraceEnum_ELBO(max_plate_nesting=1)), [x], 3, progress=False)
    with pytest.warns(UserWarning, match="fit trains, but records no ELBO. Enumerated sites") as warned:
        records = list(training)
    assert len(warned) == 1
    assert all(math.isfinite(record.loss) and math.isnan(record.elbo) for record in records)


# An autoguide with a posterior for each data point.


class Local(PyroModule):
    """z_n ~ N(0, 1); x_n ~ N(z_n, 1), so that x_n ~ N(0, 2)."""

    def __init__(self, plate=None):
        super().__init__()
        self.plate = plate or (lambda x: pyro.plate("data", len(x)))

    def forward(self, x, *rows):
        with self.plate(x, *rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def fitted(model, x, *rows, everything=None, **options):
    """Return an AutoNormal that is the posterior of the data."""
    guide = AutoNormal(model, **options)
    guide(x, *rows)
    with torch.no_grad():
        guide.locs.z.copy_((x if everything is None else everything) / 2)
        guide.scales.z = torch.full_like(guide.scales.z, 0.5**0.5)
    return guide


def exact(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


X = torch.linspace(-3, 3, 60)


@pytest.mark.parametrize("name", ["data", "batch"])
def test_such_a_guide_is_evaluated_on_its_own_data(name):
    """60 data and 50 samples are more than one chunk takes."""
    model = Local(lambda x: pyro.plate(name, len(x)))
    guide = fitted(model, X)
    for x in (X, X.clone()):
        torch.testing.assert_close(pv.log_evidence(model, guide, x, 50).values, exact(x))
        torch.testing.assert_close(pv.elbo_terms(model, guide, x).elbo, exact(x))
    (record,) = pv.fit(svi((model, guide)), [X], 1, progress=False)
    assert record.elbo == pytest.approx(exact(X).mean().item())


def test_its_evidence_takes_no_more_memory_than_that_of_other_guides():
    sizes = []

    class Counted(Local):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            sizes.append(z.numel())

    model = Counted()
    guide = fitted(model, X)
    torch.testing.assert_close(pv.log_evidence(model, guide, X, 50).values, exact(X))
    assert 1000 < max(sizes) <= 2048


def test_its_data_may_be_more_than_a_chunk_of_others():
    model, x = Local(), torch.randn(3000)
    torch.testing.assert_close(pv.log_evidence(model, fitted(model, x), x, 2).values, exact(x))


@pytest.mark.parametrize("name", ["data", "batch"])
@pytest.mark.parametrize("x", [-X + 0.1, X[:30]])
def test_it_is_not_evaluated_on_other_data(x, name):
    model = Local(lambda x: pyro.plate(name, len(x)))
    guide = fitted(model, X)
    message = "'z' of the guide, AutoNormal: expected the batch that it was set up with, whole"
    for tool in (pv.log_evidence, pv.elbo_terms, pv.latent_terms, pv.reconstruct):
        with pytest.raises(ValueError, match=message):
            tool(model, guide, x)


def test_other_arguments_are_other_data():
    class Shifted(Local):
        def forward(self, x, shift):
            super().forward(x - shift)

    model = Shifted()
    guide = AutoNormal(model)
    guide(X, 1.0)
    assert pv.elbo_terms(model, guide, (X, 1.0)).elbo.shape == (60,)
    for batch in ((X, 2.0), (X, torch.ones(60))):
        with pytest.raises(ValueError, match="expected the batch that it was set up with"):
            pv.elbo_terms(model, guide, batch)


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [
        ((), (), (0.0,)),
        ((float("1"),), (float("1"),), ()),
        ((np.ones(()),), (), (np.ones(()),)),
    ],
)
def test_arguments_besides_tensors_are_compared_too(first, same, other):
    class Shifted(Local):
        def forward(self, x, shift=0.0):
            super().forward(x - float(shift))

    model = Shifted()
    guide = AutoNormal(model)
    guide(X, *first)
    assert pv.elbo_terms(model, guide, (X, *(same or first))).elbo.shape == (60,)
    with pytest.raises(ValueError, match="expected the batch that it was set up with"):
        pv.elbo_terms(model, guide, (X, *other))


def test_missing_values_of_its_own_data_are_the_same_data():
    class Masked(Local):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", dist.NanMaskedNormal(z, 1.0), obs=x)

    x = X.masked_fill(X > 2, math.nan)
    model = Masked()
    guide = AutoNormal(model)
    guide(x)
    assert pv.elbo_terms(model, guide, x.clone()).elbo.isfinite().all()
    with pytest.raises(ValueError, match="expected the batch that it was set up with"):
        pv.elbo_terms(model, guide, X)


def test_a_batch_that_its_model_cannot_run_on_is_named():
    class Wide(Local):
        def forward(self, x):
            super().forward(x @ torch.ones(3))

    model = Wide()
    guide = AutoNormal(model)
    guide(torch.randn(6, 3))
    with pytest.raises(ValueError, match="The model: expected a batch that fits its networks"):
        pv.elbo_terms(model, guide, torch.randn(6, 4))


def test_at_its_first_use_such_a_guide_is_set_up_with_the_whole_batch():
    model = Local()
    guide = AutoNormal(model)
    assert pv.log_evidence(model, guide, X, 50).values.shape == (60,)
    with pytest.raises(ValueError, match="expected the batch that it was set up with"):
        pv.elbo_terms(model, guide, X + 1)


def test_fit_records_no_elbo_of_other_data():
    model = Local()
    training = pv.fit(svi((model, fitted(model, X[:30]))), [X[:30], X[30:]], 3, progress=False)
    with pytest.warns(UserWarning, match="fit trains, but records no ELBO. Site 'z' of the guide") as warned:
        records = list(training)
    assert len(warned) == 1
    assert all(math.isfinite(record.loss) and math.isnan(record.elbo) for record in records)


def test_a_plate_that_says_which_data_they_are_may_be_evaluated():
    def plate(x, rows):
        return pyro.plate("data", len(X), subsample=rows)

    model, rows = Local(plate), torch.arange(60)
    guide = fitted(model, X[:30], rows[:30], everything=X, create_plates=plate)
    torch.testing.assert_close(pv.elbo_terms(model, guide, (X[30:], rows[30:])).elbo, exact(X[30:]))
    torch.testing.assert_close(pv.log_evidence(model, guide, (X, rows), 50).values, exact(X))
    # Without its indices, the guide would draw them at random.
    model = Local(lambda x: pyro.plate("data", len(X), subsample_size=len(x)))
    guide = fitted(model, X[:30], everything=X)
    with pytest.raises(ValueError, match="expected the batch that it was set up with"):
        pv.elbo_terms(model, guide, X[:30])


def test_the_plates_of_a_list_of_autoguides_are_those_of_its_parts():
    def plate(x, rows):
        return pyro.plate("data", len(X), subsample=rows)

    model, rows = Local(plate), torch.arange(60)
    guide = AutoGuideList(model, create_plates=plate)
    guide.append(AutoNormal(model))
    guide(X[:30], rows[:30])
    assert pv.elbo_terms(model, guide, (X[30:], rows[30:])).elbo.shape == (30,)


# Autoguides without one.


class Amortised(Local):
    def forward(self, x):
        with self.plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_an_autoguide_of_shared_latents_is_evaluated_on_any_data():
    class Both(Amortised):
        def __init__(self, model):
            super().__init__(model.plate)
            self.shared = AutoNormal(pyro.poutine.block(model, expose=["w"]))

        def forward(self, x):
            self.shared(x)
            super().forward(x)

    model, x = Model(), torch.randn(40).double()
    guide = Both(model)
    guide(x[:20])
    assert pv.reconstruct(model, guide, x[20:])["x"].mean.shape == (20,)
    (record,) = pv.fit(svi((model, guide)), [x[:20], x[20:]], 1, progress=False)
    assert math.isfinite(record.elbo)


def test_the_batch_of_a_guide_that_pyro_holds_in_an_autoguide_is_split():
    sizes = []

    class Counted(Amortised):
        def forward(self, x):
            sizes.append(len(x))
            super().forward(x)

    model, x = Local(), torch.randn(3000)
    guide = AutoCallable(model, Counted())
    torch.testing.assert_close(pv.log_evidence(model, guide, x, 1).values, exact(x))
    assert max(sizes) < 3000


def test_latent_terms_leave_out_no_auxiliary_site():
    model = Local()
    with pytest.raises(ValueError, match="Site 'z_unconstrained' of the guide: expected no auxiliary sites"):
        pv.latent_terms(model, fitted(model, X), X)
