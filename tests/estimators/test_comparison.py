"""compare_elbos against closed forms: every number of the table is known for the linear-Gaussian VAE."""

import io
import json
import math
import runpy
import sys
from pathlib import Path

import matplotlib.figure
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import references

DRAWS = 200


def exact(model, guide, x):
    """Return the closed form of the negative ELBO, summed over the data."""
    return -references.elbo(model, guide, x).sum()


@pytest.fixture
def case():
    model, guide = references.linear_gaussian(dim=1)
    return model, guide, torch.randn(8, 5, dtype=torch.float64)


def rows(comparison, group):
    return {r["estimator"]: r for r in comparison.records if r["group"] == group}


class Times(Trace_ELBO):
    """A wrong estimator: its loss is multiplied by a factor."""

    def __init__(self, factor):
        super().__init__(max_plate_nesting=1)
        self.factor = factor

    def differentiable_loss(self, model, guide, *args, **kwargs):
        return self.factor * super().differentiable_loss(model, guide, *args, **kwargs)


class HalfKL(TraceMeanField_ELBO):
    """A wrong estimator: its value is right, but half of the KL's gradient is missing."""

    def differentiable_loss(self, model, guide, x):
        loss = super().differentiable_loss(model, guide, x)
        half = references.kl(guide, x).sum() / 2
        return loss - half + half.detach()


def test_value_gap_bias_and_gradient_bias_are_the_closed_form(case):
    model, guide, x = case
    evidence = references.evidence(model, x).mean()
    estimators = {
        "trace": Trace_ELBO(max_plate_nesting=1),
        "mean-field": TraceMeanField_ELBO(max_plate_nesting=1),
        "half the KL": HalfKL(max_plate_nesting=1),
        "doubled": Times(2),
    }
    compared = pv.compare_elbos(
        model, guide, x, estimators, DRAWS, evidence=evidence, targets=dict.fromkeys(estimators, exact)
    )
    elbo = -exact(model, guide, x).item() / len(x)
    for group in ("model", "guide"):
        for name, r in rows(compared, group).items():
            assert r["gap"] == pytest.approx(evidence.item() - r["value"])
            assert r["bias"] == pytest.approx(r["value"] - elbo)
            assert r["value_error"] == pytest.approx(r["value_sd"] / math.sqrt(DRAWS)) == r["bias_error"]
            wrong_gradient = name == "doubled" or (name, group) == ("half the KL", "guide")
            assert (r["gradient_bias"] > 3 * r["gradient_bias_error"]) == wrong_gradient, (name, group)
            assert (abs(r["bias"]) > 4 * r["bias_error"]) == (name == "doubled"), name
    # The bias also has the right size: that of the target itself.
    wrong = rows(compared, "model")["doubled"]
    assert wrong["gradient_bias"] == pytest.approx(1, abs=2 * wrong["gradient_bias_error"])
    assert wrong["bias"] == pytest.approx(elbo, abs=4 * wrong["bias_error"])


class ScaledWeights(pv.IWAE):
    """A wrong estimator: the weights are summed, not averaged."""

    def differentiable_loss(self, model, guide, *args, **kwargs):
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        return loss - len(args[0]) * math.log(self.num_particles)


class WithoutScore(pv.IWAE):
    """A wrong estimator: IWAE without the score, which has a mean of 0 in the ELBO alone."""

    def differentiable_loss(self, model, guide, x):
        q = guide.encoder(x)
        z = q.rsample((self.num_particles,))
        fixed = dist.Normal(q.mean.detach(), q.stddev.detach()).to_event(1)
        log_w = model.prior().log_prob(z) + model.decoder(z).log_prob(x) - fixed.log_prob(z)
        return -(log_w.logsumexp(0) - math.log(self.num_particles)).sum()


