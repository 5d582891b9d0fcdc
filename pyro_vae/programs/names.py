"""Separate names in Pyro's store, so that the parameters of two modules do not become one there.

When a PyroModule runs outside this package (``guide(x)``, ``Predictive``, ``pyro.infer.SVI``), it looks up
each PyroParam in Pyro's global store by its name, and takes what it finds. Modules of one class have the same
names. So the second would take the parameters of the first, and so would an autoguide when it makes its
parameters.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_vae.programs.pair import Pair

_OWN = re.compile(r"#pv(\d+)")
_numbers = itertools.count(1)
_named: WeakValueDictionary[int, PyroModule] = WeakValueDictionary()
_seen: WeakSet[PyroModule] = WeakSet()


class _OwnName(str):
    """A name such as "AutoNormal#pv3". A copy or a pickle of its module gets the plain "AutoNormal" back."""

    def __reduce__(self) -> Any:
        return str, (_OWN.sub("", self),)


def name_apart(modules: Iterable[nn.Module], *, take: bool = False) -> None:
    """Give the modules that take parameters from Pyro's store separate names there.

    A module that declares a PyroSample keeps its name, since its sites have that name.

    Args:
        modules: the modules of a pair.
        take: also take out parameters that are already in the store. Otherwise their modules keep their
            names, under which ``pyro.infer.SVI`` or ``pyro.param`` may look for them.
    """
    store = pyro.get_param_store()
    for name in list(store.keys()):
        own = _OWN.search(name)
        if own and int(own[1]) not in _named:
            del store[name]  # its module is gone
    for module in modules:
        if not isinstance(module, PyroModule) or not _takes_parameters(module):
            continue
        _seen.add(module)
        if type(module._pyro_name) is _OwnName or _has_samples(module):
            continue
        held = _taken_from_store(module).values()
        in_store = [store._param_to_name[p] for p in held if p in store._param_to_name]
        if in_store and not take and not any(map(_OWN.search, in_store)):
            continue
        for name in in_store:
            del store[name]
        number = next(_numbers)
        _named[number] = module
        module._pyro_name = _OwnName(f"{_OWN.sub('', module._pyro_name)}#pv{number}")


def check_apart(modules: Iterable[nn.Module]) -> None:
    """Refuse modules whose parameters Pyro tied to those of another before this package saw them.

    Raises:
        ValueError: naming the parameter.
    """
    checked = set(modules)
    owners: dict[int, PyroModule] = {}
    for module in list(_seen):
        for name, p in _taken_from_store(module).items():
            other = owners.setdefault(id(p), module)
            if other is not module and (module in checked or other in checked):
                fix = (
                    "move it to a submodule without a PyroSample"
                    if _has_samples(module)
                    else "make both modules again. Before you call the second one yourself, make its SVI or "
                    "call pyro.clear_param_store()"
                )
                full_name = _OWN.sub("", ".".join(filter(None, (module._pyro_name, name))))
                raise ValueError(
                    f"The parameter '{full_name}': expected one for each module of that name, got one that "
                    f"two of them hold, since the second took it from Pyro's store. To fix: {fix}."
                )


def _takes_parameters(module: PyroModule) -> bool:
    return isinstance(module, AutoGuide) or bool(module._pyro_params) or _declares(module, PyroParam)


def _has_samples(module: PyroModule) -> bool:
    return bool(module._pyro_samples) or _declares(module, PyroSample)


def _taken_from_store(module: PyroModule) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that Pyro replaces by those with the same name in the store."""
    if isinstance(module, AutoGuide):
        found = module._parameters
    else:
        found = {name: module._parameters.get(f"{name}_unconstrained") for name in module._pyro_params}
    return {name: p for name, p in found.items() if p is not None}


def _declares(module: PyroModule, kind: type) -> bool:
    """Return whether a class of the module has an attribute of a kind, such as by ``@PyroParam``."""
    return any(isinstance(value, kind) for cls in type(module).__mro__ for value in vars(cls).values())


def check_param_statements(pair: Pair, *traces: poutine.Trace) -> None:
    """Refuse ``pyro.param`` statements outside modules: each run would initialise the parameter again.

    Call it while the pair is isolated.

    Raises:
        ValueError: naming the parameter, with the lines that put it into a module.
    """
    owned = {id(p): p for root in pair.roots for p in root.parameters()}
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] != "param":
                continue
            value: Any = site["value"]
            if id(getattr(value, "unconstrained", lambda value=value: value)()) not in owned:
                if not all(p.is_contiguous() for p in owned.values()):
                    raise ValueError(
                        f"The parameter '{name}': expected it contiguous in memory, else Pyro trains a copy "
                        "of it. To fix: p.data = p.data.contiguous()."
                    )
                raise ValueError(
                    f"The parameter '{name}': expected it in a module of model or guide, got a pyro.param "
                    "statement, which would start from its initial value again. To fix: make the program a "
                    "PyroModule that holds it, or the network that it is a part of:\n\n"
                    "    class Program(PyroModule):\n"
                    "        def __init__(self):\n"
                    "            super().__init__()\n"
                    "            self.p = PyroParam(init, constraint=...)  # or a network\n\n"
                    "        def forward(self, x):\n"
                    f"            ...  # self.p in place of pyro.param('{name}', init, constraint=...)"
                )
