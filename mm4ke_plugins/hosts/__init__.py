"""The hosts, and where each is hooked.

An adapter is one module with a function `register(module)`, called once for each seam right after the host
has executed it. Adapters import the maths; the maths never imports them, nor do they import each other.
"""

import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..errors import MM4KEError


def names_in(variable: str) -> set[str]:
    """The hosts that an environment variable names, with commas; "none" is no host. Unknown names are a warning."""
    names = {name.strip().lower() for name in os.environ.get(variable, "").split(",")} - {"", "none"}
    if unknown := names - {host.name for host in HOSTS}:
        known = ", ".join(host.name for host in HOSTS)
        warnings.warn(f"{variable}: no host is called {', '.join(sorted(unknown))}; there are: {known}, none")
    return names


@dataclass(frozen=True)
class Host:
    """One program that we extend.

    name:         as users write it in MM4KE_PLUGINS
    distribution: its name on the package index; None for a program that is cloned and has no version
    supported:    the versions whose source the adapter was written against (a PEP 440 specifier), or the commit
    seams:        modules to wait for. None of them may be able to be half-imported when torch is: a host's
                  package often imports torch, and thereby us, in the middle of its own import
    """

    name: str
    distribution: str | None
    supported: str
    seams: tuple[str, ...]

    @property
    def adapter(self) -> str:
        return f"{__name__}.{self.name}.adapter"

    def installed_version(self) -> str | None:
        """The version, "a clone" of a host that is found but not installed, None where there is none."""
        if self.distribution is not None:
            try:
                return version(self.distribution)
            except PackageNotFoundError:
                pass
        return "a clone" if find_spec(self.seams[0].partition(".")[0]) else None

    def is_supported(self) -> bool:
        """Whether the installed version is one we were written for. What has no version is tried.

        A pre-release of the first version that isn't supported is not: it has that version's source.
        """
        if self.distribution is None:
            return True
        # 20 ms that `import torch` need not wait for
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion, Version

        try:
            return SpecifierSet(self.supported).contains(Version(str(self.installed_version())), prereleases=True)
        except InvalidVersion:  # a clone, or a build that calls itself "main"
            return False

    def is_tried(self) -> bool:
        """Whether the MM4KE_UNSUPPORTED variable lets this host run in a version we were not written for."""
        return self.name in names_in("MM4KE_UNSUPPORTED")

    def require_supported(self, feature: str) -> None:
        """Refuse a recipe that asks for `feature` on a version we were not written for, or warn where it is tried.

        Raises MM4KEError, which names the version found and those supported.
        """
        if self.is_supported():
            return
        found = f"{feature} needs {self.distribution}{self.supported}, found {self.installed_version() or 'none'}"
        if not self.is_tried():
            raise MM4KEError(
                f"{found}: pip install '{self.distribution}{self.supported}', "
                f"or set MM4KE_UNSUPPORTED={self.name} to try it, and check the result"
            )
        warnings.warn(f"{found}; MM4KE_UNSUPPORTED lets it run untested, check the result", stacklevel=2)


LLAMAFACTORY = Host(
    name="llamafactory",
    distribution="llamafactory",
    supported=">=0.9.5,<0.9.6",
    seams=("llamafactory.hparams.parser", "llamafactory.model.adapter", "llamafactory.train.sft.workflow"),
)
MERGEKIT = Host(
    name="mergekit",
    distribution="mergekit",
    supported=">=0.1.5,<0.1.6",
    seams=("mergekit.merge_methods.registry", "mergekit.merge"),
)
EASYEDIT = Host(
    name="easyedit",
    distribution=None,
    supported="commit 14cea82",
    seams=("easyeditor.util.alg_dict", "easyeditor.editors.batch_editor"),
)
LM_EVAL = Host(
    name="lm_eval",
    distribution="lm_eval",
    supported=">=0.4.13,<0.4.14",
    seams=("lm_eval.models", "lm_eval.tasks._index"),
)
HOSTS = (LLAMAFACTORY, MERGEKIT, EASYEDIT, LM_EVAL)


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Our version, and those of these packages; "none" for one that is not installed."""
    found = {"mm4ke_plugins": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def environment() -> dict[str, str]:
    """The environment for a host's command: the hosts that are installed with us go before others."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return os.environ | {"PATH": places}