def test_bounds_of_several_samples_have_no_bias_and_wrong_ones_do(case):
    model, guide, x = case
    k = 5
    options = {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": 1}
    estimators = {
        "RenyiELBO": RenyiELBO(0, **options),
        "Renyi": pv.Renyi(0, k),
        "IWAE": pv.IWAE(k),
        "DReG": pv.DReG(k),
        "the sum of weights": ScaledWeights(k),
        "without the score": WithoutScore(k),
    }

    def bound(model, guide, x):
        return -references.importance_weighted_bound(model, guide, x, k).sum()

    references.set_to_posterior(model, guide, spread=1.6)
    compared = pv.compare_elbos(model, guide, x, estimators, DRAWS, targets=dict.fromkeys(estimators, bound))
    for group in ("model", "guide"):
        for name, r in rows(compared, group).items():
            assert (abs(r["bias"]) > 4 * r["bias_error"]) == (name == "the sum of weights"), name
            wrong = (name, group) == ("without the score", "guide")
            assert (r["gradient_bias"] > 3 * r["gradient_bias_error"]) == wrong, (name, group)


def test_a_target_without_noise_is_drawn_twice(case):
    model, guide, x = case
    calls = []

    def target(model, guide, x):
        calls.append(1)
        return exact(model, guide, x)

    compared = pv.compare_elbos(model, guide, x, {"Trace": Trace_ELBO()}, 10, targets={"Trace": target})
    assert len(calls) == 2
    assert rows(compared, "model")["Trace"]["bias_error"] == rows(compared, "model")["Trace"]["value_error"]


def test_variance_and_signal_to_noise_are_the_closed_form(case):
    """d loss / d bias = -(x - W z - b) / s^2 is linear in z, so its mean and variance are known."""
    model, guide, x = case
    x = x + torch.tensor([3.0, -3.0, 3.0, -3.0, 0.0])  # means of both signs
    linear = model.decoder[0]
    compared = pv.compare_elbos(model, guide, x, {"trace": Trace_ELBO()}, 500, groups={"bias": [linear.bias]})
    (r,) = compared.records
    q = guide.encoder(x)
    with torch.no_grad():
        mean = -(x - linear(q.mean)).sum(0) / 0.7**2 / len(x)
        variance = (linear.weight[:, 0] ** 2 * q.variance.sum()) / 0.7**4 / len(x) ** 2
    assert r["gradient_variance"] == pytest.approx(variance.sum().item(), rel=0.25)
    assert r["snr"] == pytest.approx((mean.abs() / variance.sqrt()).mean().item(), rel=0.06)
    assert r["snr_per_root_second"] == pytest.approx(r["snr"] / math.sqrt(r["ms"] / 1000))


def test_an_analytic_kl_lowers_gradient_noise_but_at_the_posterior_raises_the_value_s_noise(case):
    model, guide, x = case
    estimators = {
        "trace": Trace_ELBO(max_plate_nesting=1),
        "mean-field": TraceMeanField_ELBO(max_plate_nesting=1),
    }
    away = rows(pv.compare_elbos(model, guide, x, estimators, DRAWS), "guide")
    assert away["mean-field"]["gradient_variance"] < away["trace"]["gradient_variance"]
    assert away["mean-field"]["value_sd"] < away["trace"]["value_sd"]

    references.set_to_posterior(model, guide)
    evidence = references.evidence(model, x).mean()
    targets = dict.fromkeys(estimators, exact)
    at = pv.compare_elbos(model, guide, x, estimators, DRAWS, evidence=evidence, targets=targets)
    assert all(r["gradient_bias"] < 3 * r["gradient_bias_error"] for r in rows(at, "model").values())
    at = rows(at, "guide")
    assert at["trace"]["gradient_bias"] is None  # the target is 0
    assert abs(at["trace"]["gap"]) < 1e-12  # log p(x, z) - log q(z | x) is log p(x) for every z
    assert at["trace"]["value_sd"] < 1e-12
    # The remaining noise is that of the reconstruction: a quadratic in z, whose variance is known.
    with torch.no_grad():
        q, w = guide.encoder(x), model.decoder[0].weight[:, 0]
        s2, variance, slope = 0.7**2, q.variance[:, 0], (x - model.decoder[0](q.mean)) @ w
        per_data_point = slope**2 * variance / s2**2 + w.square().sum() ** 2 * variance**2 / (2 * s2**2)
    assert at["mean-field"]["value_sd"] == pytest.approx(per_data_point.sum().sqrt().item() / len(x), rel=0.2)
    assert at["mean-field"]["gradient_variance"] < at["trace"]["gradient_variance"]


def test_the_snr_grows_with_the_square_root_of_the_particles(case):
    model, guide, x = case
    some = {k: Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1) for k in (1, 16)}
    compared = pv.compare_elbos(model, guide, x, {f"{k}": elbo for k, elbo in some.items()}, DRAWS)
    for group in ("model", "guide"):
        one, many = rows(compared, group).values()
        assert (one["particles"], many["particles"]) == (1, 16)
        assert many["gradient_variance"] == pytest.approx(one["gradient_variance"] / 16, rel=0.5)
        assert many["snr"] == pytest.approx(4 * one["snr"], rel=0.25)


