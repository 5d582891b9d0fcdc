"""What the run of examples/autoencoder.py found."""

from _records import table


def autoencoder(record: dict) -> dict[str, str]:
    """Return the table, with the error of each number behind it."""
    floor, *rows = record["rows"]
    shown = [cells(row) for row in rows]
    shown.append(dict.fromkeys(shown[0], "") | {"model": floor["model"]})
    shown[-1]["distance, z ~ N(0, I)"] = f"{floor['distance']:.2f}"
    about = (
        f"MNIST, {record['protocol']}, {record['epochs']} epochs, {record['seeds']} seeds. "
        f"The bound on log p(x), in nats per data point, is of {record['images']:,} test images, "
        f"by {record['num_samples']} importance samples. Command: `{record['command']}`."
    )
    return {"autoencoder_table": "\n".join([*table(shown), "", about])}


def cells(row: dict) -> dict[str, str]:
    """Return the numbers of a model as text."""
    names = ["reconstruction", "distance, z ~ N(0, I)", "distance, z ~ fitted", "log p(x) >="]
    numbers = {
        name: f"{row[name]:.2f} ± {row[f'{name}, error']:.2f}" if name in row else "none" for name in names
    }
    return {"model": row["model"], "latents": str(row["latents"])} | numbers
