"""What the run of examples/likelihoods.py found."""

from _records import table, without

SQUARES, FIXED, LEARNED = (f"Gaussian, {kind}" for kind in ("mean of squares", "sigma 0.1", "learned sigma"))
PIXEL, CONTINUOUS, LOGISTIC = "Gaussian, sigma by pixel", "continuous Bernoulli", "discretised logistic, 256"
FEW, CATEGORICAL = "discretised logistic, 8", "categorical, 8"


def likelihoods(record: dict) -> dict[str, str]:
    """Return the conclusions and the table.

    Raises:
        ValueError: if the record does not show a conclusion.
    """
    rows = {row["likelihood"]: row for row in record["rows"]}
    bits = {name: row["bits per dimension"] for name, row in rows.items()}
    kl, active = rows[SQUARES]["KL"], rows[SQUARES]["active dimensions"]
    others = [row["active dimensions"] for name, row in rows.items() if name != SQUARES]
    claims = [
        (
            kl < 0.01 and active == 0 and min(others) > 0,
            f"*MSE + KL with a mean over pixels collapses.* It is a Gaussian with $\\sigma^2 = D / 2$, under "
            f"which no image is worth a nat of KL. Its KL is {kl:.2f} nats per data point, {active} of "
            f"{record['latent_dim']} dimensions are active, and each reconstruction is the mean image.",
        ),
        (
            bits[PIXEL] < bits[LEARNED] < bits[FIXED],
            f"*One sigma for all pixels costs much*: {bits[FIXED]:.2f} bits per dimension with 0.1, and "
            f"{bits[LEARNED]:.2f} where it is learned. With a sigma by pixel it is {bits[PIXEL]:.2f}.",
        ),
        (
            bits[LOGISTIC] < bits[PIXEL] < bits[CONTINUOUS],
            f"*A mass on 256 levels is ahead of the densities*: {bits[LOGISTIC]:.2f} bits by the "
            f"discretised logistic, and {bits[CONTINUOUS]:.2f} by the continuous Bernoulli. Black pixels are "
            "certain, and a density has to pay for them: [what it pays](#log-mass-and-log-density).",
        ),
        (
            bits[FEW] < bits[CATEGORICAL],
            f"*On eight levels*, the discretised logistic takes {bits[FEW]:.3f} bits, with two features for "
            f"each pixel. The categorical has eight, ignores the order of the levels, and takes "
            f"{bits[CATEGORICAL]:.3f}.",
        ),
        (
            rows["Bernoulli"]["levels"] == 2,
            f"*The Bernoulli's* {bits['Bernoulli']:.3f} bits are of binary pixels. Compare them only with "
            "those of other models of binary pixels.",
        ),
    ]
    for holds, claim in claims:
        if not holds:
            raise ValueError(
                f"docs/results/likelihoods.json: expected that it shows this, got otherwise: {claim}"
            )
    about = (
        f"MNIST, {record['epochs']} epochs, seed {record['seed']}. All numbers are of {record['images']:,} "
        "test images, and the active dimensions of the first 1,000. The bound on log p(x) is by "
        f"{record['num_samples']} importance samples. Command: `{record['command']}`."
    )
    first = ("likelihood", "protocol", "log of a", "levels", "bits per dimension")
    shown = [{name: row[name] for name in first} | without(row, *first, "seconds") for row in record["rows"]]
    shown = [without(row, "reconstruction") for row in shown]  # ELBO + KL
    return {
        "likelihoods_sentences": "\n".join(f"- {claim}" for _, claim in claims),
        "likelihoods_table": "\n".join([*table(shown), "", about]),
    }
