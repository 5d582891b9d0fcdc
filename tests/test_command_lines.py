"""The command lines of the examples: what is refused, in one line and with exit status 2, and Ctrl-C."""

import os
import pty
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from registry import each_once

import pyro_vae as pv

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = (EXAMPLES / "command_line.py").read_text()
SOURCES = {file.stem: file.read_text() for file in sorted(EXAMPLES.glob("*.py"))}
SOURCES = {script: source for script, source in SOURCES.items() if "__main__" in source}
# the smallest run of each script
TINY = {
    "mnist_svi": "--hidden-dim 8 --latent-dim 3 --epochs 1 --num-samples 2",
    "distributed": "--hidden-dim 8 --latent-dim 3 --epochs 1 --num-samples 2",
    "autoencoder": "--hidden-dim 8 --epochs 1 --seeds 1 --images 20 --num-samples 2",
    "likelihoods": "--hidden-dim 8 --latent-dim 3 --epochs 1 --images 20 --num-samples 2",
    "convolutional": "--channels 2 2 --latent-dim 3 --epochs 1 --images 20 --num-samples 2",
    "hierarchical": "--hidden-dim 8 --epochs 1 --num-samples 2",
    "missing": "--hidden-dim 8 --latent-dim 3 --particles 2 --epochs 1 --images 20 --num-samples 2",
    "mixture": "--hidden-dim 8 --latent-dim 3 --epochs 1 --plain-epochs 1 --num-samples 2",
    "posteriors": "--hidden-dim 8 --latent-dim 3 --epochs 1 --images 20 --num-samples 2 "
    "--gap-images 2 --steps 2",
    "priors": "--hidden-dim 8 --latent-dim 3 --epochs 1 --images 20 --num-samples 2 --components 5",
    "reproduce_iwae": "--hidden-dim 8 --epochs 1 --num-samples 2",
    "semi_supervised": "--hidden-dim 8 --latent-dim 3 --labels 50 --epochs 1 --num-samples 2",
    "compare_elbos": "--hidden-dim 8 --seconds 0.01 --draws 4 --compared-data 4 --test-data 10 "
    "--num-samples 2 --particles 1 2 --train-particles 1 --seeds 1 --stages 1 2 3",
}


def run(monkeypatch, script, *options):
    file = str(EXAMPLES / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [file, *map(str, options)])
    return runpy.run_path(file, run_name="__main__")


def shown(text):
    """The lines that stay on a terminal: the progress bar does not."""
    return [line for line in re.split(r"[\r\n]", text) if line.strip() and not line.startswith("epoch ")]