def test_without_signal_the_snr_is_the_floor():
    """At q = p(z | x) the guide's gradient is only noise."""
    model, guide = references.linear_gaussian(width=20, dim=1)
    references.set_to_posterior(model, guide)
    x = torch.randn(4, 20, dtype=torch.float64)
    compared = pv.compare_elbos(model, guide, x, {"trace": Trace_ELBO()}, 200)
    # There are few independent directions, so the floor is only approximate.
    assert 0.2 < rows(compared, "guide")["trace"]["snr"] / compared.snr_floor < 2.5
    assert compared.snr_floor == pytest.approx(
        torch.randn(200, 100_000).mean(0).abs().mean().item(), rel=0.02
    )


class LearnedPrior(PyroModule):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.3, -0.5]))
        self.norm = nn.BatchNorm1d(3)
        self.decoder = nn.Sequential(nn.Linear(2, 3), pv.Gaussian(1.0))
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0).to_event(1))
            self.steps.add_(1)
            pyro.sample("x", self.decoder(z + self.steps + 0 * self.norm(x)[:, :2]), obs=x)


def test_the_snr_is_infinite_without_noise_and_none_without_gradient():
    model, guide = LearnedPrior(), pv.Guide(nn.Sequential(nn.Linear(3, 4), pv.DiagNormal()))
    groups = {"prior": [model.mean], "all": model, "unused": [model.unused]}
    estimators = {"trace": Trace_ELBO(), "mean-field": TraceMeanField_ELBO()}
    compared = pv.compare_elbos(model, guide, torch.randn(6, 3), estimators, 20, groups=groups)
    prior = rows(compared, "prior")
    assert prior["mean-field"]["snr"] == math.inf
    assert prior["mean-field"]["gradient_variance"] == pytest.approx(0, abs=1e-12)
    assert math.isfinite(prior["trace"]["snr"])
    assert math.isfinite(rows(compared, "all")["mean-field"]["snr"])  # the average leaves out the prior
    assert rows(compared, "unused")["trace"]["snr"] is None
    assert "inf" in str(compared)


def test_nothing_is_changed():
    model, guide = LearnedPrior(), pv.Guide(nn.Sequential(nn.Linear(3, 4), pv.DiagNormal()))
    x = torch.randn(6, 3)
    Trace_ELBO().differentiable_loss(model, guide, x).backward()
    model.decoder[0].bias.grad = None
    pyro.clear_param_store()
    both = nn.ModuleList([model, guide])
    states = {name: value.clone() for name, value in both.state_dict().items()}
    gradients = {
        name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in both.named_parameters()
    }
    modes, random = [m.training for m in both.modules()], torch.get_rng_state()
    estimators = {"trace": Trace_ELBO(), "graph": TraceGraph_ELBO()}
    target = {"trace": Trace_ELBO().differentiable_loss}

    def assert_unchanged():
        assert torch.equal(torch.get_rng_state(), random)
        assert [m.training for m in both.modules()] == modes
        for name, value in both.state_dict().items():
            assert torch.equal(value, states[name]), name
        for name, p in both.named_parameters():
            gradient, value = gradients[name]
            assert p.grad is gradient
            assert gradient is None or torch.equal(gradient, value)
        assert not pyro.get_param_store().keys()

    compared = pv.compare_elbos(model, guide, x, estimators, 3, targets=target)
    assert_unchanged()
    # Each draw starts from the same buffers. Otherwise the second estimator would see other `steps`.
    trace, graph = rows(compared, "guide").values()
    assert trace["value"] == pytest.approx(graph["value"], rel=1e-5)
    with pytest.raises(ValueError, match=r"targets\['trace'\]: expected the function to return"):
        pv.compare_elbos(model, guide, x, estimators, 3, targets={"trace": lambda *_: 1.0})
    assert_unchanged()
    with pytest.raises(ValueError, match="Estimator 'nan'"):
        pv.compare_elbos(model, guide, x, {**estimators, "nan": Times(math.nan)}, 3)
    assert_unchanged()


