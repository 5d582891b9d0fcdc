"""The data sets, the protocols for their pixels, and batches."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch.distributions import Normal
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from pyro_vae import data, data_sets
from pyro_vae.data import (
    Batches,
    DynamicBinarisation,
    Grey,
    GreyLevels,
    Images,
    StaticBinarisation,
    ThresholdBinarisation,
    UniformDequantisation,
    load,
    observe,
)
from pyro_vae.data_sets import MNIST

PROTOCOLS = [
    Grey(),
    GreyLevels(2),
    GreyLevels(8),
    GreyLevels(256),
    ThresholdBinarisation(),
    StaticBinarisation(),
    StaticBinarisation(seed=1),
    DynamicBinarisation(),
    UniformDequantisation(),
]
EVERY_PIXEL = torch.arange(256, dtype=torch.uint8).reshape(32, 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with MNIST extracted; no test may change it."""
    folder = tmp_path_factory.mktemp("data")
    load(root=folder)
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", refuse)


def write_idx(file, values):
    """Write a tensor of bytes in the format of MNIST's files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    file.write_bytes(header + values.numpy().tobytes())


def write_data_set(raw, *, images=5, labels=5, prefixes=("train", "t10k")):
    """Write images with pixel [n, i, j] = 100 n + 10 i + j and labels 1, 2, ...; shape (4, 3)."""
    n, i, j = torch.meshgrid(torch.arange(images), *map(torch.arange, (4, 3)), indexing="ij")
    for prefix in prefixes:
        write_idx(raw / f"{prefix}-images-idx3-ubyte", (40 * n + 10 * i + j).to(torch.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", torch.arange(1, labels + 1).to(torch.uint8))


# MNIST


@pytest.mark.parametrize(
    ("train", "histogram", "total"),
    [
        (True, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], 1_567_298_545),
        (False, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], 264_923_200),
    ],
)
def test_mnist_is_complete(root, train, histogram, total):
    images = load("mnist", train=train, root=root)
    assert images.pixels.shape == (sum(histogram), 784)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.dtype == torch.int64
    assert torch.bincount(images.labels).tolist() == histogram
    assert images.pixels.sum() == total
    assert (images.name, images.shape, images.classes[7]) == ("mnist", (28, 28), "7 - seven")


def test_mnist_files_are_the_original_ones(root):
    files = {file.name: calculate_md5(file) for file in (root / "MNIST" / "raw").iterdir()}
    assert files == {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }


def test_mnist_is_torchvisions(root):
    ours, theirs = MNIST(root, train=False), datasets.MNIST(root, train=False)
    assert torch.equal(ours.data, theirs.data)
    assert torch.equal(ours.targets, theirs.targets)
    image, label = ours[0]
    assert (image.size, label) == ((28, 28), 7)


def test_mnist_leaves_nothing_else_behind(tmp_path):
    package = Path(data.__file__).parent / "mnist"

    def state():
        files = [file for file in package.iterdir() if file.name != "__pycache__"]
        return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}

    before = state()
    load(train=False, root=tmp_path)
    assert state() == before
    assert [path.name for path in (tmp_path / "MNIST").iterdir()] == ["raw"]


def test_mnist_is_extracted_into_the_users_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(data.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    load(train=False)
    assert (tmp_path / "pyro_vae" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file()


@pytest.mark.proofs
def test_two_processes_extract_at_once(tmp_path):
    program = (
        "import sys; from pyro_vae.data import load; print('ready', flush=True)\n"
        "print(load(root=sys.argv[1]).pixels.sum().item())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    path = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path) as other:
        assert other.stdout.readline() == "ready\n"
        assert load(root=tmp_path).pixels.sum() == 1_567_298_545
        assert other.stdout.read() == "1567298545\n"
    assert other.returncode == 0
    assert [path.name for path in (tmp_path / "MNIST").iterdir()] == ["raw"]


def test_what_a_killed_extraction_leaves_is_removed_later(tmp_path, monkeypatch):
    program = (
        "import os, sys; from pyro_vae import data_sets; from pyro_vae.data import load\n"
        "data_sets.extract_archive = lambda *_: os.kill(os.getpid(), 9)\n"
        "load(root=sys.argv[1])"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, env=path)
    (left,) = (tmp_path / "MNIST").glob(".extracting-*")
    assert len(load(train=False, root=tmp_path).pixels) == 10_000
    assert left.exists()  # it might be that of a process that is still at it
    os.utime(left, (0, 0))
    load(train=False, root=tmp_path)
    assert [path.name for path in (tmp_path / "MNIST").iterdir()] == ["raw"]


def test_another_process_extracts_between_two_files(tmp_path, monkeypatch):
    """This process goes on, whatever the other one has done."""
    extract = data_sets.extract_archive

    def interrupted(*args):
        with monkeypatch.context() as inner:
            inner.setattr(data_sets, "extract_archive", extract)
            raw = tmp_path / "MNIST" / "raw"
            assert len(load(train=False, root=tmp_path).pixels) == 10_000
            assert all(calculate_md5(raw / name) == md5 for name, md5 in MNIST.extracted.items())
        return extract(*args)

    monkeypatch.setattr(data_sets, "extract_archive", interrupted)
    assert len(load(train=False, root=tmp_path).pixels) == 10_000


@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_damaged_extracted_file_is_an_error(root, tmp_path, part):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "MNIST" / "raw" / f"t10k-{part}-ubyte"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    expected, found = MNIST.extracted[file.name], calculate_md5(file)
    with pytest.raises(
        ValueError, match=f"{file.name}: expected MD5 {expected}, got {found}.*damaged.*delete"
    ):
        load(train=False, root=tmp_path)
    assert len(load(train=True, root=tmp_path).pixels) == 60_000  # the other part is not affected
    file.unlink()  # as the message says
    assert len(load(train=False, root=tmp_path).pixels) == 10_000


def test_former_cache_of_torchvision_is_not_trusted(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "MNIST" / "processed").mkdir()
    for part in ("training.pt", "test.pt"):
        wrong = (torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3))
        torch.save(wrong, tmp_path / "MNIST" / "processed" / part)
    assert len(load(train=False, root=tmp_path).pixels) == 10_000


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_archive_is_an_error(tmp_path, monkeypatch, damage):
    archives = tmp_path / "archives"
    shutil.copytree(MNIST.archives, archives)
    monkeypatch.setattr(MNIST, "archives", archives)
    file = archives / "t10k-labels-idx1-ubyte.xz"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:1000])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.xz: expected MD5.*damaged.*reinstall"):
        load(root=tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_unwritable_root_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"MNIST: expected a folder.*file.MNIST.raw, got .*root="):
        load(root=tmp_path / "file")


def test_interrupted_extraction_leaves_no_half_file(tmp_path, monkeypatch):
    def fill_the_disk(archive, folder):
        (Path(folder) / archive.stem).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr(data_sets, "extract_archive", fill_the_disk)
        with pytest.raises(ValueError, match=r"MNIST: expected a folder.*got .*no space left.*root="):
            load(root=tmp_path)
    assert len(load(root=tmp_path).pixels) == 60_000


# The other data sets, from small local files


@pytest.mark.parametrize(
    ("name", "folder", "prefixes"),
    [
        ("fashion-mnist", "FashionMNIST", ("train", "t10k")),
        ("kmnist", "KMNIST", ("train", "t10k")),
        ("emnist", "EMNIST", ("emnist-balanced-train", "emnist-balanced-test")),
        ("emnist-letters", "EMNIST", ("emnist-letters-train", "emnist-letters-test")),
    ],
)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.usefixtures("offline")
def test_local_files_load(tmp_path, name, folder, prefixes, train):
    write_data_set(tmp_path / folder / "raw", prefixes=prefixes)
    images = load(name, train=train, root=tmp_path)
    upright = 40 * torch.arange(5)[:, None, None] + torch.tensor(
        [[0, 10, 20, 30], [1, 11, 21, 31], [2, 12, 22, 32]]
    )
    if folder != "EMNIST":  # whose files alone hold the images transposed
        upright = upright.mT
    assert images.shape == tuple(upright.shape[1:])
    assert torch.equal(images.pixels, upright.flatten(1).to(torch.uint8))
    assert images.labels.tolist() == [1, 2, 3, 4, 5]
    assert images.name == name
    if name == "emnist-letters":
        assert images.classes[images.labels[0]] == "a"


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist", "emnist-digits"])
@pytest.mark.usefixtures("offline")
def test_failing_download_is_an_error(tmp_path, name):
    folder = {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}.get(name, "EMNIST")
    expected = f"{name}: expected the files of {folder} in .*{folder}.raw.*got .*no network.*connect.*put"
    with pytest.raises(ValueError, match=expected) as error:
        load(name, root=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert isinstance(error.value.__cause__, (URLError, RuntimeError))


@pytest.mark.parametrize("size", [0, 3, 9, 16, 40])
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
@pytest.mark.usefixtures("offline")
def test_truncated_file_is_an_error(tmp_path, part, size):
    raw = tmp_path / "KMNIST" / "raw"
    write_data_set(raw, labels=40, images=40)
    file = raw / f"train-{part}-ubyte"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"kmnist: expected the files of KMNIST in .*KMNIST.raw.*delete"):
        load("kmnist", root=tmp_path)


@pytest.mark.usefixtures("offline")
def test_other_number_of_labels_is_an_error(tmp_path):
    write_data_set(tmp_path / "FashionMNIST" / "raw", images=5, labels=4)
    with pytest.raises(ValueError, match="got 5 images and 4 labels"):
        load("fashion-mnist", root=tmp_path)


def test_unknown_name_is_an_error():
    with pytest.raises(
        ValueError, match=r"got 'cifar'. To fix: choose one of mnist, fashion-mnist, .*emnist-letters"
    ):
        load("cifar")


@pytest.mark.parametrize("train", ["test", "False", 0, None])
def test_a_split_that_is_no_bool_is_an_error(train):
    """A text that is not empty would count as True, which is the training set."""
    with pytest.raises(ValueError, match=f"train: expected True or False, got {train!r}. To fix: False is"):
        load(train=train)


# Protocols


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_every_protocol_observes_floats_in_the_unit_interval(protocol):
    stored = protocol.store(EVERY_PIXEL)
    x = protocol.read(stored)
    assert (stored.dtype, stored.shape) == (torch.uint8, EVERY_PIXEL.shape)
    assert (x.dtype, x.shape) == (torch.float32, EVERY_PIXEL.shape)
    reach = 1 / 256 if isinstance(protocol, UniformDequantisation) else 0  # from both ends
    assert 0 <= x.min() == x[0, 0] <= reach
    assert 1 - reach <= x.max() == x[-1, -1] <= 1


def test_names_of_protocols_are_unique():
    assert len({str(protocol) for protocol in PROTOCOLS}) == len(PROTOCOLS)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
@pytest.mark.parametrize(
    ("pixels", "given"),
    [
        (torch.rand(3, 4), r"torch.float32 of shape \(3, 4\).*flatten"),
        (torch.ones(3, 4, dtype=torch.int64), "torch.int64.*flatten"),
        (torch.ones(4, dtype=torch.uint8), r"shape \(4,\).*flatten"),
        (torch.ones(3, 2, 2, dtype=torch.uint8), r"shape \(3, 2, 2\). To fix: make a row of each image"),
        (torch.ones(0, 4, dtype=torch.uint8), r"shape \(0, 4\). To fix: add images"),
    ],
)
def test_other_pixels_are_errors(protocol, pixels, given):
    for look in (protocol.store, protocol.read):
        with pytest.raises(ValueError, match=f"expected a uint8 tensor.*got .*{given}"):
            look(pixels)


def test_grey_is_the_pixel_over_255():
    x = Grey().read(Grey().store(EVERY_PIXEL))
    torch.testing.assert_close(x.flatten(), torch.arange(256) / 255, rtol=0, atol=0)


@pytest.mark.parametrize("levels", [2, 3, 8, 255, 256])
def test_grey_levels(levels):
    x = GreyLevels(levels).read(GreyLevels(levels).store(EVERY_PIXEL)).flatten().tolist()
    k = [pixel * levels // 256 for pixel in range(256)]
    assert x == pytest.approx([level / (levels - 1) for level in k], rel=1e-6)
    assert len(set(x)) == levels


@pytest.mark.parametrize("levels", [1, 0, -8, 257, 8.0, "8"])
def test_impossible_numbers_of_levels_are_errors(levels):
    with pytest.raises(ValueError, match=f"a whole number from 2 to 256, got {levels!r}"):
        GreyLevels(levels)


def test_threshold_is_at_128():
    protocol = ThresholdBinarisation()
    x = protocol.read(protocol.store(EVERY_PIXEL)).flatten()
    assert x.tolist() == [0.0] * 128 + [1.0] * 128


def test_static_binarisation_is_one_draw():
    pixels = EVERY_PIXEL.repeat(4, 1)
    state = torch.get_rng_state()
    stored = StaticBinarisation(seed=3).store(pixels)
    x = StaticBinarisation(seed=3).read(stored)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, StaticBinarisation(seed=3).read(stored))
    assert torch.equal(stored, StaticBinarisation(seed=3).store(pixels))
    assert not torch.equal(stored, StaticBinarisation(seed=4).store(pixels))


@pytest.mark.parametrize("draws", ["static", "dynamic"])
def test_bernoulli_probabilities_are_exact(draws):
    """Within 5 sigma, 0.0025 at most, of 2**20 draws; u/256 for u/255 is off by up to 0.0039."""
    torch.manual_seed(0)
    protocol = {"static": StaticBinarisation(), "dynamic": DynamicBinarisation()}[draws]
    n = 2**20
    for pixel in (0, 1, 77, 128, 250, 254, 255):
        x = protocol.read(protocol.store(torch.full((n // 1024, 1024), pixel, dtype=torch.uint8)))
        p = pixel / 255
        assert abs(x.double().mean().item() - p) <= 5 * (p * (1 - p) / n) ** 0.5


def test_dequantised_pixels_are_uniform_in_their_bin():
    torch.manual_seed(0)
    n = 2**16
    for pixel in (0, 77, 255):
        x = UniformDequantisation().read(torch.full((n // 1024, 1024), pixel, dtype=torch.uint8)).double()
        u = 256 * x - pixel
        assert 0 <= u.min() < u.max() <= 1
        assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
        assert abs(u.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5  # Var(u^2) = 1/5 - 1/9


@pytest.mark.parametrize("mass", [torch.full((256,), 1 / 256), torch.linspace(0, 3, 256).softmax(0)])
def test_the_bound_of_a_density_that_is_constant_in_each_bin_is_its_log_mass(mass):
    """At every draw; the flat density, p(x) = 1, has the log mass -D log 256."""
    x = UniformDequantisation().read(EVERY_PIXEL)
    log_p = (256 * mass[(256 * x).long()]).log()
    log_mass = mass.log()[EVERY_PIXEL.long()].sum(-1)
    torch.testing.assert_close(log_p.sum(-1) - 8 * math.log(256), log_mass)


def test_a_dequantised_density_bounds_the_log_mass_of_the_levels():
    """E_u[log p(x)] - D log 256 against the integrals of the density over the bins."""
    torch.manual_seed(0)
    n, pixels = 2000, torch.tensor([[0, 30, 200, 255]], dtype=torch.uint8)
    x = UniformDequantisation().read(pixels.repeat(n, 1)).double()
    left = pixels[0].double() / 256
    for sigma, tightness in ((1.0, 1e-5), (0.02, 0.02)):  # a flat density and one that changes within a bin
        p = Normal(torch.tensor(0.4, dtype=torch.double), sigma)
        values = (p.log_prob(x) - math.log(256)).sum(-1)
        step = (torch.arange(1000, dtype=torch.double) + 0.5) / 1000 / 256
        mass = p.log_prob(left[:, None] + step).logsumexp(-1) - math.log(1000 * 256)
        error = 5 * values.std() / n**0.5
        gap = mass.sum() - values.mean()
        assert -error < gap < tightness * abs(mass.sum()) + error


def test_uniform_bytes_are_uniform_and_never_255():
    """Each value within 5 sigma; if the redrawn 3% lacked a value, it would be off by 7.7."""
    generator = torch.Generator().manual_seed(0)
    u = data._uniform_bytes(torch.empty(4001, 4001, dtype=torch.uint8), generator)
    counts = torch.bincount(u.flatten(), minlength=256)
    assert counts[255] == 0
    expected = u.numel() / 255
    assert (counts[:255] - expected).abs().max() < 5 * expected**0.5


def test_dynamic_binarisation_draws_again_from_the_given_generator():
    protocol, pixels = DynamicBinarisation(), EVERY_PIXEL.repeat(4, 1)
    torch.manual_seed(0)
    first, second = protocol.read(pixels), protocol.read(pixels)
    torch.manual_seed(0)
    again = protocol.read(pixels)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    state = torch.get_rng_state()
    own = [protocol.read(pixels, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*own)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 3), (2, 784)])
def test_dynamic_binarisation_of_any_shape(shape):
    for pixel in (0, 255):
        pixels = torch.full(shape, pixel, dtype=torch.uint8)
        assert torch.equal(DynamicBinarisation().read(pixels), pixels / 255)


# Reading


def numbered(n):
    """Make n images of two pixels; the first pixel is the number of the image."""
    return torch.stack([torch.arange(n), torch.arange(n) % 7], dim=1).to(torch.uint8)


def epoch(batches):
    return (torch.cat(list(batches)) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("n", "size", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 9, [3])])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_contain_every_image_once(n, size, sizes, shuffle):
    batches = Batches(numbered(n), Grey(), size, shuffle=shuffle)
    assert [len(x) for x in batches] == sizes
    assert len(batches) == len(sizes)
    seen = epoch(batches)
    assert torch.equal(seen[seen[:, 0].argsort()], numbered(n))


def test_batches_shuffle_every_epoch_reproducibly():
    batches = Batches(numbered(200), Grey(), 64)
    torch.manual_seed(0)
    first, second = epoch(batches), epoch(batches)
    torch.manual_seed(0)
    again = epoch(batches)
    assert not torch.equal(first, second)
    assert not torch.equal(first, numbered(200))
    assert torch.equal(first, again)


def test_batches_in_order():
    batches = Batches(numbered(200), Grey(), 64, shuffle=False)
    assert torch.equal(epoch(batches), numbered(200))


@pytest.mark.parametrize(
    ("protocol", "fixed"),
    [
        (Grey(), True),
        (StaticBinarisation(), True),
        (DynamicBinarisation(), False),
        (UniformDequantisation(), False),
    ],
    ids=str,
)
def test_batches_draw_again_where_the_protocol_does(protocol, fixed):
    pixels = torch.full((20, 50), 128, dtype=torch.uint8)
    batches = Batches(pixels, protocol, 8, shuffle=False)
    assert torch.equal(torch.cat(list(batches)), torch.cat(list(batches))) == fixed


def test_batches_of_images_are_on_the_device():
    images = Images(numbered(10), torch.zeros(10, dtype=torch.int64), "numbers", (1, 2))
    assert torch.equal(epoch(Batches(images, Grey(), 4, shuffle=False)), numbered(10))
    assert Batches(images, Grey(), 4, device="meta").dataset.device.type == "meta"


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_impossible_batch_sizes_are_errors(size):
    with pytest.raises(ValueError, match=f"batch_size: expected a positive whole number, got {size}"):
        Batches(numbered(10), Grey(), size)


def test_batches_of_nothing_are_errors():
    with pytest.raises(ValueError, match="N >= 1"):
        Batches(numbered(0), Grey(), 4)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_observe_is_the_same_every_time(protocol):
    pixels = EVERY_PIXEL.repeat(4, 1)
    state = torch.get_rng_state()
    x = observe(pixels, protocol, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, observe(pixels, protocol, seed=2))
    assert torch.equal(x, observe(Images(pixels, torch.zeros(128), "pixels"), protocol, seed=2))
    assert x.dtype == torch.float32


def test_observe_depends_on_the_seed():
    pixels = EVERY_PIXEL.repeat(4, 1)
    first, second = (observe(pixels, DynamicBinarisation(), seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_smaller_last_batch_can_be_left_out():
    pixels = torch.arange(10, dtype=torch.uint8)[:, None].expand(10, 3)
    for size, last in ((4, 2), (5, 5), (11, 10)):
        whole = Batches(pixels, Grey(), size)
        assert [len(x) for x in whole][-1] == last
        dropping = Batches(pixels, Grey(), size, drop_last=True)
        assert [len(x) for x in dropping] == [size] * (10 // size)
        assert len(dropping) == 10 // size


@pytest.mark.parametrize("option", ["shuffle", "drop_last"])
def test_a_switch_is_a_bool(option):
    with pytest.raises(ValueError, match=f"{option}: expected True or False, got 'no'"):
        Batches(torch.zeros(4, 3, dtype=torch.uint8), Grey(), 2, **{option: "no"})


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_x_has_torch_s_default_dtype(protocol):
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    single = observe(pixels, protocol)
    torch.set_default_dtype(torch.float64)
    try:
        double = observe(pixels, protocol)
        assert next(iter(Batches(pixels, protocol, 4))).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-7, atol=0)
    if protocol == Grey():
        assert torch.equal(double, pixels.double() / 255)
