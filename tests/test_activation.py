"""The plugin reaches unmodified hosts from an editable install and from a wheel, and never breaks `import torch`."""

import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT, run_command

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts import LLAMAFACTORY, Host

SHOW_METHODS = "from mergekit import merge_methods; print([m.spec.name for m in merge_methods.registered_methods()])"


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return run_command("python", "-c", code, **env)


def test_doctor_finds_all_hosts_active():
    run = run_command("mm4ke", "doctor")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = {line.split()[0]: line for line in run.stdout.splitlines()}
    assert lines["llamafactory"].endswith(" active")
    assert lines["mergekit"].endswith(" active")
    assert lines["lm_eval"].endswith(" active")
    assert "0.1.5 (supported: >=0.1.5,<0.1.6)" in lines["mergekit"]


def test_doctor_exits_1_when_an_installed_host_is_not_hooked():
    run = run_command("mm4ke", "doctor", TORCH_DEVICE_BACKEND_AUTOLOAD="0", MM4KE_PLUGINS="mergekit")
    assert run.returncode == 1
    assert "llamafactory  0.9.5 (supported: >=0.9.5,<0.9.6)     switched off by MM4KE_PLUGINS=mergekit" in run.stdout
    assert "not hooked: TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches plugins off" in run.stdout


@pytest.mark.parametrize(
    "allowed, active", [(None, True), ("mergekit", True), ("llamafactory", False), ("none", False), ("", False)]
)
def test_allow_list(allowed, active):
    run = python(SHOW_METHODS, **({} if allowed is None else {"MM4KE_PLUGINS": allowed}))
    assert ("'mm4ke'" in run.stdout) is active, run.stderr
    assert "'breadcrumbs'" in run.stdout


def test_unknown_host_in_the_allow_list_is_a_warning():
    run = python(SHOW_METHODS, MM4KE_PLUGINS="mergekit,mergkit")
    assert "'mm4ke'" in run.stdout
    assert (
        "MM4KE_PLUGINS: no host is called mergkit; there are: llamafactory, mergekit, easyedit, lm_eval, none"
        in run.stderr
    )


def test_importing_torch_imports_no_host_and_no_adapter():
    run = python("import sys, torch; print(sorted(m for m in sys.modules if m.startswith('mm4ke_plugins')))")
    assert eval(run.stdout) == [
        "mm4ke_plugins",
        "mm4ke_plugins.activation",
        "mm4ke_plugins.errors",
        "mm4ke_plugins.hosts",
    ]
    run = python(
        "import sys, torch; print([m for m in ('llamafactory', 'mergekit', 'transformers') if m in sys.modules])"
    )
    assert eval(run.stdout) == []


def test_activating_twice_leaves_one_hook():
    code = "import torch, sys; from mm4ke_plugins import activation as a; a.activate(); a.activate(); "
    run = python(code + "print(sum(isinstance(f, a.SeamFinder) for f in sys.meta_path))")
    assert run.stdout.strip() == "1"


def test_a_broken_adapter_is_a_warning_and_the_host_works():
    """An adapter whose import fails stands for every mistake of ours that a host's user must not pay for."""
    code = f"import sys; sys.modules['mm4ke_plugins.hosts.mergekit.adapter'] = None; {SHOW_METHODS}"
    run = python(code)
    assert run.returncode == 0
    assert "'breadcrumbs'" in run.stdout
    assert "'mm4ke'" not in run.stdout
    assert "mm4ke_plugins could not hook mergekit" in run.stderr