def refused(monkeypatch, capsys, script, *options, status=2):
    """The one line with which a script ends."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, script, *options)
    assert stop.value.code == status
    (line,) = shown(capsys.readouterr().err)
    assert line.startswith(f"{script}.py: ")
    return line


# type of an option -> what its message says, and values that it refuses
NUMBERS = ["", "x", "nan", "inf", "-inf", "-1", "1e400", "0x10", "1/2", "9" * 5000, str(10**30)]
BAD = {
    "count": ("expected a whole number from 1 to 1,000,000, got", [*NUMBERS, "0", "1.5", "1e3", "1000001"]),
    "several": ("expected a whole number from 2 to 1,000,000, got", [*NUMBERS, "0", "1", "2.0"]),
    "positive": ("expected a number from 1e-06 to 1,000,000.0, got", [*NUMBERS, "0", "1e-320", "1e308"]),
    "learning_rate": ("expected a number from 1e-09 to 1, got", [*NUMBERS, "0", "1.1", "-0.1"]),
    "share": ("expected a number from 0 to 0.99, got", [*NUMBERS, "1", "0.991", "1e9"]),
    "seed": ("expected a whole number from 0 to 9,223,372,036,854,775,807, got", [*NUMBERS, str(2**70)]),
    "threads": ("expected a whole number from 1 to ", [*NUMBERS, "0", str(10**9)]),
    "device": ("expected a device that can train, got", ["tpu9", "cuda:99", "meta", "sparse", "vulkan", ""]),
    "folder": ("expected a folder that can be written, got", ["", "/dev/null", "a\0b", "a\nb", "x" * 300]),
}
BAD["data_folder"] = BAD["folder"]
BAD["existing_file"] = ("expected a file, got", ["", "/dev/null", "a\0b", "x" * 300])


def typed_options(script):
    """The options of a script, those shared by all among them, each with its type."""
    return re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)", type=(\w+)', SOURCES[script] + SHARED)


OPTIONS = [(script, *option) for script in SOURCES for option in typed_options(script)]


@pytest.mark.parametrize(("script", "option", "kind"), OPTIONS)
def test_a_bad_value_is_refused_before_the_data_are_read(script, option, kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pv.data, "load", None)
    monkeypatch.chdir(tmp_path)
    says, values = BAD[kind]
    for value in values:
        given = [f"{option}={value}"]
        if option in ("--channels", "--stages"):  # which take two and three
            given = [option, *["2"] * (1 + (option == "--stages")), value]
            if value.startswith("-"):
                continue  # argparse takes it for an option
        line = refused(monkeypatch, capsys, script, *given)
        assert line.startswith(f"{script}.py: error: argument {option}: {says}")
        assert repr(value) in line or len(value) > 1000
        assert len(line) < 1100
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SOURCES)
def test_every_option_is_checked_and_explained(script):
    assert {"--seed", "--num-samples", "--device", "--out"} <= {o for name, o, _ in OPTIONS if name == script}
    for option in re.findall(r"add_argument\((.*?)\)\n", SOURCES[script], re.DOTALL):
        assert re.search(r"type=(?!int|float|str|Path)|choices=|store_true", option)
        assert "help=" in option


@pytest.mark.parametrize("script", SOURCES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("'--two\nlines'", "unrecognized arguments: --two lines"),
        ("stray", "unrecognized arguments: stray"),
        ("--num-sam 5", "unrecognized arguments: --num-sam 5"),  # no abbreviations
        ("--seed", "argument --seed: expected one argument"),
        ("--seed=--", "argument --seed: expected a value, got '--'. To fix: write one."),
        ("--seed 1 --seed=2", "argument --seed: expected it once, got it twice. To fix: leave one out."),
    ],
)
def test_a_line_that_cannot_be_read_is_refused(script, options, message, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, script, *shlex.split(options))
    assert line == f"{script}.py: error: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mnist_svi --likelihood poisson", "argument --likelihood: invalid choice: 'poisson' (choose from"),
        ("mnist_svi --elbo renyi", "argument --elbo: invalid choice"),
        ("mnist_svi --dataset cifar", "argument --dataset: invalid choice: 'cifar'"),
        ("hierarchical --guide sideways", "argument --guide: invalid choice"),
        ("posteriors --posterior laplace", "argument --posterior: invalid choice"),
        ("priors --prior laplace", "argument --prior: invalid choice"),
        ("reproduce_iwae --layers 3", "argument --layers: invalid choice: '3'"),
        ("convolutional --channels 3", "argument --channels: expected 2 arguments"),
        ("compare_elbos --particles", "argument --particles: expected at least one argument"),
    ],
)
def test_an_unknown_choice_is_refused_before_the_data_are_read(line, message, monkeypatch, capsys):
    monkeypatch.setattr(pv.data, "load", None)
    assert message in refused(monkeypatch, capsys, *line.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "hierarchical --elbo mean-field",
            "'z1' depends on 'z2' in the model, and 'z2' on 'z1' in the guide",
        ),
        ("semi_supervised --labels 15", "--labels: expected a multiple of 10 up to"),
        ("priors --components 400", "--components: expected up to 300 images, got 400. To fix: write"),
        ("priors --latent-dim 1 --prior flow", "one dimension has no flow"),
        ("posteriors --latent-dim 1", "one dimension has no flow"),
        ("mixture --lr 0.99", ""),
        ("mnist_svi --lr 0.99", "The loss is nan: site 'z' of the guide"),
    ],
)
def test_options_that_do_not_fit_are_refused(line, message, few, monkeypatch, tmp_path, capsys):
    script, *options = line.split()
    given = [*without(TINY[script].split(), options), *options]
    assert message in refused(monkeypatch, capsys, script, *given, "--out", tmp_path)
    assert not list(tmp_path.glob("*.[!j]*"))  # neither pictures nor weights


def without(tiny, options):
    """The smallest run, less the options that are given."""
    return [
        word
        for group in re.split(r" (?=--)", " ".join(tiny))
        if group.split()[0] not in options
        for word in group.split()
    ]


# The folder of the results, and the data.


@pytest.mark.parametrize("script", SOURCES)
def test_an_out_that_cannot_be_written_is_refused_before_the_data_are_read(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(pv.data, "load", None)
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        line = refused(monkeypatch, capsys, script, "--out", out)
        assert f"--out: expected a folder that can be written, got {str(out)!r}" in line
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_read_only_out_is_refused_and_a_new_one_leaves_nothing_behind(monkeypatch, tmp_path):
    folder = runpy.run_path(str(EXAMPLES / "command_line.py"))["folder"]
    assert folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not list(tmp_path.iterdir())

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)  # the mode of a folder does not stop root
    with pytest.raises(Exception, match="expected a folder that can be written"):
        folder(str(tmp_path / "a" / "b"))
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_lost_in_training_is_one_line(few, monkeypatch, tmp_path, capsys):
    evidence, out = pv.log_evidence, tmp_path / "out"

    def lose(*args, **options):
        shutil.rmtree(out)
        out.write_text("no folder any more")
        return evidence(*args, **options)

    monkeypatch.setattr(pv, "log_evidence", lose)
    line = refused(monkeypatch, capsys, "mnist_svi", *TINY["mnist_svi"].split(), "--out", out)
    assert "files: expected to read and write them, got" in line
    assert "File exists" in line
    assert "To fix" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.filterwarnings("ignore:Posterior collapse")
def test_a_full_disk_is_one_line(few, monkeypatch, tmp_path, capsys):
    (tmp_path / "weights.pt").symlink_to("/dev/full")
    line = refused(monkeypatch, capsys, "priors", *TINY["priors"].split(), "--out", tmp_path)
    assert "files: expected to read and write them, got [Errno 28] No space left" in line


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_damaged_data_file_is_one_line(name, monkeypatch, tmp_path, capsys):
    pv.data.load(root=tmp_path)
    if name != "mnist":  # its files are no data
        shutil.copytree(tmp_path / "MNIST", tmp_path / "FashionMNIST")
    for file in tmp_path.glob("*/raw/train-images*"):
        file.write_bytes(file.read_bytes()[:1000])
    options = ["--dataset", name, "--data-root", tmp_path, "--out", tmp_path / "out"]
    line = refused(monkeypatch, capsys, "mnist_svi", *options)
    assert "To fix: " in line
    assert "delete" in line


@pytest.mark.parametrize("script", SOURCES)
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("a file\nis damaged"), 2, "error: a file is damaged"),
        (
            OSError("the disk is full"),
            2,
            "error: files: expected to read and write them, got the disk is full.",
        ),
        (MemoryError(), 2, "error: memory: expected enough for these sizes, got too little. To fix: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: memory: expected"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: memory: expected"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_or_ctrl_c_is_one_line(script, error, status, message, monkeypatch, tmp_path, capsys):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(pv.data, "load", load)
    out = tmp_path / "out"
    line = refused(monkeypatch, capsys, script, "--out", out, status=status)
    assert line.startswith(f"{script}.py: {message}")
    assert not out.exists()


def test_an_error_that_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch):
    def load(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pv.data, "load", load)
    with pytest.raises(RuntimeError, match="a bug"):
        run(monkeypatch, "priors")


# Ctrl-C.

MOMENTS = {"training": (pv.SVI, "step"), "evaluation": (pv, "log_evidence"), "drawing": (Figure, "savefig")}
DRAW = SOURCES.keys() - {"reproduce_iwae"}


@pytest.mark.parametrize(("script", "moment"), each_once(SOURCES, MOMENTS))
@pytest.mark.filterwarnings("ignore:Posterior collapse")
def test_ctrl_c_is_one_line_at_every_moment(script, moment, few, monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    place, name = MOMENTS[moment]
    if moment == "drawing" and script not in DRAW:
        place, name = pv, "write_file"  # of the summary: it draws nothing
    monkeypatch.setattr(place, name, interrupt)
    line = refused(monkeypatch, capsys, script, *TINY[script].split(), "--out", tmp_path / "out", status=130)
    assert line == f"{script}.py: interrupted"


def test_a_real_ctrl_c_leaves_the_line_of_the_bar_clean(tmp_path):
    line = [
        sys.executable,
        EXAMPLES / "mnist_svi.py",
        "--hidden-dim",
        "8",
        "--threads",
        "1",
        "--out",
        tmp_path,
    ]
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 200))
    seen = b""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=stderr) as started:
        os.close(stderr)
        while b"it/s, first step" not in seen:  # training
            seen += (more := os.read(terminal, 100))
            assert more, seen
        started.send_signal(signal.SIGINT)
        with suppress(OSError):  # at the end
            while more := os.read(terminal, 100):
                seen += more
    os.close(terminal)
    assert started.returncode == 130
    *_, cleared, stopped, last, newline = seen.decode().split("\r")
    assert not cleared.strip()
    assert re.fullmatch(rf"Stopped. {tmp_path}/checkpoint.pt holds .* 0 epochs and \d+ batches. .*", stopped)
    assert last + newline == "\nmnist_svi.py: interrupted\n"


# A training that is stopped, and one that nobody reads.

SHORT = [
    "--hidden-dim",
    "8",
    "--latent-dim",
    "2",
    "--threads",
    "1",
    "--batch-size",
    "4000",
    "--num-samples",
    "2",
]


def started(out, *options, **streams):
    line = [sys.executable, EXAMPLES / "mnist_svi.py", *SHORT, "--out", out, *options]
    return subprocess.Popen(list(map(str, line)), text=True, **streams)


@pytest.mark.proofs
def test_a_run_that_is_terminated_goes_on_as_if_it_had_not_been(tmp_path):
    with started(tmp_path / "whole", "--epochs", 3, stdout=subprocess.DEVNULL) as whole:
        assert whole.wait() == 0
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(tmp_path / "killed", "--epochs", 3, **streams) as killed:
        while not killed.stdout.readline().startswith("epoch"):
            pass
        killed.terminate()
        line = killed.stderr.read().splitlines()
    assert killed.returncode == 143
    assert line[-1] == "mnist_svi.py: terminated"
    assert not (tmp_path / "killed" / "summary.json").exists()
    with started(tmp_path / "killed", "--epochs", 3, "--resume", stdout=subprocess.DEVNULL) as resumed:
        assert resumed.wait() == 0
    for name in ("summary.json", "metrics.jsonl"):
        texts = [
            re.sub(r'"seconds": [\d.]+', "", (tmp_path / run / name).read_text())
            for run in ("killed", "whole")
        ]
        assert texts[0] == texts[1]
    weights = [torch.load(tmp_path / run / "weights.pt") for run in ("killed", "whole")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    with started(tmp_path / "killed", "--epochs", 3, "--resume", stdout=subprocess.PIPE) as again:
        assert "holds a finished run of these options: nothing is left to do" in again.stdout.read()
    assert again.returncode == 0
    with started(tmp_path / "killed", "--epochs", 4, "--resume", stderr=subprocess.PIPE) as other:
        assert "expected the setting epochs = 3, as in the file, got 4" in other.stderr.read()
    assert other.returncode == 2


def test_a_run_whose_output_nobody_reads_goes_on(tmp_path):
    with started(tmp_path, "--epochs", 1, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()  # as | head -1 does
        assert run.stderr.read() == ""
    assert run.returncode == 0
    assert (tmp_path / "summary.json").exists()


# Help, and devices.


@pytest.mark.parametrize("script", SOURCES)
def test_help_fits_a_terminal_and_tells_all(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, script, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "SUPPRESS" not in text
    assert max(map(len, text.splitlines())) <= 80
    commands = re.findall(r"^    (?:python|torchrun .*) examples/.*$", SOURCES[script], re.MULTILINE)
    assert commands
    assert set(commands) <= set(text.splitlines())  # each on its own line
    for name, option, _ in OPTIONS:
        if name == script:
            described = re.search(rf"^  {option} (.*?)(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL)[1]
            assert "(default: " in described


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", SOURCES)
@pytest.mark.filterwarnings("ignore:Posterior collapse")
def test_a_script_runs_on_another_device(script, few, monkeypatch, tmp_path):
    run(monkeypatch, script, *TINY[script].split(), "--device", "cuda", "--out", tmp_path)
    assert list(tmp_path.iterdir())


# Proofs: many odd lines, drawn at random with a seed. `pytest -m proofs` runs them.

# values that a script may take or refuse, each quick
ALLOWED = {
    "--hidden-dim": ["1", "2", "9"],
    "--latent-dim": ["1", "2", "5"],
    "--epochs": ["1", "2"],
    "--plain-epochs": ["1", "2"],
    "--batch-size": ["1", "299", "1000000"],
    "--num-samples": ["1", "3"],
    "--images": ["2", "3", "1000000"],
    "--components": ["1", "7", "300", "1000000"],
    "--labels": ["1", "10", "35", "300", "1000000"],
    "--alpha": ["1e-6", "3", "1e6"],
    "--lr": ["1e-9", "0.01", "0.5", "0.999", "1"],
    "--share": ["0", "0.3", "0.99"],
    "--seconds": ["1e-6", "0.01"],
    "--draws": ["2", "3"],
    "--compared-data": ["1", "5"],
    "--test-data": ["1", "1000000"],
    "--gap-images": ["2", "3"],
    "--steps": ["1", "3"],
    "--particles": ["1", "3"],
    "--seeds": ["1", "2"],
    "--weights": ["/dev/null"],
    "--stages": ["1 2 3", "1 1 1"],
    "--train-particles": ["1", "3"],
    "--channels": ["1", "3"],
    "--threads": ["1"],
    "--checkpoint-every": ["1", "7"],
    "--device": ["cpu", "cpu:0"],
    "--seed": ["0", str(2**63 - 1)],
    "--out": ["new", "new/below", "."],
    "--data-root": [str(Path("~/.cache/pyro_vae").expanduser())],
}
WHOLE = ["--help", "--nonsense", "--nonsense=1", "stray", "", "--", "-x", "--see 1", "'two\nlines'", "--seed"]


def odd_lines(number):
    """That many odd command lines, each a script and its words: the same ones every time."""
    draw, lines = random.Random(0), []
    for place in range(number):
        script = list(SOURCES)[place % len(SOURCES)]
        words = {group.split()[0]: group.split()[1:] for group in re.split(r" (?=--)", TINY[script])}
        kinds = dict(typed_options(script))
        choices = re.findall(r'"(--[\w-]+)", choices=(?:\w+|(\[.*?\]))', SOURCES[script])
        flags = re.findall(r'"(--[\w-]+)", action="store_true"', SOURCES[script])
        for option in draw.sample([*kinds, *(name for name, _ in choices), *flags], draw.randint(1, 3)):
            if option in flags:
                words[option] = []
            elif option in kinds:
                good = ALLOWED[option] if draw.random() < 0.7 else BAD[kinds[option]][1]
                words[option] = [draw.choice(good)] * len(words.get(option, "1"))
            else:
                words[option] = [draw.choice(every_choice(script, option))]
        line = [word for option, values in words.items() for word in (option, *values)]
        if draw.random() < 0.1:
            line += shlex.split(draw.choice(WHOLE))
        if draw.random() < 0.05:
            line += [option, *words[option]]
        lines.append((script, line))
    return lines


def every_choice(script, option):
    """The choices of an option, and some that it does not have."""
    has = {
        "--likelihood": ["bernoulli", "gaussian-learned", "categorical", "discretized-logistic"],
        "--elbo": ["trace", "mean-field"],
        "--dataset": ["mnist"],
        "--guide": ["bottom-up", "top-down"],
        "--posterior": ["factorised", "full", "flow"],
        "--prior": ["normal", "mixture", "vamp", "flow"],
        "--layers": ["1", "2"],
        "--pair": ["bernoulli", "gaussian", "two-layers", "linear-gaussian"],
        "--objective": ["vae", "stl", "iwae", "dreg"],
        "--k": ["1", "5"],
        "--budget": ["quick", "full"],
    }
    return [*has[option] * 3, "", "nonsense", has[option][0].upper()]


@pytest.fixture
def little_memory():
    """Refuse what a test has no need of, also where the system would promise it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.proofs
