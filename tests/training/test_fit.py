import io
import math
import subprocess
import sys

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from registry import data, pair
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv


def make(**options):
    model, guide = pair(**options)
    return pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())


def fit(svi, batches, epochs, **options):
    return list(pv.fit(svi, batches, epochs, progress=False, **options))


def test_an_epoch_records_loss_elbo_and_time():
    svi, x = make(), data(size=300)
    records = fit(svi, x.split(100), 30)
    assert [record.epoch for record in records] == list(range(1, 31))
    assert records[-1].loss < records[0].loss
    assert records[-1].elbo > records[0].elbo
    for record in records:
        assert record.elbo == pytest.approx(record.reconstruction - record.kl, rel=1e-5)
        assert record.seconds > 0
        assert "nats per data point" in str(record)
    # The loss and the ELBO differ only by noise and by one epoch of training.
    assert records[-1].loss == pytest.approx(-records[-1].elbo, abs=0.3)


def test_the_loss_is_a_mean_over_data_not_over_batches():
    """The two batches have 5 and 1 data points."""
    svi, x = make(), data(size=6)
    svi.optimizer.param_groups[0]["lr"] = 0.0
    torch.manual_seed(1)
    total = svi.step(x[:5]) + svi.step(x[5:])
    torch.manual_seed(1)
    (record,) = fit(svi, [x[:5], x[5:]], 1)
    assert record.loss == pytest.approx(total / 6)


def test_the_loss_of_a_subsampled_plate_is_divided_by_its_full_size():
    class Whole(torch.nn.Module):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, x):
            with pyro.poutine.scale(scale=1.0), pyro.plate("data", 600, subsample_size=len(x)):
                return self.program(x)

    model, guide = pair()

    def joint(x):
        z = pyro.sample("z", model.prior())
        pyro.sample("x", model.decoder(z), obs=x)

    whole_model = Whole(joint)
    whole_model.decoder = model.decoder
    whole_guide = Whole(lambda x: pyro.sample("z", guide.encoder(x)))
    whole_guide.encoder = guide.encoder
    svi = pv.SVI(whole_model, whole_guide, pyro.optim.SGD({"lr": 0.0}), loss=Trace_ELBO())
    (record,) = fit(svi, data(size=600).split(100), 1)
    assert record.loss == pytest.approx(-record.elbo, abs=0.3)


def test_evaluation_does_not_disturb_training():
    x = data(size=40)
    losses = []
    for watch in (None, x[:3]):
        torch.manual_seed(0)
        svi = make()
        losses.append([record.loss for record in fit(svi, x.split(10), 3, watch=watch)])
    torch.manual_seed(0)
    svi = make()
    bare = [sum(svi.step(batch) for batch in x.split(10)) / 40 for _ in range(3)]
    assert losses[0] == losses[1] == bare


def test_the_elbo_of_the_watched_data_has_the_same_noise_in_each_epoch():
    svi, x = make(), data(size=40)
    svi.optimizer.param_groups[0]["lr"] = 0.0
    first, second = fit(svi, x.split(10), 2)
    assert first.elbo == second.elbo
    assert first.loss != second.loss


def test_batches_to_watch_are_refused():
    batches = pv.data.Batches(torch.zeros(4, 6, dtype=torch.uint8), pv.data.Grey(), 2)
    with pytest.raises(ValueError, match="watch: expected one batch.*got Batches.*pyro_vae.data.observe"):
        fit(make(), batches, 1, watch=batches)


def test_only_the_first_thousand_data_points_are_watched():
    """In whole batches: 4 of 300."""
    svi, x = make(), data(size=1500)
    svi.optimizer.param_groups[0]["lr"] = 0.0

    def elbo(x):
        (record,) = fit(svi, x.split(300), 1)
        return record.elbo

    late, early = x.clone(), x.clone()
    late[1200] = 1 - x[1200]
    early[1199] = 1 - x[1199]
    assert elbo(late) == elbo(x)
    assert elbo(early) != elbo(x)


def test_break_stops_the_training():
    svi, x = make(), data()
    for record in pv.fit(svi, [x], 100, progress=False):
        if record.epoch == 2:
            break
    assert svi.optimizer.state[svi.optimizer.param_groups[0]["params"][0]]["step"] == 2


def test_a_data_loader_and_tuples_are_batches():
    x = data(size=32)
    loader = DataLoader(TensorDataset(x), batch_size=8)
    assert len(fit(make(), loader, 2)) == 2
    assert len(fit(make(), [(x,)], 2)) == 2


def test_a_scheduler_steps_with_every_update():
    svi, x = make(), data(size=40)
    scheduler = torch.optim.lr_scheduler.StepLR(svi.optimizer, 1, gamma=0.5)
    fit(svi, x.split(10), 2, scheduler=scheduler)
    assert svi.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Notebook(io.StringIO):
    """It looks like the stream of a notebook, which is no terminal."""

    __module__ = "ipykernel.iostream"


