"""What the run of examples/autoencoder.py found: means over seeds, with their standard errors."""

from statistics import fmean, stdev

from _records import table

SIZES = {2: "2 latents", 20: "20 latents"}
SOURCES = ["z from N(0, I)", "z from a fitted Gaussian", "z of test images"]
NEW = ["real", *(f"{model}, {source}" for source in SOURCES for model in ("autoencoder", "VAE"))]
TERMS = {"reconstruction": "log p(x given code)", "elbo": "ELBO", "log_evidence": "log p(x) >="}


def autoencoder(record: dict) -> dict[str, str]:
    """Return the table of new images, that of the terms in nats, and the run."""
    new = []
    for of in NEW:
        row = {"images": "other test images" if of == "real" else of}
        for number, title in (("frechet", "distance"), ("entropy", "entropy")):
            row |= {f"{title}, {size}": cell(record, latent, of, number) for latent, size in SIZES.items()}
        new.append(row)
    terms = [
        {"model": model, "latents": latent, "spread of codes": cell(record, latent, model, "spread")}
        | {title: cell(record, latent, model, number) for number, title in TERMS.items()}
        for latent in SIZES
        for model in ("autoencoder", "VAE")
    ]
    about = (
        f"MNIST, {record['protocol']}, {record['epochs']} epochs, {record['hidden_dim']} hidden units, "
        f"{record['seeds']} seeds from {record['seed']} on; log p(x) of {record['images']:,} test images by "
        f"{record['num_samples']} importance samples. The classifier reads {record['accuracy']:.1%} of the "
        "test digits rightly."
    )
    return {
        "autoencoder_new": "\n".join(table(new)),
        "autoencoder_terms": "\n".join(table(terms)),
        "autoencoder_run": f"```sh\n{record['command']}\n```\n\n{about}",
    }


def values(record: dict, latent: int, of: str, number: str) -> list[float]:
    """Return a number of each seed; none where there is no such number."""
    rows = [row for row in record["rows"] if (row["latent_dim"], row["of"]) == (latent, of)]
    return [row[number] for row in rows if number in row]


def cell(record: dict, latent: int, of: str, number: str) -> str:
    """Return the mean over seeds, ± its standard error."""
    found = values(record, latent, of, number)
    return f"{fmean(found):.2f} ± {stdev(found) / len(found) ** 0.5:.2f}" if found else "none"