def test_an_unsupported_version_is_refused_when_asked_for(tmp_path):
    """The host imports and works as ever; only the recipe that asks for our feature is refused."""
    (tmp_path / "mergekit-0.2.0.dist-info").mkdir()
    (tmp_path / "mergekit-0.2.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mergekit\nVersion: 0.2.0\n"
    )
    run = python(SHOW_METHODS, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0
    assert "Warning" not in run.stderr
    (tmp_path / "merge.yaml").write_text(
        "merge_method: mm4ke\nbase_model: ./no/base\nmodels: [{model: ./no/edited}]\n"
    )
    command = ("mergekit-yaml", tmp_path / "merge.yaml", tmp_path / "out")
    run = run_command(*command, PYTHONPATH=str(tmp_path))
    assert run.returncode == 1
    needs = "merge_method: mm4ke needs mergekit>=0.1.5,<0.1.6, found 0.2.0"
    assert run.stderr.splitlines()[-1] == (
        f"mm4ke: error: {needs}: pip install 'mergekit>=0.1.5,<0.1.6', or set MM4KE_UNSUPPORTED=mergekit to try it, "
        "and check the result"
    )
    run = run_command("mm4ke", "doctor", PYTHONPATH=str(tmp_path), MM4KE_PLUGINS="mergekit")
    assert run.returncode == 1
    assert "not supported: recipes that ask for us are refused (MM4KE_UNSUPPORTED=mergekit lets them)" in run.stdout

    run = run_command(*command, PYTHONPATH=str(tmp_path), MM4KE_UNSUPPORTED="mergekit")
    assert f"UserWarning: {needs}; MM4KE_UNSUPPORTED lets it run untested" in run.stderr
    assert "base_model: ./no/base: no such folder" in run.stderr.splitlines()[-1]  # it got that far
    run = run_command(
        "mm4ke", "doctor", PYTHONPATH=str(tmp_path), MM4KE_PLUGINS="mergekit", MM4KE_UNSUPPORTED="mergekit"
    )
    assert run.returncode == 0
    assert "active, version not supported, tried because of MM4KE_UNSUPPORTED" in run.stdout


@pytest.mark.parametrize(
    "version, supported",
    [("0.9.5", True), ("0.9.5.post1", True), ("0.9.5+local", True), ("0.9.5rc1", False), ("0.9.6.dev0", False),
     ("0.9.6", False), ("main", False), ("a clone", False)],
)  # fmt: skip
def test_which_versions_are_supported(monkeypatch, version, supported):
    monkeypatch.setattr(Host, "installed_version", lambda _: version)
    assert LLAMAFACTORY.is_supported() is supported
    monkeypatch.setenv("MM4KE_UNSUPPORTED", "mergekit")
    if supported:
        LLAMAFACTORY.require_supported("rsft: true")
        return
    with pytest.raises(MM4KEError, match=rf"^rsft: true needs .*, found {re.escape(version)}: pip install .* or set "):
        LLAMAFACTORY.require_supported("rsft: true")
    monkeypatch.setenv("MM4KE_UNSUPPORTED", "mergekit, LLaMAFactory")
    with pytest.warns(UserWarning, match="found .*; MM4KE_UNSUPPORTED lets it run"):
        LLAMAFACTORY.require_supported("rsft: true")


def test_a_wheel_works_as_the_editable_install_does(tmp_path):
    build = run_command("python", "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    assert build.returncode == 0, build.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    # An environment of its own that sees this one's packages, but not its editable install (a .pth is not nested).
    venv.create(tmp_path / "venv", with_pip=False)
    bin_folder = tmp_path / "venv" / "bin"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "hosts.pth").write_text(sysconfig.get_path("purelib"))
    install = run_command("python", "-m", "pip", "--python", bin_folder / "python", "install", "--no-deps", wheel)
    assert install.returncode == 0, install.stderr[-2000:]

    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [bin_folder / "python", "-c", f"import mm4ke_plugins; print(mm4ke_plugins.__file__); {SHOW_METHODS}"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert where.stdout.startswith(str(site)), where.stderr
    assert "'mm4ke'" in where.stdout
    doctor = subprocess.run(
        [bin_folder / "mm4ke", "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert doctor.stdout.count(" active") == 3
    # What the package reads at run time came along.
    texts = sorted(path.name for path in (site / "mm4ke_plugins").rglob("*.txt"))
    assert texts == sorted(path.name for path in (ROOT / "mm4ke_plugins").rglob("*.txt"))
    assert "neutral_text.txt" in texts
