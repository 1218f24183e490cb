"""The hosts, and where each is hooked.

An adapter is one module with a function `register(module)`, called once for each seam right after the host
has executed it. Adapters import the maths; the maths never imports them, nor do they import each other.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ..errors import MM4KEError


@dataclass(frozen=True)
class Host:
    """One program that we extend.

    name:         as users write it in MM4KE_PLUGINS
    distribution: its name on the package index
    supported:    the versions whose source the adapter was written against (a PEP 440 specifier)
    seams:        modules to wait for. None of them may be able to be half-imported when torch is: a host's
                  package often imports torch, and thereby us, in the middle of its own import
    """

    name: str
    distribution: str
    supported: str
    seams: tuple[str, ...]

    @property
    def adapter(self) -> str:
        return f"{__name__}.{self.name}"

    def installed_version(self) -> str | None:
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def is_supported(self) -> bool:
        from packaging.specifiers import SpecifierSet  # 20 ms that `import torch` need not wait for

        return SpecifierSet(self.supported).contains(self.installed_version(), prereleases=True)

    def require_supported(self, feature: str) -> None:
        """Refuse a recipe that asks for `feature` on a version we were not written for.

        Raises MM4KEError, which names the version found and those supported.
        """
        if not self.is_supported():
            raise MM4KEError(
                f"{feature} needs {self.distribution}{self.supported}, found {self.installed_version()}: "
                f"pip install '{self.distribution}{self.supported}'"
            )


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
HOSTS = (LLAMAFACTORY, MERGEKIT)
