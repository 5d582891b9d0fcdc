"""Train a VAE on MNIST by SVI; write its numbers, weights and pictures.

    python examples/mnist_svi.py
    python examples/mnist_svi.py --likelihood categorical --latent-dim 2
    python examples/mnist_svi.py --compiled --bfloat16

The model, the guide, the objective and the loop are four objects: swap one, and
only it changes.
"""

import argparse
import time
from pathlib import Path

import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
import results
from command_line import Parser, count, data_folder, learning_rate, run, threads

# name: (p(x | z), how a pixel becomes x, whether log p(x) is of a mass or a density)
LIKELIHOODS = {
    "bernoulli": (pv.Bernoulli(), pv.data.DynamicBinarisation(), "mass"),
    "gaussian": (pv.Gaussian(0.1), pv.data.Grey(), "density"),
    "gaussian-learned": (pv.Gaussian(pv.LearnedSigma()), pv.data.Grey(), "density"),
    "continuous-bernoulli": (pv.ContinuousBernoulli(), pv.data.Grey(), "density"),
    "categorical": (pv.Categorical(8), pv.data.GreyLevels(8), "mass"),
    "discretized-logistic": (pv.DiscretizedLogistic(256), pv.data.GreyLevels(256), "mass"),
}
# ELBO = E_q[log p(x | z)] - KL(q(z | x) || p(z)): the KL from one sample of z, or in closed form.
ELBOS = {"trace": Trace_ELBO(), "mean-field": TraceMeanField_ELBO()}
EMNIST = [f"emnist-{split}" for split in ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")]
DATA_SETS = ["mnist", "fashion-mnist", "kmnist", "emnist", *EMNIST]


def model_and_guide(likelihood: pv.Family, width: int, latent: int, hidden: int) -> tuple[pv.Model, pv.Guide]:
    """Return the model p(z) p(x | z) and the guide q(z | x)."""
    decoder = pv.MLP(latent, hidden, hidden, likelihood.num_features(width), activation=nn.SiLU)
    encoder = pv.MLP(width, hidden, hidden, 2 * latent, activation=nn.SiLU)
    prior = pv.StandardNormal(latent)  # p(z) = N(0, I)
    p_x = nn.Sequential(decoder, likelihood)  # p(x | z)
    q_z = nn.Sequential(encoder, pv.DiagNormal())  # q(z | x) = N(mu(x), diag(sigma(x)^2))
    return pv.Model(prior, p_x), pv.Guide(q_z)


def train_and_evaluate(options: argparse.Namespace) -> None:
    """Train, print the ELBO and its two terms, write and draw."""
    start = time.perf_counter()
    checkpoint = results.open_checkpoint(options, every=options.checkpoint_every)
    if results.is_finished(options, checkpoint):
        return
    likelihood, protocol, kind = LIKELIHOODS[options.likelihood]
    train = pv.data.load(options.dataset, train=True, root=options.data_root)
    test = pv.data.load(options.dataset, train=False, root=options.data_root)
    batches = pv.data.Batches(train, protocol, options.batch_size, device=options.device)
    x_test = pv.data.observe(test, protocol).to(options.device)

    model, guide = model_and_guide(likelihood, x_test.shape[1], options.latent_dim, options.hidden_dim)
    model, guide = model.to(options.device), guide.to(options.device)
    loss = pv.CompiledELBO(ELBOS[options.elbo]) if options.compiled else ELBOS[options.elbo]
    optimizer = torch.optim.Adam(pv.parameters(model, guide), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(batches))
    svi = pv.SVI(model, guide, optimizer, loss=loss)

    print(f"{options.dataset}, {protocol}; {options.likelihood} likelihood, {options.elbo} ELBO")
    epochs = pv.fit(
        svi, batches, options.epochs, watch=x_test[:1000], scheduler=scheduler, checkpoint=checkpoint
    )
    for epoch in epochs:
        print(epoch)
        results.write_metrics(options.out, checkpoint.epochs)

    elbo, reconstruction, kl = (term.mean().item() for term in pv.elbo_terms(model, guide, x_test))
    # log p(x) >= E[log 1/K sum_k p(x, z_k) / q(z_k | x)] >= ELBO
    log_p = pv.log_evidence(model, guide, x_test, options.num_samples, compiled=options.compiled)
    log_evidence, seconds = log_p.mean().item(), time.perf_counter() - start
    numbers = {
        "protocol": str(protocol),
        "unit": f"nats per data point, log {kind}",
        "threads": torch.get_num_threads(),
        "log_sigma_bounds": getattr(likelihood, "bounds", None),
        "max_logit": getattr(likelihood, "max_logit", None),
        "test_elbo": elbo,
        "test_reconstruction": reconstruction,
        "test_kl": kl,
        "test_log_evidence": log_evidence,
        "seconds": seconds,
    }
    results.save_weights(options.out, model, guide)
    results.print_test(numbers, options.num_samples)
    draw(options.out, model, guide, x_test, test, checkpoint.epochs)
    results.write_summary(options, numbers)  # the last: a run with a summary is finished
    print(f"{seconds:.0f} s; numbers, weights and pictures are in {options.out}")


@torch.no_grad()
def draw(
    out: Path, model: pv.Model, guide: pv.Guide, x_test: Tensor, test: pv.data.Images, epochs: list[pv.Epoch]
) -> None:
    """Draw the training, reconstructions and samples of x, and the latent plane."""
    z = guide.encoder(x_test[:5000]).mean  # E[z | x]
    reconstructed = pv.reconstruct(model, guide, x_test[:30])["x"].mean  # E[x | z], z ~ q(z | x)
    generated = pv.generate(model, x_test[:100])["x"].mean  # E[x | z], z ~ p(z)
    pictures = {
        "learning_curves": pv.plots.learning_curves(epochs),
        "reconstructions": pv.plots.reconstructions(x_test[:30], reconstructed, shape=test.shape),
        "samples": pv.plots.images(generated, shape=test.shape, title="E[x | z], z from the prior"),
        "latent_plane": pv.plots.latent_plane(z, test.labels[:5000], classes=test.classes),
    }
    if z.shape[1] == 2:
        grid = pv.plots.latent_grid().to(z.device)
        pictures["manifold"] = pv.plots.manifold(model.decoder(grid).mean, shape=test.shape)
    results.save_pictures(out, pictures)


def main(options: argparse.Namespace) -> None:
    """Train in the precision and on the CPU threads asked for."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.autocast(options.device.type, torch.bfloat16, enabled=options.bfloat16):
        train_and_evaluate(options)


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--likelihood", choices=LIKELIHOODS, default="bernoulli", help="p(x | z)")
    add("--elbo", choices=ELBOS, default="mean-field", help="how the KL is taken")
    add("--latent-dim", type=count, default=20, help="dimensions of z")
    add("--hidden-dim", type=count, default=400, help="units of a hidden layer")
    add("--epochs", type=count, default=14, help="passes over the data")
    add("--batch-size", type=count, default=128, help="images of a step")
    add("--lr", type=learning_rate, default=3e-3, help="the peak of its one-cycle schedule")
    add("--compiled", action="store_true", help="compile the steps: seconds, then faster")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--checkpoint-every", type=count, metavar="STEPS", help="between checkpoints (default: an epoch)")
    add("--bfloat16", action="store_true", help="reduced precision, by torch.autocast")
    add("--threads", type=threads, help="CPU threads (default: as many as torch takes)")
    add("--dataset", choices=DATA_SETS, default="mnist", help="the images")
    add("--data-root", type=data_folder, help="folder of the data set (default: a cache)")
    run(main, parser, num_samples=100, out="runs/mnist_svi")
