"""How unmodified hosts find us: an import hook, installed by PyTorch's `torch.backends` entry point.

PyTorch (>= 2.5) calls `activate` at the end of `import torch` in every process: commands, torchrun workers, Ray
workers. It leaves one finder on `sys.meta_path`, which waits for the modules in `hosts.HOSTS` and calls the
host's adapter right after such a module was executed. Nothing changes until a recipe asks for it.

    MM4KE_PLUGINS=                          (or none) switch all adapters off
    MM4KE_PLUGINS=llamafactory,mergekit     only these
    MM4KE_UNSUPPORTED=llamafactory          let recipes ask for us in a version that we were not written for
    TORCH_DEVICE_BACKEND_AUTOLOAD=0         PyTorch's own switch; it turns us off too

An exception here would break `import torch` for everybody, so whatever fails is a warning.
"""

import importlib
import importlib.machinery
import os
import sys
import warnings

from .hosts import EASYEDIT, HOSTS, LLAMAFACTORY, Host, names_in

# The seams that an adapter has taken, and why one could not be, by the host's name; `mm4ke doctor` shows both.
hooked: set[str] = set()
failures: dict[str, str] = {}


def enabled_hosts() -> list[Host]:
    """The hosts that the MM4KE_PLUGINS variable allows: all of them where it is not set."""
    if "MM4KE_PLUGINS" not in os.environ:
        return list(HOSTS)
    names = names_in("MM4KE_PLUGINS")
    return [host for host in HOSTS if host.name in names]


def activate() -> None:
    """Install the import hook. Never raises; calling it again does nothing."""
    try:
        if not any(isinstance(finder, SeamFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, finder := SeamFinder(enabled_hosts()))
            # A host that imports torch late may have executed a seam already.
            for name, host in finder.host_of.items():
                module = sys.modules.get(name)
                if module is not None and not getattr(module.__spec__, "_initializing", False):
                    call_adapter(host, module)
    except Exception as error:  # noqa: BLE001  (whatever it is, `import torch` must not fail)
        warnings.warn(f"mm4ke_plugins is switched off: {error!r}")


class SeamFinder:
    """Finds the hosts' seam modules as Python would, and has their loader call us after execution."""

    def __init__(self, hosts: list[Host]):
        self.host_of = {seam: host for host in hosts for seam in host.seams}

    def find_spec(self, name, path=None, target=None):
        host = self.host_of.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if host else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                del spec.loader.exec_module
                execute(module)
                call_adapter(host, module)

            # On the instance: the loader keeps its class, so tools that read sources or resources still can, and
            # until it is used only: it then can be pickled again.
            spec.loader.exec_module = exec_module
        return spec


def call_adapter(host: Host, module) -> None:
    """Let the host's adapter register itself in `module`; what goes wrong is a warning and a line in `failures`."""
    if module.__name__ in hooked:
        return
    try:
        importlib.import_module(host.adapter).register(module)
        hooked.add(module.__name__)
    except Exception as error:  # noqa: BLE001  (whatever it is, the host must go on)
        failures[host.name] = f"{module.__name__}: {error!r}"
        warnings.warn(f"mm4ke_plugins could not hook {host.name}: {failures[host.name]}")


def hook_llamafactory() -> None:
    """For a LLaMA-Factory that loads the entry-point group `llamafactory.plugins`: register at once, without a hook."""
    _hook_at_once(LLAMAFACTORY)


def hook_easyedit() -> None:
    """The same for an EasyEdit that loads the entry-point group `easyeditor.plugins`."""
    _hook_at_once(EASYEDIT)


def _hook_at_once(host: Host) -> None:
    if host in enabled_hosts():
        for seam in host.seams:
            call_adapter(host, importlib.import_module(seam))
