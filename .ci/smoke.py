"""Import the installed package, train for a moment, save, load, evaluate and draw.

    python -I .ci/smoke.py

It needs no compiler and some seconds.
"""

import math
import tempfile
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv


def pair() -> tuple[pv.Model, pv.Guide]:
    """Return a small model and its guide."""
    decoder = nn.Sequential(pv.MLP(8, 64, 784), pv.Bernoulli())
    encoder = nn.Sequential(pv.MLP(784, 64, 2 * 8), pv.DiagNormal())
    return pv.Model(pv.StandardNormal(8), decoder), pv.Guide(encoder)


def train(folder: Path, epochs: int) -> tuple[pv.Model, pv.Guide, list[pv.Epoch]]:
    """Train on 2,000 digits, from the checkpoint in the folder if there is one."""
    torch.manual_seed(0)
    protocol = pv.data.DynamicBinarisation()
    batches = pv.data.Batches(pv.data.load(root=folder).pixels[:2000], protocol, batch_size=100)
    model, guide = pair()
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=3e-3, fused=True)
    elbo = pv.CompiledELBO(TraceMeanField_ELBO(), backend="eager")  # replayed, without a compiler
    svi = pv.SVI(model, guide, optimizer, loss=elbo)
    checkpoint = pv.Checkpoint(folder / "last.pt", resume=True)
    for epoch in pv.fit(svi, batches, epochs, checkpoint=checkpoint):
        print(epoch)
    return model, guide, checkpoint.epochs


def main() -> None:
    """Check that training goes down, goes on, and leaves a pair that can be used."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, epochs=1)
        model, guide, epochs = train(folder, epochs=3)
        assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
        assert epochs[-1].loss < epochs[0].loss

        x = pv.data.observe(pv.data.load(train=False, root=folder).pixels[:100], pv.data.StaticBinarisation())
        log_p = pv.log_evidence(model, guide, x, num_samples=50).mean().item()
        assert math.isfinite(log_p)
        assert log_p < 0

        torch.save({"model": model.state_dict()}, folder / "weights.pt")
        loaded, _ = pair()
        loaded.load_state_dict(torch.load(folder / "weights.pt", weights_only=True)["model"])
        z = torch.randn(4, 8)
        assert torch.equal(loaded.decoder(z).mean, model.decoder(z).mean)
        pv.plots.images(pv.generate(loaded, 20)["x"].mean).savefig(folder / "samples.png")
        assert (folder / "samples.png").stat().st_size
    print(f"Trained, resumed, saved and drew: log p(x) at least {log_p:.1f} nats per data point.")


if __name__ == "__main__":
    main()