@pytest.mark.parametrize(("script", "options"), odd_lines(200))
@pytest.mark.filterwarnings("ignore:Posterior collapse")
def test_an_odd_line_runs_or_is_one_line(script, options, few, little_memory, monkeypatch, tmp_path, capsys):
    eager = pv.CompiledELBO
    monkeypatch.setattr(pv, "CompiledELBO", lambda elbo, **_: eager(elbo, backend="eager"))
    monkeypatch.chdir(tmp_path)
    try:
        run(monkeypatch, script, *options)
        status = 0
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert status in (0, 2)
    if status == 2:
        (line,) = shown(text)
        assert line.startswith(f"{script}.py: error: ")


@pytest.mark.proofs
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mnist_svi --hidden-dim 1000000", "memory: expected enough"),
        ("convolutional --channels 1000000 1000000", "memory: expected enough"),
        ("posteriors --posterior full --latent-dim 1000000", "memory: expected enough"),
        ("hierarchical --compiled", "torch's compiler: expected to compile this graph, got"),  # no compiler
        ("compare_elbos --draws 1", "argument --draws: expected"),
        ("priors --out /dev/null", "argument --out: expected"),
    ],
)
def test_an_odd_line_in_its_own_process(line, message, little_memory, tmp_path):
    script, *options = line.split()
    ran = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", *options],
        cwd=tmp_path,
        env={**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    (error,) = shown(ran.stderr)
    assert error.startswith(f"{script}.py: error: {message}")
