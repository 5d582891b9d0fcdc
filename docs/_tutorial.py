"""The tutorial, run once in the build: what its code prints and what its figures show comes from that run."""

import contextlib
import functools
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse
from torch.distributions import kl_divergence

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = Path(__file__).parent / "_build" / "tutorial"
PART = re.compile(
    r"^```python\n(?P<code>.*?)^```\n|^!\[[^\]]*\]\(_build/tutorial/(?P<figure>\w+)\.png\)",
    re.MULTILINE | re.DOTALL,
)
Names = dict[str, Any]


def put_outputs(_: "Sphinx", name: str, source: list[str]) -> None:
    """Put what the code of the tutorial prints under it, when Sphinx reads the page."""
    if name == "tutorial":
        source[0], names = run(source[0], FOLDER)
        check(names)


def run(page: str, folder: Path) -> tuple[str, Names]:
    """Run the code of a page from top to bottom, and draw each figure when its place is reached.

    Returns:
        The page, with the output of each block of code under it, and the names that the code has defined.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: Names = {"__name__": "tutorial"}

    def result(part: re.Match[str]) -> str:
        if part["figure"] in FIGURES:
            figure = FIGURES[part["figure"]](names)
            figure.savefig(folder / f"{part['figure']}.png", dpi=150, bbox_inches="tight")
        if not part["code"]:
            return part[0]
        lines_before = "\n" * page[: part.start("code")].count("\n")  # so that an error names the line
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(lines_before + part["code"], "tutorial.md", "exec"), names)
        output = printed.getvalue()
        return f"{part[0]}\n```text\n{output}```\n" if output else part[0]

    with torch.random.fork_rng(), contextlib.chdir(folder):
        return PART.sub(result, page), names


@torch.no_grad()
def check(names: Names) -> None:
    """Raise where the run does not show what the text says of it."""
    history, kinds, on_grid = names["history"], names["kinds"], names["on_grid"]
    gap = torch.stack([on_grid(image)[2] for image in names["few"]]).mean()
    aggregate = names["guide"](names["x"])
    averaged_model, averaged_guide = names["pair"]
    averaged_kl = kl_divergence(averaged_guide.encoder(names["x"]), averaged_model.prior()).mean()
    sse = {
        name: torch.cdist(images, names["every_spot"]).min(1).values.square()
        for name, images in names["new"].items()
    }
    vae, plain, fitted = (sse[name] for name in ("VAE", "autoencoder", "autoencoder, fitted"))
    radius = names["z"].norm(dim=1)
    noise = {r["estimator"]: r["value_sd"] for r in names["compared"].records if r["group"] == "guide"}
    log_p = {name: sum(on_grid(image)[0] for image in images) for name, images in kinds.items()}
    claims = {
        "the KL has risen from nearly 0": names["step_2"] < 0.1 < 3 < history[-1].kl,
        "the reconstruction has gained far more": history[-1].reconstruction > 50 + names["log_p_x_z"].mean(),
        "the gap is small after training": bool(0 < gap < 1),
        "the value of Trace_ELBO is quieter": noise["Trace_ELBO"] < noise["TraceMeanField_ELBO"],
        "the posteriors together nearly fill the prior": bool(
            (aggregate.mean(0).abs() < 0.25).all() and ((aggregate.std(0) - 1).abs() < 0.25).all()
        ),
        "a mean over pixels collapses": bool(averaged_kl < 0.01),
        "new images of the VAE are better": bool(2 * vae.median() < plain.median())
        and bool(2 * vae.mean() < plain.mean()),
        "fitted codes help most of the images": bool(2 * fitted.median() < plain.median()),
        "the worst images come from the rim": bool(
            sse["VAE"][radius > 2.5].mean() > 3 * sse["VAE"][radius < 2].mean()
        ),
        "one spot is the likeliest": log_p["one spot"] > max(log_p["two spots"], log_p["no spot"]),
    }
    for claim, holds in claims.items():
        if not holds:
            raise AssertionError(f"tutorial.md says: {claim}. The run shows otherwise.")


# The figures.


def latent_axes(axes: Axes, z: torch.Tensor, place: torch.Tensor, title: str, reach: float = 3.5) -> None:
    """Draw points of the latent plane, coloured by the place of the spot, over the circles of the prior."""
    colours = torch.cat([place, torch.full_like(place[:, :1], 0.6)], 1)
    across, up = z.T.tolist()
    axes.scatter(across, up, c=colours.tolist(), s=5, lw=0)
    for radius in (1, 2):
        axes.add_patch(Circle((0, 0), radius, fill=False, color="grey", lw=1.5, zorder=3))
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_ellipses(axes: Axes, mu: list[float], sigma: list[float], **style: Any) -> None:
    """Draw a factorised Gaussian in the plane at one and two standard deviations."""
    for radius in (1, 2):
        width, height = (2 * radius * side for side in sigma)
        axes.add_patch(Ellipse((mu[0], mu[1]), width, height, fill=False, zorder=4, **style))


@torch.no_grad()
def latent_figure(names: Names, title: str) -> Figure:
    """Draw the prior, the aggregate posterior and the posterior of the first image."""
    q = names["guide"].encoder(names["x"])
    torch.manual_seed(0)
    figure = Figure(figsize=(4.6, 4.6))
    axes = figure.subplots()
    latent_axes(axes, q.sample(), names["place"], title)
    draw_ellipses(axes, q.mean[0].tolist(), q.stddev[0].tolist(), color="black", lw=1.5)
    return figure


@torch.no_grad()
def posterior_figure(names: Names) -> Figure:
    """Draw q(z | x) of the first image over its true posterior."""
    model, image = names["model"], names["x"][0]
    q = names["guide"].encoder(image)
    mu, sigma = q.mean, q.stddev
    reach = 4 * float(sigma.max())
    steps = torch.linspace(-reach, reach, 121)
    across, up = mu[0] + steps, mu[1] + steps
    z = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1)
    log_joint = model.prior().log_prob(z) + model.decoder(z).log_prob(image)
    density = (log_joint - log_joint.max()).exp()
    figure = Figure(figsize=(4.6, 4.2))
    axes = figure.subplots()
    # A Gaussian has these values at 2, 1 and 0 standard deviations, relative to its top.
    levels = [math.exp(-2), math.exp(-0.5), 1.0]
    axes.contourf(across, up, density, levels=levels, colors=["#c6dbef", "#6baed6"])
    draw_ellipses(axes, mu.tolist(), sigma.tolist(), color="black", lw=1.5)
    axes.set(aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
    axes.set_title("blue: $p(z \\mid x)$;  black: $q(z \\mid x)$", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def kl_figure(names: Names) -> Figure:
    """Draw a KL divergence as an area, and the two parts of the KL of one latent."""
    t, q, p = names["t"], names["q_1"], names["p_1"]
    q_t, p_t = q.log_prob(t).exp(), p.log_prob(t).exp()
    integrand = q_t * (q.log_prob(t) - p.log_prob(t))
    figure = Figure(figsize=(10, 3.4), layout="tight")
    left, right = figure.subplots(1, 2)
    left.plot(t, q_t, label="$q = N(1, 0.5^2)$")
    left.plot(t, p_t, label="$p = N(0, 1)$")
    left.plot(t, integrand, color="C3", lw=1)
    left.fill_between(t, integrand, color="C3", alpha=0.25, lw=0, label=r"$q \log \frac{q}{p}$")
    left.axhline(0, color="k", lw=0.8)
    left.set(xlim=(-3, 3.5), xlabel="$z$")
    grid = torch.linspace(-2.5, 2.5, 301)
    right.plot(grid, grid.square() / 2, label=r"$\frac{1}{2} \mu_i^2$ over $\mu_i$")
    sigma = torch.linspace(0.03, 2.5, 301)
    by_sigma = (sigma.square() - 1 - 2 * sigma.log()) / 2
    label = r"$\frac{1}{2} [\sigma_i^2 - 1 - \log \sigma_i^2]$ over $\sigma_i$"
    right.plot(sigma, by_sigma, label=label)
    right.set(xlabel=r"$\mu_i$ or $\sigma_i$", ylabel="nats", ylim=(-0.1, 4.5))
    right.axhline(0, color="k", lw=0.8)
    for axes in (left, right):
        axes.legend(frameon=False, loc="upper left" if axes is left else "upper right")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@torch.no_grad()
def codes_figure(names: Names) -> Figure:
    """Draw draws of the VAE's latents and the codes of the autoencoder, over the circles of the prior."""
    torch.manual_seed(0)
    z, codes = names["guide"].encoder(names["x"]).sample(), names["codes"]
    figure = Figure(figsize=(9.4, 4.6), layout="tight")
    left, right = figure.subplots(1, 2)
    reach = max(3.5, 1.05 * float(codes.abs().max()))
    latent_axes(left, z, names["place"], "VAE: aggregate posterior", reach)
    latent_axes(right, codes, names["place"], "autoencoder: codes", reach)
    return figure


FIGURES: dict[str, Callable[[Names], Figure]] = {
    "before": functools.partial(latent_figure, title="before training"),
    "kl": kl_figure,
    "after": functools.partial(latent_figure, title="after training"),
    "posterior": posterior_figure,
    "codes": codes_figure,
}
