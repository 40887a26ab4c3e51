"""Clean virtual environments for install_matrix.py, and what is asked of a package that was installed into one."""
import ctypes
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import processes

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What the caller has set must not decide anything here.
SWITCHES = {"DEBUG", "CXX", "CC", "CFLAGS", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "TRITON_INTERPRET", "TORCH_EXTENSIONS_DIR"}
SOURCES = ("rsloss_kernels", "csrc", "requirements", "python", "bench", "tests", "docs", ".ci")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile")
TOOLS = ("numpy", "ninja", "pytest", "hypothesis")
COMPILERS = r"(.*-)?(c\+\+|g\+\+|gcc|cc|clang|clang\+\+)(-[\d.]+)?"
DROP_FROM_BOUNDING_SET, OVERRIDE_PERMISSIONS = 24, 1  # prctl's PR_CAPBSET_DROP and CAP_DAC_OVERRIDE
PROBE = '''
import json, pathlib, sys, warnings
import torch
import rsloss_kernels
from rsloss_kernels import _backends, _ext

def evaluate(logits):
    leaf = logits.clone().requires_grad_()
    losses = rsloss_kernels.rank_sort_loss(leaf, labels, quality)
    sum(losses).backward()
    return torch.stack([loss.detach().double() for loss in losses]), leaf.grad.double()

package = pathlib.Path(rsloss_kernels.__file__).parent
with warnings.catch_warnings():
    warnings.simplefilter("error")
    for file in package.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")
generator = torch.Generator().manual_seed(7)
logits = torch.randn(500, 9, generator=generator)
labels = torch.randint(-1, 10, (500,), generator=generator)
quality = torch.rand(500, generator=generator)
losses, gradient = evaluate(logits)
with rsloss_kernels.use_backend("reference"):
    true_losses, true_gradient = evaluate(logits.double())
report = rsloss_kernels.backend_report().splitlines()[1:]
print(json.dumps({
    "file": rsloss_kernels.__file__,
    "library": str(_ext.loaded_library("cpp")),
    "answered": _backends.resolve("rank_sort_forward", "cpu"),
    "backends": {line.split()[0]: line for line in report},
    "loss": float(((losses - true_losses) / true_losses).abs().max()),
    "gradient": float((gradient - true_gradient).abs().max() / true_gradient.abs().max()),
}))
'''
# As `python -m` runs them, in the process that has torch already.
PROGRAMS = '''
import runpy
for name, *arguments in (["collect_env"], ["selfcheck", "--backends", sys.argv[1]]):
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(f"rsloss_kernels.{name}", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
'''


class Failed(Exception):
    """What a mode promised does not hold."""


def expect(text: str, pattern: str) -> str:
    """What `pattern` finds in `text`; it must be there."""
    found = re.search(pattern, text)
    if not found:
        raise Failed(f"wanted {pattern!r} in:\n{text[-3000:]}")
    return found[0]


def said(log: str, pattern: str) -> str:
    """The line of a log that `pattern` describes, without what pip and the build put before it."""
    return re.sub(r"^\s*(rsloss_kernels: )?", "", expect(log, rf"(?m)^\s*(rsloss_kernels: )?{pattern}$"))


def copy_sources(target: pathlib.Path) -> pathlib.Path:
    """The files of the checkout that belong to a release, without anything compiled."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", ".pytest_cache", "results", "out")
    for name in filter(lambda name: (ROOT / name).is_dir(), SOURCES):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


def toolkit(folder: pathlib.Path, release: str) -> pathlib.Path:
    """A CUDA toolkit whose compiler can only tell its release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


