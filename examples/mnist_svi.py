"""Train a variational autoencoder on MNIST by SVI; write its numbers, weights and pictures.

    python examples/mnist_svi.py
    python examples/mnist_svi.py --likelihood categorical --elbo trace --latent-dim 2
    python examples/mnist_svi.py --compiled --bfloat16

The model, the guide, the objective and the loop are four objects: swap one, and only it changes.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv

# name: (p(x | z), what it observes of a pixel, whether log p(x) is of a mass or a density)
LIKELIHOODS = {
    "bernoulli": (pv.Bernoulli(), pv.data.DynamicBinarisation(), "mass"),
    "gaussian": (pv.Gaussian(0.1), pv.data.Grey(), "density"),
    "gaussian-learned": (pv.Gaussian(pv.LearnedSigma()), pv.data.Grey(), "density"),
    "continuous-bernoulli": (pv.ContinuousBernoulli(), pv.data.Grey(), "density"),
    "categorical": (pv.Categorical(8), pv.data.GreyLevels(8), "mass"),
    "discretized-logistic": (pv.DiscretizedLogistic(256), pv.data.GreyLevels(256), "mass"),
}
ELBOS = {"trace": Trace_ELBO(), "mean-field": TraceMeanField_ELBO()}


def main(options: argparse.Namespace) -> None:
    """Train, evaluate and draw."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)  # late in training, denormal numbers would slow a step
    if options.threads:
        torch.set_num_threads(options.threads)
    likelihood, protocol, kind = LIKELIHOODS[options.likelihood]
    elbo = pv.CompiledELBO(ELBOS[options.elbo]) if options.compiled else ELBOS[options.elbo]
    device, hidden, latent = options.device, options.hidden_dim, options.latent_dim

    train = pv.data.load(options.dataset, train=True, root=options.data_root)
    test = pv.data.load(options.dataset, train=False, root=options.data_root)
    batches = pv.data.Batches(train, protocol, options.batch_size, device=device)
    x_test = pv.data.observe(test, protocol).to(device)
    width = x_test.shape[1]

    decoder = pv.MLP(latent, hidden, hidden, likelihood.num_features(width), activation=nn.SiLU)
    encoder = pv.MLP(width, hidden, hidden, 2 * latent, activation=nn.SiLU)
    model = pv.Model(pv.StandardNormal(latent), nn.Sequential(decoder, likelihood)).to(device)
    guide = pv.Guide(nn.Sequential(encoder, pv.DiagNormal())).to(device)
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=elbo)

    print(f"{options.dataset}, {protocol}; {options.likelihood} likelihood, {options.elbo} ELBO")
    options.out.mkdir(parents=True, exist_ok=True)
    epochs = []
    with (options.out / "metrics.jsonl").open("w") as metrics:
        for epoch in pv.fit(svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler):
            print(epoch)
            print(json.dumps(epoch._asdict()), file=metrics, flush=True)
            epochs.append(epoch)

    terms = pv.elbo_terms(model, guide, x_test)
    evidence = pv.log_evidence(model, guide, x_test, options.num_samples, compiled=options.compiled)
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "data_root")}
    summary = {
        **asked,
        "protocol": str(protocol),
        "unit": f"nats a datum, log {kind}",
        "threads": torch.get_num_threads(),
        "log_sigma_bounds": getattr(likelihood, "bounds", None),
        "max_logit": getattr(likelihood, "max_logit", None),
        "test_elbo": terms.elbo.mean().item(),
        "test_reconstruction": terms.reconstruction.mean().item(),
        "test_kl": terms.kl.mean().item(),
        "test_log_evidence": evidence.mean().item(),
        "seconds": time.perf_counter() - start,
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, options.out / "weights.pt")
    print(
        f"test, {protocol}, log {kind} in nats a datum: ELBO {summary['test_elbo']:.2f}, log p(x) at "
        f"least {summary['test_log_evidence']:.2f} ({options.num_samples} importance samples)"
    )

    with torch.no_grad():
        few, z = x_test[:30], guide.encoder(x_test[:5000]).mean
        reconstructed = pv.reconstruct(model, guide, few)["x"].mean
        generated = pv.generate(model, x_test[:100])["x"].mean
        pictures = {
            "learning_curves": pv.plots.learning_curves(epochs),
            "reconstructions": pv.plots.reconstructions(few, reconstructed, test.shape),
            "samples": pv.plots.images(generated, test.shape, title="E[x | z], z from the prior"),
            "latent_plane": pv.plots.latent_plane(z, test.labels[:5000], test.classes),
        }
        if latent == 2:
            grid = pv.plots.latent_grid().to(device)
            pictures["manifold"] = pv.plots.manifold(model.decoder(grid).mean, test.shape)
    for name, figure in pictures.items():
        figure.savefig(options.out / f"{name}.png")
    print(f"{summary['seconds']:.0f} s; numbers, weights and pictures are in {options.out}")


def positive(text: str) -> int:
    """Read a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """Read a device that is there."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="bernoulli")
    parser.add_argument("--elbo", choices=ELBOS, default="mean-field")
    parser.add_argument("--latent-dim", type=positive, default=20)
    parser.add_argument("--hidden-dim", type=positive, default=400)
    parser.add_argument("--epochs", type=positive, default=14)
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--lr", type=float, default=3e-3, help="the peak of its one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--compiled", action="store_true", help="compile the steps: seconds, then faster")
    parser.add_argument("--bfloat16", action="store_true", help="reduced precision, by torch.autocast")
    parser.add_argument("--threads", type=positive, help="CPU threads; torch's default if not given")
    parser.add_argument("--dataset", default="mnist", help="or fashion-mnist, kmnist, emnist")
    parser.add_argument("--data-root", type=Path, help="holds the data set, or takes its download")
    parser.add_argument("--num-samples", type=positive, default=100, help="for log p(x)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_svi"))
    arguments = parser.parse_args()
    if not (0 < arguments.lr < 1 and 0 <= arguments.seed < 2**63):
        parser.error(f"expected 0 < lr < 1 and 0 <= seed < 2**63, got {arguments.lr} and {arguments.seed}")
    try:
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bfloat16):
            main(arguments)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