@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_the_progress_bar_shows_on_standard_error_only(capsys, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    list(pv.fit(make(), [data()], 2))
    assert "epoch 2/2" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_log_files_have_no_control_characters(tmp_path):
    """In a process of its own, with a warning, as a user who sends both streams to files."""
    script = tmp_path / "train.py"
    script.write_text(
        "import pyro, pyro.distributions as dist, torch\n"
        "import pyro_vae as pv\n"
        "from pyro.infer import Trace_ELBO\n"
        "from torch import nn\n"
        "encoder = nn.Sequential(pv.MLP(6, 4, 4), pv.DiagNormal())\n"
        "decoder = nn.Sequential(pv.MLP(2, 4, 6), nn.Sigmoid(), pv.Bernoulli())  # warns of squashed logits\n"
        "model, guide = pv.Model(pv.StandardNormal(2), decoder), pv.Guide(encoder)\n"
        "svi = pv.SVI(model, guide, pyro.optim.Adam({'lr': 1e-3}), Trace_ELBO())\n"
        "for epoch in pv.fit(svi, [torch.ones(8, 6)] * 3, 2):\n"
        "    print(epoch)\n"
    )
    files = tmp_path / "out", tmp_path / "err"
    with files[0].open("w") as out, files[1].open("w") as err:
        subprocess.run([sys.executable, script], stdout=out, stderr=err, check=True)
    printed, warned = (file.read_bytes().decode() for file in files)
    assert printed.startswith("epoch   1 ")
    assert "UserWarning" in warned
    assert "it/s" not in warned
    assert not [c for c in printed + warned if ord(c) < 32 and c != "\n"]


class Once:
    """It can be iterated many times, but has batches only in the first."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        batches, self.batches = self.batches, []
        return iter(batches)


@pytest.mark.parametrize(
    ("batches", "epochs", "message"),
    [
        (lambda x: iter([x]), 2, "would be empty in its second epoch"),
        (lambda x: (b for b in [x]), 2, "would be empty in its second epoch"),
        (lambda x: Once([x]), 2, "batches: expected at least one batch.*got none in epoch 2"),
        (lambda x: [], 1, "batches: expected at least one batch.*got none in epoch 1"),
        (lambda x: x, 1, r"one tensor.*x\.split"),
        (lambda x: 3, 1, "batches: expected an iterable of batches, got int"),
        (lambda x: [x], 0, "epochs: expected a positive whole number, got 0"),
        (lambda x: [x], 1.5, "epochs: expected a positive whole number, got 1.5"),
    ],
)
def test_wrong_batches_or_epochs_are_refused(batches, epochs, message):
    with pytest.raises(ValueError, match=message):
        fit(make(), batches(data()), epochs)


def test_a_batch_that_does_not_fit_is_refused_before_training():
    svi, x = make(), data()
    before = [p.clone() for p in pv.parameters(svi.model, svi.guide)]
    with pytest.raises(ValueError, match="'x' of the model, Bernoulli"):
        fit(svi, [x + 2, x], 1)
    assert all(map(torch.equal, before, pv.parameters(svi.model, svi.guide)))


def test_an_iterator_is_enough_for_one_epoch():
    (record,) = fit(make(), iter([data()]), 1)
    assert math.isfinite(record.loss)


def test_wrong_arguments_are_refused_when_fit_is_called():
    """The error comes from the call of fit, not from the first iteration."""
    svi = make()
    with pytest.raises(ValueError, match="epochs"):
        pv.fit(svi, [data()], 0)
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(svi.model.parameters(), lr=1.0), 1)
    with pytest.raises(ValueError, match=r"svi\.optimizer"):
        pv.fit(svi, [data()], 1, scheduler=other)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(svi.optimizer)
    with pytest.raises(ValueError, match="got ReduceLROnPlateau"):
        pv.fit(svi, [data()], 1, scheduler=plateau)


def test_a_loader_may_use_its_memory_again():
    """The data whose ELBO is reported are those of the first pass, not what is in their memory later."""

    parts = data(size=12).split(4)

    class OneBuffer:
        def __iter__(self):
            batch = torch.empty(4, 6)
            for x in parts:
                yield batch.copy_(x)

    found = []
    for batches in (OneBuffer(), parts):
        torch.manual_seed(0)
        model, guide = pair()
        svi = pv.SVI(model, guide, torch.optim.Adam(pv.parameters(model, guide)), loss=Trace_ELBO())
        found.append([tuple(epoch)[:-1] for epoch in pv.fit(svi, batches, 2, progress=False)])
    assert found[0] == found[1]