def drop_override() -> None:
    """Before a program starts: permissions hold for root too. Without the right to give up rights it has what it has."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(DROP_FROM_BOUNDING_SET, OVERRIDE_PERMISSIONS, 0, 0, 0)


def why_not_locked(folder: pathlib.Path) -> str | None:
    """None if a program that `drop_override` precedes cannot write where nobody may, tried in `folder`; else the reason in words."""
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    done = subprocess.run(["mkdir", str(closed / "inside")], preexec_fn=drop_override, capture_output=True, timeout=60)
    shutil.rmtree(closed)
    return None if done.returncode else "root cannot give up its right to write what is read-only"


class Interpreter:
    """One Python with an environment of its own that holds torch and the tools of tests, made unless it is there."""

    def __init__(self, command: str, torch: str, scratch: pathlib.Path):
        version = subprocess.run([command, "-c", "import sys; print(*sys.version_info[:2], sep='')"], capture_output=True, text=True)
        self.command, self.scratch = command, scratch
        self.base = scratch / f"torch-cp{version.stdout.strip()}"
        self.python = self.base / "bin" / "python"
        if not self.python.exists():
            subprocess.run([command, "-m", "venv", str(self.base)], check=True)
        if subprocess.run([self.python, "-c", "import torch"], capture_output=True).returncode != 0:
            subprocess.run([self.python, "-m", "pip", "install", *shlex.split(torch), *TOOLS], check=True)
        facts = "import json, platform, sysconfig, torch; print(json.dumps([platform.python_version(), torch.__version__, "
        facts += "torch.version.cuda, sysconfig.get_path('purelib')]))"
        done = subprocess.run([self.python, "-c", facts], capture_output=True, text=True, check=True, cwd=scratch)
        self.version, self.torch, self.cuda, self.packages = json.loads(done.stdout)
        self.wheel_log = ""
        self._wheel: pathlib.Path | None = None

    def wheel(self) -> pathlib.Path:
        """The wheel with the compiled library, as optimised as DEBUG in the caller's environment lets it be."""
        if self._wheel is None:
            site = Site(self, self.scratch / "wheels" / self.version)
            arguments = ("-v", "--no-build-isolation", "--no-deps", "-w", str(site.folder / "wheels"), str(site.sources()))
            self.wheel_log = site.pip("wheel", *arguments, DEBUG=os.environ.get("DEBUG", ""))
            (self._wheel,) = (site.folder / "wheels").glob("*.whl")
        return self._wheel

    def toolkit(self) -> str | None:
        """The CUDA toolkit that torch finds in the caller's environment, if it has a compiler."""
        script = "from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME or '')"
        done = subprocess.run([self.python, "-c", script], capture_output=True, text=True, check=True, cwd=self.scratch)
        found = done.stdout.strip()
        return found if found and pathlib.Path(found, "bin", "nvcc").exists() else None