def test_estimators_share_their_noise_which_the_seed_sets(case):
    model, guide, x = case
    estimators = {"a": Trace_ELBO(), "b": Trace_ELBO(), "graph": TraceGraph_ELBO()}

    def numbers(seed):
        records = pv.compare_elbos(model, guide, x, estimators, 5, seed=seed).records
        times = ("estimator", "ms", "snr_per_root_second")
        return [[value for field, value in r.items() if field not in times] for r in records]

    first = numbers(1)
    assert first[:2] == first[2:4]  # a and b, for model and guide
    assert first[4][1] == pytest.approx(first[0][1])  # "graph" is another estimator with the same noise
    assert numbers(1) == first
    assert numbers(2) != first


def test_a_compiled_elbo_and_its_plain_one_agree(case):
    model, guide, x = case
    compiled = pv.CompiledELBO(TraceMeanField_ELBO(), backend="eager")
    estimators = {"plain": TraceMeanField_ELBO(), "compiled": compiled}
    plain, graph = rows(pv.compare_elbos(model, guide, x, estimators, 4), "guide").values()
    assert graph["value"] == pytest.approx(plain["value"])
    assert graph["gradient_variance"] == pytest.approx(plain["gradient_variance"])


class Shared(nn.Module):
    """Model and guide as two methods of one module."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 3), pv.Gaussian(1.0))
        self.encoder = nn.Sequential(nn.Linear(3, 4), pv.DiagNormal())
        self.prior = pv.StandardNormal(2)

    model, guide = pv.Model.forward, pv.Guide.forward


def test_parameters_are_grouped_by_model_guide_and_shared():
    vae, x = Shared(), torch.randn(4, 3)
    (r,) = pv.compare_elbos(vae.model, vae.guide, x, {"trace": Trace_ELBO()}, 2).records
    assert r["group"] == "shared"
    groups = {"decoder": vae.decoder, "encoder": vae.encoder.parameters()}
    parts = pv.compare_elbos(vae.model, vae.guide, x, {"trace": Trace_ELBO()}, 2, groups=groups)
    assert [part["group"] for part in parts.records] == ["decoder", "encoder"]
    assert sum(part["gradient_variance"] for part in parts.records) == pytest.approx(r["gradient_variance"])


def test_values_of_a_subsampled_plate_are_per_data_point_of_its_full_size():
    class Subsampled(pv.Model):
        def forward(self, x):
            with pyro.plate("data", 80, subsample_size=len(x)):
                return pyro.sample("x", self.decoder(pyro.sample("z", self.prior())), obs=x)

    class SubsampledGuide(pv.Guide):
        def forward(self, x):
            with pyro.plate("data", 80, subsample_size=len(x)):
                return pyro.sample("z", self.encoder(x))

    model, guide = references.linear_gaussian()
    x = torch.randn(8, 5, dtype=torch.float64)
    references.set_to_posterior(model, guide, 1.3)
    tenth = Subsampled(model.prior, model.decoder), SubsampledGuide(guide.encoder)
    whole, tenth = (pv.compare_elbos(*pair, x, {"a": Trace_ELBO()}, 100) for pair in ((model, guide), tenth))
    assert (whole.num_data, tenth.num_data) == (8, 80)
    a, b = whole.records[0], tenth.records[0]
    assert b["value"] == pytest.approx(a["value"], abs=4 * (a["value_error"] + b["value_error"]))
    for field in ("value_sd", "gradient_variance"):  # not 10 or 100 times as large
        assert b[field] == pytest.approx(a[field], rel=0.4)


def test_the_comparison_prints_and_its_records_can_be_saved_and_plotted(case):
    model, guide, x = case
    estimators = {"a": Trace_ELBO(), "bb": TraceMeanField_ELBO()}
    compared = pv.compare_elbos(model, guide, x, estimators, 3)
    shown = str(compared)
    assert "8 data, 3 draws of each" in shown
    assert "gap" not in shown  # evidence was not given
    assert max(map(len, shown.splitlines())) <= 100
    full = pv.compare_elbos(model, guide, x, estimators, 3, evidence=-7, targets={"a": exact})
    assert "gap to log p(x)" in str(full)
    assert "relative bias" in str(full)
    json.dumps(full.records, allow_nan=False)
    for records in (compared.records, full.records):
        assert len(records) == 4
        assert isinstance(pv.plots.elbo_comparison(records), matplotlib.figure.Figure)


def test_the_figure_shows_the_numbers_of_the_records():
    record = {"estimator": "a", "particles": 2, "value": -3.0, "value_error": 0.1, "gap": 0.5, "ms": 4.0}
    records = [
        {**record, "group": "model", "snr": 0.25, "snr_per_root_second": 8.0},
        {**record, "group": "guide", "snr": math.inf, "snr_per_root_second": None},
    ]
    figure = pv.plots.elbo_comparison(records)
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [["0.5"], ["4"], ["0.25"], ["8"], ["inf"], ["none"]]
    assert [bar.get_width() for axes in figure.axes for bar in axes.patches] == [0.5, 4, 0.25, 8, 0, 0]
    assert figure.axes[0].get_yticklabels()[0].get_text() == "a, k = 2"
    with pytest.raises(ValueError, match="records: expected at least one, got none"):
        pv.plots.elbo_comparison([])


def test_signal_over_particles_draws_the_mean_and_range_of_several_seeds():
    seeds = [
        {"estimator": "Trace", "particles": k, "group": "guide", "snr": snr * k}
        for k in (1, 4)
        for snr in (0.1, 0.2, 0.6)
    ]
    axes = pv.plots.signal_over_particles({"early": seeds}).axes[0]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [pytest.approx([0.3, 1.2])]
    (band,) = axes.collections
    assert sorted(band.get_paths()[0].vertices[:, 1].round(6))[:1] == [0.1]
    assert max(band.get_paths()[0].vertices[:, 1]) == pytest.approx(2.4)


def test_signal_over_particles_draws_one_line_per_estimator():
    early = [
        {"estimator": name, "particles": k, "group": group, "snr": snr * k}
        for name, snr in (("a", 1.0), ("b", 3.0))
        for k in (5, 1)
        for group in ("model", "guide")
    ]
    late = [{**record, "snr": None if record["particles"] == 5 else 2.0} for record in early]
    figure = pv.plots.signal_over_particles({"early": early, "late": late}, floor=0.08)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{group} gradient: {stage}" for group in ("model", "guide") for stage in ("early", "late")
    ]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["a"] == [[1, 1], [5, 5]]
    assert lines["b"] == [[1, 3], [5, 15]]
    assert [point[1] for point in lines["shown by noise alone"]] == [0.08, 0.08]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="stages: early: expected at least one, got none"):
        pv.plots.signal_over_particles({"early": []})


RECORD = {
    "estimator": "a",
    "particles": 2,
    "group": "model",
    "value": -3.0,
    "value_error": 0.1,
    "gap": 0.5,
    "ms": 4.0,
    "snr": 0.25,
    "snr_per_root_second": 8.0,
}
NO_RECORDS = {
    "None": (None, "expected a list of records, got None"),
    "a generator": (iter([RECORD]), "expected a list of records, got list_iterator"),
    "a record": (RECORD, "expected a list of records, got dict"),
    "a comparison": (
        pv.Comparison([RECORD], 3, 8, None),
        "expected dicts, got list",
    ),
    "texts": (["a"], "expected dicts, got 'a'"),
    "no key": (
        [{"estimator": "a", "particles": 2, "snr": 1.0}],
        "expected dicts with group.*got one without",
    ),
    "no name": ([{**RECORD, "estimator": 3}], "estimator: expected strings, got 3"),
    "half a particle": (
        [{**RECORD, "particles": 2.5}],
        "particles: expected positive whole numbers below 1e9, got 2.5",
    ),
    "a text": ([{**RECORD, "snr": "1"}], "snr: expected numbers or None, got '1'"),
    "a tensor": (
        [{**RECORD, "snr": torch.tensor(1.0)}],
        "snr: expected numbers or None, got a tensor of shape",
    ),
    "too large": ([{**RECORD, "snr": 1e308}], "snr: expected numbers or None, got 1e.308"),
}


@pytest.mark.parametrize(("records", "message"), NO_RECORDS.values(), ids=NO_RECORDS.keys())
def test_figures_refuse_what_are_no_records(records, message):
    with pytest.raises(ValueError, match=f"^records: (?:.*: )?{message}.*To fix: "):
        pv.plots.elbo_comparison(records)
    with pytest.raises(ValueError, match=f"^stages: early: (?:.*: )?{message}.*To fix: "):
        pv.plots.signal_over_particles({"early": records})


def test_figures_refuse_records_that_do_not_belong_together():
    with pytest.raises(ValueError, match="value_error: expected 0 or more, got .-1.0"):
        pv.plots.elbo_comparison([{**RECORD, "value_error": -1.0}])
    with pytest.raises(
        ValueError, match="group guide: expected the estimators .*'b, k = 2'.*got .*'a, k = 2'"
    ):
        pv.plots.elbo_comparison([{**RECORD, "estimator": "b"}, {**RECORD, "group": "guide"}])
    for ratio in (None, 0.0, -1.0, math.nan, math.inf):  # nothing for a logarithmic axis
        with pytest.raises(ValueError, match="stages: expected a ratio above 0 in group model, got none"):
            pv.plots.signal_over_particles({"early": [{**RECORD, "snr": ratio}]})
    for stages in (None, [RECORD], {1: [RECORD]}, {}):
        with pytest.raises(ValueError, match="^stages: expected .*To fix: pass a dict"):
            pv.plots.signal_over_particles(stages)
    for floor in (None, "0", True, -1.0, math.inf):
        with pytest.raises(ValueError, match="^floor: expected a number, 0 or more"):
            pv.plots.signal_over_particles({"early": [RECORD]}, floor=floor)


def test_figures_draw_names_as_they_are():
    odd = {**RECORD, "estimator": "$\\bad{$", "group": "$\\bad{$"}  # no formula of matplotlib
    hidden = {**odd, "estimator": "_b"}  # which matplotlib would leave out of a legend
    signal = pv.plots.signal_over_particles({"$\\bad{$": [odd, hidden]})
    for figure in (pv.plots.elbo_comparison([odd, hidden]), signal):
        figure.savefig(io.BytesIO(), dpi=40)  # a formula with a mistake raises here
    assert [text.get_text() for text in signal.legends[0].get_texts()] == ["$\\bad{$", "_b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimators": {}}, "estimators: expected a dict, name -> Pyro ELBO, got {}"),
        ({"estimators": Trace_ELBO()}, "estimators: expected a dict, .*, got pyro.Trace_ELBO"),
        (
            {"estimators": {"a": Trace_ELBO}},
            "Estimator 'a': loss: expected a Pyro ELBO.*, got <class '.*Trace_ELBO'>",
        ),
        ({"estimators": {"jit": JitTrace_ELBO()}}, "Estimator 'jit': .*got JitTrace_ELBO: .*without Jit"),
        ({"batch": torch.randn(8, 4).double()}, "Estimator 'trace': Site 'x' of the model"),
        ({"batch": {"x": 1}}, "batch: expected a tensor, or a tuple or list .*, got dict"),
        ({"num_draws": 1}, "num_draws: expected a whole number of at least 2, got 1"),
        ({"num_draws": 2.5}, "num_draws: expected a whole number of at least 2, got 2.5"),
        ({"seed": -1}, "seed: expected a whole number .*, got -1"),
        ({"evidence": math.nan}, "evidence: expected a finite number .*, got nan"),
        ({"evidence": "-7"}, "evidence: expected a finite number .*, got '-7'"),
        ({"evidence": torch.zeros(8)}, "evidence: expected a finite number .*, got a tensor"),
        (
            {"targets": {"tracer": exact}},
            r"targets: expected names of the estimators, \['trace'\], got 'tracer'",
        ),
        ({"targets": {"trace": Trace_ELBO()}}, r"got Trace_ELBO\..* pass its method differentiable_loss"),
        ({"targets": {"trace": 3.0}}, r"targets\['trace'\]: expected a function .*, got float"),
        ({"targets": {"trace": lambda *_: torch.zeros(())}}, "to return a finite differentiable tensor"),
        ({"groups": {}}, "groups: expected a dict, name -> module or parameters, got {}"),
        ({"groups": {"none": []}}, r"groups\['none'\]: expected trainable .*, got none"),
        (
            {"groups": {"other": nn.Linear(2, 2)}},
            r"groups\['other'\]: expected trainable .*, got other parameters too",
        ),
        ({"groups": {"number": 3}}, r"groups\['number'\]: expected trainable .*, got none"),
    ],
)
def test_bad_input_says_what_is_expected(change, message, case):
    model, guide, x = case
    arguments = {"batch": x, "estimators": {"trace": Trace_ELBO()}, "num_draws": 2}
    with pytest.raises(ValueError, match=message):
        pv.compare_elbos(model, guide, **{**arguments, **change})


SCRIPT = Path(__file__).parents[2] / "examples" / "compare_elbos.py"


@pytest.mark.parametrize(
    "pair",
    [
        "two-layers",
        *(pytest.param(name, marks=pytest.mark.proofs) for name in ("linear-gaussian", "bernoulli")),
    ],
)
def test_the_example_compares_trains_and_writes_its_record_and_figure(
    pair, few, monkeypatch, tmp_path, capsys
):
    seeds = 2 if pair == "linear-gaussian" else 1
    options = (
        f"--pair {pair} --seeds {seeds} --stages 1 2 3 --seconds 0.02 --train-particles 1 2 --particles 1 3"
    )
    options += f" --draws 2 --compared-data 4 --test-data 10 --num-samples 2 --hidden-dim 8 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert f"{pair}, seed {seeds - 1}, late, after 3 steps" in capsys.readouterr().out
    record = json.loads((tmp_path / f"{pair}.json").read_text())
    assert record["command"] == f"python examples/compare_elbos.py {options}"
    several = {"RenyiELBO(0)", "IWAE", "DReG"}
    names = {"Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO", "MeanField", "STL"}
    # The guide of two layers draws z1 first, where a closed form of KL(q(z1) || p(z1 | z2)) would be wrong.
    assert record["refused"].keys() == ({"TraceMeanField_ELBO"} if pair == "two-layers" else set())
    names -= record["refused"].keys()
    expected = {(name, 1) for name in names} | {(name, 2) for name in names | several}
    assert {(r["estimator"], r["particles"]) for r in record["training"]} == expected
    assert len(record["comparison"]) == seeds * 3 * 2 * len(expected)  # seeds, stages, groups
    for stage in ("early", "mid", "late"):
        for seed in range(seeds):
            rows = {
                (r["estimator"], r["particles"]): (r["value"], r["snr"])
                for r in record["comparison"]
                if (r["stage"], r["group"], r["seed"]) == (stage, "guide", seed)
            }
            # STL and DReG change the gradient alone, and Pyro's bound is that of IWAE.
            for name, of in (("STL", "Trace_ELBO"), ("DReG", "IWAE"), ("RenyiELBO(0)", "IWAE")):
                assert rows[name, 3][0] == pytest.approx(rows[of, 3][0], rel=1e-3)
            assert rows["STL", 3][1] != rows["Trace_ELBO", 3][1]
    biases = [r["bias"] for r in record["comparison"]]
    assert all(bias is not None for bias in biases) == (pair == "linear-gaussian")
    assert (tmp_path / "signal.png").read_bytes().startswith(b"\x89PNG")
