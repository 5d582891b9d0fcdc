"""Checkpoint: a training in one file, from which it resumes as if it had never stopped."""

import io
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.arguments import check_flag, given, require, whole_number
from pyro_vae.elbos.capabilities import inner_elbo
from pyro_vae.programs import Pair, Program, no_guide
from pyro_vae.svi import SVI
from pyro_vae.training import processes
from pyro_vae.training.epoch import Epoch
from pyro_vae.training.files import write_file

_FORMAT = "pyro_vae checkpoint 1"


class Checkpoint:
    """The file of a training, which :func:`fit` writes, and from which it resumes.

    Run the same script again after a crash, and it resumes at the point in the file::

        checkpoint = pv.Checkpoint("runs/last.pt", resume=True)
        for epoch in pv.fit(svi, batches, epochs=20, checkpoint=checkpoint):
            print(epoch)

    The file holds the parameters and buffers of model and guide, the optimiser, the scheduler and all random
    states. It also holds the watched data and the position of the training. All are plain tensors and
    numbers, which ``torch.load(path, weights_only=True)`` reads. ``model.load_state_dict(file["model"])``
    loads a trained model, on any device. At every moment there is one complete file: a new one replaces the
    old one.

    A training that was killed and resumed ends with the parameters and numbers of one that never stopped, to
    the last bit. This needs the same machine, the same number of threads, and batches in the same order.
    :class:`pyro_vae.data.Batches`, a list or a DataLoader resume in the middle of a pass, others at its
    start.

    Args:
        path: the path of the file.
        resume: resume from the file, if there is one. Otherwise the training starts and replaces the file.
        every: also write after this number of steps; the file is always written at the end of a pass.
        settings: numbers and strings that define the run, such as the options of a script. A file with other
            settings is refused.

    Attributes:
        epochs: the records of all passes so far, also those before an interruption.

    Raises:
        ValueError: if the file is damaged, is not a checkpoint, or has other settings; from :func:`fit`, if
            the file belongs to other modules, or to another optimiser, scheduler, objective or protocol.

    Warns:
        UserWarning: from :func:`fit`, if the optimiser has another learning rate or option than in the file,
            which is used; if versions or the number of threads have changed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume: bool = False,
        every: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        require(
            isinstance(path, str | Path), "path", "the path of a file", given(path), "pass 'runs/last.pt'"
        )
        self.path = Path(path)
        check_flag("resume", resume)
        self.every = (
            None if every is None else whole_number("every", every, 1, "leave it out to write once per pass")
        )
        valid, to_fix = settings is None or isinstance(settings, Mapping), "pass {'latent_dim': 20}"
        require(valid, "settings", "a dict of numbers and strings", given(settings), to_fix)
        self.settings = dict(settings or {})
        self.epochs: list[Epoch] = []
        self._found: dict[str, Any] | None = None
        self._options: list[dict[str, Any]] = []
        self._is_readable = False
        if self.path.is_dir():
            raise ValueError(
                f"{path}: expected a file, got a folder. To fix: pass '{self.path / 'last.pt'}'."
            )
        if resume and self.path.exists():
            self._found = _read(self.path)
            self._check_settings(self._found["settings"])
            self.epochs = [Epoch(*record) for record in self._found["epochs"]]

    @property
    def resumes(self) -> bool:
        """Whether a training resumes from the file."""
        return self._found is not None

    def write(self, svi: SVI, scheduler: Any, positions: list[dict[str, Any]], data: dict[str, Any]) -> None:
        """Write the state of a training.

        Raises:
            ValueError: if the file cannot be written, or the state is not of plain tensors and numbers. The
                old file is intact.
        """
        state = {
            "format": _FORMAT,
            "versions": _versions(),
            "settings": self.settings,
            "run": _describe(svi, scheduler) | data,
            "options": self._options,
            "model": _module_of(svi.model).state_dict(),
            "guide": _module_of(svi.guide).state_dict(),
            "optimizer": svi.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "epochs": [tuple(epoch) for epoch in self.epochs],
            "positions": positions,
        }
        torch.save(state, written := io.BytesIO())
        if not self._is_readable:
            written.seek(0)
            try:
                torch.load(written, weights_only=True)
            except Exception as error:
                raise ValueError(
                    f"{self.path}: expected a training of plain tensors and numbers, which a checkpoint can "
                    f"hold, got others: {_first_line(error)}. To fix: look at the settings, the scheduler "
                    "and the watched batch."
                ) from error
            self._is_readable = True
        try:
            write_file(self.path, written.getvalue())
        except OSError as error:
            raise ValueError(
                f"{self.path}: expected to write the checkpoint, got {error}. The last complete file is "
                "still there. To fix: make room, or make the folder writable, and resume."
            ) from error

    def has_more_parameters(self, svi: SVI) -> bool:
        """Return whether the file has parameters that model and guide have not made yet."""
        found = self._found or {}
        return any(
            found[side].keys() - _module_of(program).state_dict().keys()
            for side, program in (("model", svi.model), ("guide", svi.guide))
        )

    def restore(self, svi: SVI, scheduler: Any, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Set a training to the state in the file, after a check that it fits.

        Returns:
            The position of each process.

        Raises:
            ValueError: if the file belongs to another training. Then nothing changes.
        """
        found, self._found = self._found, None
        assert found is not None
        run = _describe(svi, scheduler) | data
        for what, value in found["run"].items():
            if what not in ("parameters", "threads", "modules") and run[what] != value:
                raise self._refusal(f"a training with {what} {value}, as in the file", run[what])
        for side, program in (("model", svi.model), ("guide", svi.guide)):
            self._check_module(side, _module_of(program).state_dict(), found[side])
        for name, then in found["run"].get("modules", {}).items():
            if (kind := run["modules"].get(name, then)) != then:
                raise self._refusal(f"{then} at '{name}', as in the file", kind)
        names, now = found["run"]["parameters"], run["parameters"]
        if sorted(map(sorted, names)) != sorted(map(sorted, now)):
            other = sorted(set(chain(*names)) ^ set(chain(*now))) or "other groups"
            raise self._refusal("an optimiser of the same parameters", other)
        self._warn_of_other_versions(found, run)
        self._warn_of_other_options(found)
        for side, program in (("model", svi.model), ("guide", svi.guide)):
            _module_of(program).load_state_dict(found[side])
        svi.optimizer.load_state_dict(_in_order(found["optimizer"], names, now))
        if scheduler is not None:
            scheduler.load_state_dict(found["scheduler"])
        return list(found["positions"])

    def note_options(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the options of the optimiser, as the program has set them before the first step."""
        self._options = [_options(group) for group in optimizer.param_groups]

    def _warn_of_other_options(self, found: dict[str, Any]) -> None:
        """Warn of an option, such as the learning rate, that the program changes and the file sets back."""
        first, last = found.get("options", []), [_options(g) for g in found["optimizer"]["param_groups"]]
        for then, later, now in zip(first, last, self._options, strict=False):
            changed = [name for name in now if now[name] not in (then.get(name), later.get(name))]
            if changed:
                differences = ", ".join(f"{name} = {later.get(name)}, not {now[name]}" for name in changed)
                warnings.warn(
                    f"{self.path}: resumes with {differences}, as in the file. To change it, set "
                    "svi.optimizer.param_groups[0] in the loop over fit.",
                    stacklevel=5,
                )

    def _warn_of_other_versions(self, found: dict[str, Any], run: dict[str, Any]) -> None:
        then = found["versions"] | {"threads": found["run"]["threads"]}
        now = _versions() | {"threads": run["threads"]}
        changed = [f"{name} {then.get(name)} -> {now[name]}" for name in now if now[name] != then.get(name)]
        if changed:
            warnings.warn(
                f"{self.path}: resumes, but perhaps not to the last bit as without the interruption, with "
                f"{', '.join(changed)}.",
                stacklevel=5,
            )

    def _check_settings(self, found: dict[str, Any]) -> None:
        for name in [*found, *(self.settings.keys() - found.keys())]:
            then, now = (of.get(name, "nothing") for of in (found, self.settings))
            if then != now:
                raise self._refusal(f"the setting {name} = {then!r}, as in the file", f"{now!r}")

    def _check_module(self, side: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
        for name in [*then, *(now.keys() - then.keys())]:
            forms = [tuple(of[name].shape) if name in of else None for of in (then, now)]
            if forms[0] != forms[1]:
                raise self._refusal(
                    f"a {side} with '{name}' of shape {forms[0]}, as in the file"
                    if forms[0] is not None
                    else f"a {side} without '{name}', as in the file",
                    "none" if forms[1] is None else f"shape {forms[1]}",
                )

    def _refusal(self, expected: str, got: Any) -> ValueError:
        return ValueError(
            f"{self.path}: expected {expected}, got {got}. To fix: resume with the program and the options "
            "of the first run, or start a new one under another path."
        )


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, if a file is damaged or not from torch
        raise ValueError(
            f"{path}: expected a checkpoint of plain tensors and numbers, got a damaged file, or one that "
            f"holds something else: {_first_line(error)}. To fix: choose the right file, or start without "
            "resume."
        ) from error
    kind = found.get("format") if isinstance(found, dict) else type(found).__name__
    expected = f"a file of fit ({_FORMAT!r})"
    require(kind == _FORMAT, str(path), expected, f"another one ({kind!r})", "choose the right file")
    return dict(found)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "pyro-ppl")}
    return {"python": platform.python_version(), "processor": platform.machine(), **packages}


def _describe(svi: SVI, scheduler: Any) -> dict[str, Any]:
    """Return what a resumed training has in common with the first one."""
    elbo = inner_elbo(svi.loss)
    owned = {
        id(p): f"{side}.{name}"
        for side, program in (("guide", svi.guide), ("model", svi.model))
        for name, p in _module_of(program).named_parameters()
    }
    return {
        "objective": f"{type(elbo).__name__} of {elbo.num_particles} particles",
        "optimizer": type(svi.optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "processes": processes.count(),
        "parameters": [
            [owned.get(id(p), "one of no module") for p in group["params"]]
            for group in svi.optimizer.param_groups
        ],
        "modules": {
            f"{side}.{name}".removesuffix("."): _kind(module)
            for side, program in (("guide", svi.guide), ("model", svi.model))
            for name, module in _module_of(program).named_modules()
        },
        "threads": torch.get_num_threads(),
    }


def _kind(module: nn.Module) -> str:
    """Return the class of a module, with its settings if it is one of this package."""
    kind = type(module)
    own = kind.__module__.startswith("pyro_vae.")
    return f"{kind.__name__}({module.extra_repr()})" if own else kind.__name__


# The form of the loop over the parameters, which changes the last bit at most.
_FORM = {"params", "fused", "foreach", "capturable", "differentiable"}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group: the learning rate and others."""
    found = {name: value for name, value in group.items() if name not in _FORM}
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()}


def _module_of(program: Program) -> nn.Module:
    """Return the module behind a program, or all of them in a list."""
    roots = Pair(program, no_guide).roots
    return roots[0] if len(roots) == 1 else nn.ModuleList(roots)


def _in_order(state: dict[str, Any], then: list[list[str]], now: list[list[str]]) -> dict[str, Any]:
    """Return an optimiser's state with its parameters in another order.

    An optimiser made from a PyroOptim has them in the order in which the training first met them.
    """
    place = {name: i for i, name in enumerate(chain(*then))}
    order = [place[name] for name in chain(*now)]
    groups, start = [], 0
    for group in state["param_groups"]:
        stop = start + len(group["params"])
        groups.append(group | {"params": list(range(start, stop))})
        start = stop
    moved = {i: state["state"][j] for i, j in enumerate(order) if j in state["state"]}
    return {"state": moved, "param_groups": groups}
