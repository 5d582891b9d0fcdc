"""What the run of examples/likelihoods.py found."""

from _records import table, without

SQUARES, FIXED, LEARNED = (f"Gaussian, {kind}" for kind in ("mean of squares", "sigma 0.1", "learned sigma"))
PIXEL, LOGISTIC = "Gaussian, sigma by pixel", "discretised logistic, 256"
FEW, CATEGORICAL = "discretised logistic, 8", "categorical, 8"


def likelihoods(record: dict) -> dict[str, str]:
    """Return the conclusions and the table.

    Raises:
        ValueError: if the record does not show a conclusion.
    """
    rows = {row["likelihood"]: row for row in record["rows"]}
    bits = {name: row["bits per dimension"] for name, row in rows.items()}
    kl = rows[SQUARES]["KL"]
    claims = [
        (
            kl < 0.1,
            f"*A mean of squares collapses.* Its KL is {kl:.2f} nats per data point, and each of its images "
            "is the mean image. It is a Gaussian with a sigma of 19.8, under which no pixel matters.",
        ),
        (
            bits[PIXEL] < bits[LEARNED] < bits[FIXED],
            f"*One sigma for all pixels costs much*: {bits[FIXED]:.2f} bits per dimension with 0.1, and "
            f"{bits[LEARNED]:.2f} where it is learned. With a sigma by pixel it is {bits[PIXEL]:.2f}.",
        ),
        (
            bits[LOGISTIC] < min(bits[PIXEL], bits["continuous Bernoulli"]),
            f"*A mass on the levels is ahead of a density*: {bits[LOGISTIC]:.2f} bits by the "
            "discretised logistic. A density also has to describe the uniform noise within a level.",
        ),
        (
            bits[CATEGORICAL] < bits[FEW],
            f"*On eight levels* the categorical takes {bits[CATEGORICAL]:.3f} bits. The discretised "
            f"logistic, with two features for each pixel in place of eight, takes {bits[FEW]:.3f}.",
        ),
        (
            True,
            f"*The Bernoulli's* {bits['Bernoulli']:.3f} bits are of binary pixels. They compare with other "
            "models of binary pixels alone.",
        ),
    ]
    for holds, claim in claims:
        if not holds:
            raise ValueError(
                f"docs/results/likelihoods.json: expected that it shows this, got otherwise: {claim}"
            )
    about = (
        f"MNIST, {record['epochs']} epochs, seed {record['seed']}. The bound on log p(x) is of "
        f"{record['images']:,} test images, by {record['num_samples']} importance samples. Command: "
        f"`{record['command']}`."
    )
    shown = [without(row, "log of a", "seconds") for row in record["rows"]]
    return {
        "likelihoods_sentences": "\n".join(f"- {claim}" for _, claim in claims),
        "likelihoods_table": "\n".join([*table(shown), "", about]),
    }
