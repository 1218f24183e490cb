"""What `mm4ke doctor` finds out: is each host installed, of a supported version, and really hooked?

It does what a host's command does, `import torch` and then the host's own modules, and looks whether the adapter
was called. It reports what happened, not what should have.
"""

import importlib
import os
from dataclasses import dataclass

from . import activation
from .hosts import Host


@dataclass(frozen=True)
class Finding:
    """One row of the report. `healthy` is False when the host is installed and we could not be hooked."""

    host: Host
    version: str | None
    status: str
    healthy: bool


def examine(host: Host) -> Finding:
    """Import the host's seams in this process and say whether its adapter was called. Takes seconds."""
    version = host.installed_version()
    if version is None:
        return Finding(host, None, "not installed", healthy=True)
    if host not in activation.enabled_hosts():
        return Finding(host, version, f"switched off by MM4KE_PLUGINS={os.environ['MM4KE_PLUGINS']}", healthy=True)
    active = "active"
    if not host.is_supported():
        if not host.is_tried():
            refused = (
                f"version not supported: recipes that ask for us are refused (MM4KE_UNSUPPORTED={host.name} lets them)"
            )
            return Finding(host, version, refused, healthy=False)
        active = "active, version not supported, tried because of MM4KE_UNSUPPORTED"
    try:
        importlib.import_module("torch")
        for seam in host.seams:
            importlib.import_module(seam)
    except Exception as error:  # noqa: BLE001  (a host's import may fail in any way)
        return Finding(host, version, f"does not import: {type(error).__name__}: {error}", healthy=False)
    if host.name in activation.failures:
        return Finding(host, version, f"not hooked: {activation.failures[host.name]}", healthy=False)
    if missing := [seam for seam in host.seams if seam not in activation.hooked]:
        reason = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches plugins off"
        if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
            reason = f"nobody waited for {', '.join(missing)}; is the package installed in this environment?"
        return Finding(host, version, f"not hooked: {reason}", healthy=False)
    return Finding(host, version, active, healthy=True)