class Site:
    """A clean environment, with folders for sources, cache and the place to run from. Their names hold spaces. No program may take longer
    than `seconds`."""

    def __init__(self, interpreter: Interpreter, folder: pathlib.Path, seconds: float = 7200):
        self.interpreter, self.folder, self.seconds = interpreter, folder, seconds
        shutil.rmtree(folder, ignore_errors=True)
        self.venv, self.elsewhere, self.cache = (folder / name for name in ("a venv", "not the checkout", "a cache"))
        self.elsewhere.mkdir(parents=True)
        subprocess.run([interpreter.command, "-m", "venv", "--without-pip", str(self.venv)], check=True)
        self.python = self.venv / "bin" / "python"
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        done = subprocess.run([self.python, "-c", script], capture_output=True, text=True, check=True)
        self.packages = pathlib.Path(done.stdout.strip())
        self.package = self.packages / "rsloss_kernels"
        (self.packages / "torch.pth").write_text(f"{interpreter.packages}\n")
        self.path = os.pathsep.join([str(interpreter.python.parent), os.environ["PATH"]])
        self._is_locked = False
        self._before = self._files()

    def environment(self, **changes: object) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in SWITCHES and not name.startswith("RSLOSS_")}
        # A toolkit without a compiler, so that CUDA is compiled only where it is meant.
        own = {"PATH": self.path, "TORCH_EXTENSIONS_DIR": self.cache, "CUDA_HOME": self.folder / "no toolkit", **changes}
        return {**kept, "PYTHONNOUSERSITE": "1", **{name: str(value) for name, value in own.items()}}

    def start(self, *arguments: object, cwd: pathlib.Path | None = None, **changes: object) -> subprocess.Popen:
        command = [str(self.python), *map(str, arguments)]
        settings = {"env": self.environment(**changes), "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        before = drop_override if self._is_locked else None
        return subprocess.Popen(command, cwd=cwd or self.elsewhere, text=True, start_new_session=True, preexec_fn=before, **settings)

    def _ended(self, process: subprocess.Popen) -> tuple[str, str]:
        """Both streams of a program."""
        try:
            done = processes.communicate(process, self.seconds)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{error}:\n{((error.stdout or '') + (error.stderr or ''))[-3000:]}") from None
        return done.stdout, done.stderr

    def run(self, *arguments: object, **settings: object) -> str:
        """What a Python program printed, both streams; it must succeed."""
        process = self.start(*arguments, **settings)
        output, errors = self._ended(process)
        if process.returncode != 0:
            raise Failed(f"{shlex.join(map(str, arguments))[:200]} ended with {process.returncode}:\n{(output + errors)[-3000:]}")
        return output + errors

    def fails(self, pattern: str, *arguments: object, **settings: object) -> str:
        """The line of the message with which a Python program must fail."""
        process = self.start(*arguments, **settings)
        output, errors = self._ended(process)
        if process.returncode == 0:
            raise Failed(f"{shlex.join(map(str, arguments))[:200]} should have failed")
        return said(output + errors, f".*{pattern}.*")

    def pip(self, *arguments: object, **changes: object) -> str:
        return self.run("-m", "pip", *arguments, **changes)

    def sources(self) -> pathlib.Path:
        folder = self.folder / "the sources"
        return folder if folder.exists() else copy_sources(folder)

    def install_pure(self) -> None:
        self.pip("install", "--no-deps", "--no-build-isolation", self.sources(), RSLOSS_NO_EXT="1")

    def probe(self, backend: str, where: pathlib.Path | None = None, programs: str = "", **changes: object) -> dict:
        """A loss and its gradient against the reference in float64, from outside; `backend` must answer, from a package in `where`.
        `output` of the result is what else was printed."""
        first, _, rest = self.run("-c", PROBE + programs, backend, **changes).partition("\n")
        found = json.loads(first)
        if found["answered"] != backend:
            raise Failed(f"{found['answered']} answered, not {backend}: {found['backends'][backend]}")
        if not pathlib.Path(found["file"]).is_relative_to(where or self.packages):
            raise Failed(f"imported {found['file']}")
        if found["loss"] > 1e-7 or found["gradient"] > 1e-6:
            raise Failed(f"errors of {found['loss']:.1e} and {found['gradient']:.1e}")
        return found | {"output": rest}

    def check(self, backend: str, where: pathlib.Path | None = None, **changes: object) -> dict:
        """`probe`, then the programs that a user runs."""
        found = self.probe(backend, where, PROGRAMS, **changes)
        expect(found["output"], r"(\d+) of \1 checks hold")
        return found

    def at_once(self, count: int, **changes: object) -> list[str]:
        """What each of several processes that import the package at the same time wrote to its error stream."""
        started = [self.start("-c", PROBE, **changes) for _ in range(count)]
        try:
            ended = [(*self._ended(process), process.returncode) for process in started]
        finally:
            for process in started:
                processes.kill(process)
        for output, errors, status in ended:
            if status != 0 or json.loads(output)["answered"] != "cpp":
                raise Failed(f"a process ended with {status}:\n{(output + errors)[-3000:]}")
        return [errors for _, errors, _ in ended]

    def share_cache(self) -> None:
        """The cache of all interpreters of this run, as a user has it."""
        self.cache = self.interpreter.scratch / "a cache"

    def hide(self, names: str) -> None:
        """Takes the programs whose names match off the path."""
        kept = []
        for number, folder in enumerate(self.path.split(os.pathsep)):
            programs = list(pathlib.Path(folder).iterdir()) if pathlib.Path(folder).is_dir() else []
            if any(re.fullmatch(names, program.name) for program in programs):
                folder = self.folder / f"path {number}"
                folder.mkdir()
                for program in programs:
                    if not re.fullmatch(names, program.name):
                        (folder / program.name).symlink_to(program)
            kept.append(str(folder))
        self.path = os.pathsep.join(kept)

    def without_python_headers(self) -> None:
        """As where only the interpreter is installed: it names a folder of headers that is not there, and no compiler sees another."""
        hide = "import sysconfig; sysconfig.get_path = lambda name, *more, path=sysconfig.get_path, **options: "
        hide += "'/no headers' if name == 'include' else path(name, *more, **options)\n"
        (self.packages / "no_headers.pth").write_text(hide)
        tools = self.folder / "tools"
        tools.mkdir()
        drop = 'for word; do shift; case "$word" in -I*/include/python3.*) ;; *) set -- "$@" "$word" ;; esac; done'
        for name in ("c++", "g++", "cc", "gcc"):
            if compiler := shutil.which(name, path=self.path):
                (tools / name).write_text(f'#!/bin/sh\n{drop}\nexec {compiler} "$@"\n')
                (tools / name).chmod(0o755)
        self.path = os.pathsep.join([str(tools), self.path])
        self._before = self._files()

    def lock(self) -> None:
        """Nobody can write what is installed, nor the folder `locked`."""
        reason = why_not_locked(self.folder)
        if reason is not None:
            raise Failed(reason)
        (self.folder / "locked").mkdir()
        self._change_modes(0o555)
        self._is_locked = True

    def unlock(self) -> None:
        if self._is_locked:
            self._is_locked = False
            self._change_modes(0o755)

    def _change_modes(self, mode: int) -> None:
        for path in (self.folder / "locked", self.packages, *self.packages.rglob("*")):
            if path.is_dir() or not path.is_symlink():
                path.chmod(mode)

    def uninstall(self) -> None:
        """Nothing that was not there before may stay."""
        self.pip("uninstall", "-y", "rsloss_kernels")
        left = sorted(str(path) for path in self._files() - self._before)
        if left:
            raise Failed(f"pip uninstall left {len(left)} behind: {', '.join(left[:10])}")

    def _files(self) -> set[pathlib.Path]:
        return {path.relative_to(self.venv) for path in self.venv.rglob("*")}

    def portable(self, message: str) -> str:
        """The message without the folders of this run."""
        names = {self.venv: "<venv>", self.folder / "the sources": "<sources>", self.cache: "<cache>", self.folder: "<folder>",
                 self.interpreter.base: "<torch>", self.interpreter.scratch: "<scratch>"}  # fmt: skip
        for path, name in names.items():
            message = message.replace(str(path), name)
        return re.sub(r"/\S*/pip-[^/]+", "<build>", message)
