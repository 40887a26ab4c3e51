"""What an installation promises: it works with nothing compiled, carries its sources, compiles itself, and says why not."""
import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import zipfile

import install_site
import processes
import pytest
import torch
import torch.utils.cpp_extension

from rsloss_kernels import _build, collect_env

ROOT = pathlib.Path(__file__).resolve().parent.parent
# No program may take longer, also where it compiles the library on a machine with other work.
SECONDS = 600.0
# What other tests of the same run may have set must not decide these.
SWITCHES = (
    *("RSLOSS_BACKEND", "RSLOSS_JIT", "RSLOSS_NO_EXT", "RSLOSS_FORCE_CUDA", "RSLOSS_DEBUG_CHECKS", "TRITON_INTERPRET"),
    *("DEBUG", "CXX", "CC", "PYTHONPATH"),
)
LOSS = (
    "import torch, rsloss_kernels as r; x = torch.randn(20, 4, requires_grad=True); "
    "losses = r.rank_sort_loss(x, torch.arange(20) % 5); sum(losses).backward(); "
    "assert losses.ranking > 0 and x.grad.abs().sum() > 0; print(r.__file__); print(r.backend_report())"
)


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return {**kept, "RSLOSS_JIT": "0", **changes}


def run(*arguments: str, cwd: pathlib.Path, **changes: str) -> subprocess.CompletedProcess:
    """Runs Python; the environment has no switch but `changes`."""
    settings = {"cwd": cwd, "env": environment(**changes)}
    return processes.run([sys.executable, *arguments], SECONDS, **settings)


def report_line(report: str, backend: str) -> str:
    return next(line for line in report.splitlines() if line.startswith(backend))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
    return install_site.copy_sources(tmp_path_factory.mktemp("source") / "a tree")


@pytest.fixture(scope="module")
def pure_wheel(tree, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A wheel built under RSLOSS_NO_EXT=1, and what the build printed."""
    out = tmp_path_factory.mktemp("wheel")
    arguments = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", str(out), str(tree))
    built = run(*arguments, cwd=out, RSLOSS_NO_EXT="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, built.stdout + built.stderr


@pytest.fixture(scope="module")
def installed(pure_wheel, tmp_path_factory) -> pathlib.Path:
    """A folder that holds the pure-Python package as pip would install it."""
    folder = tmp_path_factory.mktemp("installed") / "a site"
    with zipfile.ZipFile(pure_wheel[0]) as wheel:
        wheel.extractall(folder)
    return folder


def clean_site(folder: pathlib.Path) -> install_site.Site:
    """A clean environment that sees this one's packages, and its torch, which may lie elsewhere."""
    packages = "\n".join(dict.fromkeys([sysconfig.get_path("purelib"), str(pathlib.Path(torch.__file__).parents[1])]))
    this = types.SimpleNamespace(command=sys.executable, python=pathlib.Path(sys.executable), packages=packages)
    return install_site.Site(this, folder, SECONDS)


@pytest.fixture
def site(pure_wheel, tmp_path) -> install_site.Site:
    """A clean environment with the pure-Python wheel installed."""
    made = clean_site(tmp_path / "an installation")
    # Not taken for installed because this environment's package can be seen too.
    made.pip("install", "--no-deps", "--ignore-installed", "--no-index", pure_wheel[0])
    yield made
    made.unlock()


def sources() -> set[str]:
    found = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_pure_wheel_carries_the_sources(pure_wheel):
    wheel, _ = pure_wheel
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert not [name for name in names if name.endswith(".so")]
    assert {f"rsloss_kernels/{name}" for name in sources()} <= names
    assert any(name.endswith("/LICENSE") for name in names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rsloss_kernels").rglob("*.py")}
    assert {*modules, "rsloss_kernels/py.typed"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "bench", "python")]


def test_no_extra_names_torch(pure_wheel):
    """Only the package itself asks for torch, by a lower bound: what an extra adds cannot replace the torch that is there."""
    with zipfile.ZipFile(pure_wheel[0]) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    extras = set(re.findall("^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert {"mmdet", "torchvision", "ultralytics", "eval", "bench", "demo", "test", "dev"} <= extras
    wanted = re.findall("^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert [line for line in wanted if re.match(r"torch\b", line)] == ["torch>=2.11"]
    assert [line for line in wanted if "torchvision" in line and "extra" in line]


def test_what_is_imported_is_declared(pure_wheel):
    """torch brings Triton and setuptools along; adapters import their framework, and say which extra has it."""
    with zipfile.ZipFile(pure_wheel[0]) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") and "/integrations/" not in name]
        nodes = [node for name in names for node in ast.walk(ast.parse(archive.read(name)))]
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    imported = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"rsloss_kernels", "triton", "setuptools"}
    declared = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE))
    assert "torch" in imported <= {name.replace("-", "_") for name in declared}


def test_build_prints_every_switch_and_how_to_compile(pure_wheel):
    _, printed = pure_wheel
    assert "RSLOSS_NO_EXT=1" in printed
    for switch in ("RSLOSS_FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "DEBUG", "CXX", "MAX_JOBS"):
        assert f"{switch}=" in printed
    assert re.search("nothing is compiled: RSLOSS_NO_EXT is set.*pip install --no-build-isolation", printed)


def test_sdist_holds_what_a_build_and_the_tests_need(tree, tmp_path):
    made = run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=tree)
    assert made.returncode == 0, made.stdout + made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {member.name.split("/", 1)[1] for member in sdist.getmembers() if member.isfile()}
    assert sources() <= names
    listing = subprocess.run(["git", "ls-files", "tests", "requirements", "python"], cwd=ROOT, capture_output=True, text=True)
    wanted = set(listing.stdout.split()) if listing.returncode == 0 else {"tests/test_packaging.py"}
    assert {name for name in wanted if (ROOT / name).exists()} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "README.md"} <= names
    assert {"rsloss_kernels/_build.py", "rsloss_kernels/py.typed"} <= names


def test_nothing_compiled_still_works_and_says_so(installed):
    done = run("-c", LOSS, cwd=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "yes" in report_line(done.stdout, "reference")
    assert "was not compiled" in report_line(done.stdout, "cpp") and "pip install" in report_line(done.stdout, "cpp")
    assert "was not compiled" in report_line(done.stdout, "cuda")


def test_a_user_without_a_home_folder_can_import(installed):
    """Containers run under user ids that no file knows."""
    forget = "import os, pathlib\nos.environ.pop('XDG_CACHE_HOME', None), os.environ.pop('TORCH_EXTENSIONS_DIR', None)\n"
    forget += "def home(*arguments): raise RuntimeError('Could not determine home directory.')\npathlib.Path.home = home\n"
    done = run("-c", forget + LOSS, cwd=installed, RSLOSS_JIT="")
    assert done.returncode == 0, done.stderr
    assert "home directory" in report_line(done.stdout, "cpp")


BACKENDS = """
import os, sys
import torch
for name in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        os.environ["RSLOSS_BACKEND"] = name
        os.dup2(1, 2)
        try:
            exec(sys.argv[1])
        except Exception:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_forced_backend_that_is_missing_or_unknown_raises(installed):
    # One process imports torch for all.
    done = run("-c", BACKENDS, LOSS, "cpp", "cuda", "reference", "fast", cwd=installed)
    assert done.returncode == 0, done.stderr
    of_cpp, of_cuda, of_reference, of_unknown, rest = re.split(r"(?m)(?<=^ended with \d)\n", done.stdout)
    assert not rest
    for name, printed in (("cpp", of_cpp), ("cuda", of_cuda)):
        assert re.search(f"RuntimeError: .*'{name}' was asked for but cannot run.*was not compiled", printed), printed
    assert "forced: reference" in of_reference
    assert "ValueError: RSLOSS_BACKEND: backend must be one of reference, cpp, cuda, triton, got 'fast'" in of_unknown
    assert [printed[-1] for printed in (of_cpp, of_cuda, of_reference, of_unknown)] == ["1", "1", "0", "1"]


def test_compiles_itself_once_for_many_processes(installed, tmp_path):
    # Not optimised, which compiles in a third of the time.
    changes = {"RSLOSS_JIT": "1", "RSLOSS_BACKEND": "cpp", "TORCH_EXTENSIONS_DIR": str(tmp_path), "DEBUG": "1"}
    settings = {"cwd": installed, "env": environment(**changes), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    many = [subprocess.Popen([sys.executable, "-c", LOSS], text=True, start_new_session=True, **settings) for _ in range(2)]
    try:
        messages = [processes.communicate(process, SECONDS).stderr for process in many]
    finally:
        for process in many:
            processes.kill(process)
    assert [process.returncode for process in many] == [0, 0], messages
    assert sum("compiling _ops_cpu" in message for message in messages) == 1
    assert len(list(tmp_path.rglob("_ops_cpu.so"))) == 1
    # Without the switch the next import finds it in the cache; with changed sources it does not.
    assert run("-c", LOSS, cwd=installed, **{**changes, "RSLOSS_JIT": ""}).returncode == 0
    changed = tmp_path / "changed"
    shutil.copytree(installed, changed)
    with open(changed / "rsloss_kernels" / "csrc" / "ranking" / "ranking.h", "a") as header:
        header.write("// another line\n")
    stale = run("-c", LOSS, cwd=changed, **{**changes, "RSLOSS_JIT": ""})
    assert stale.returncode != 0 and "was not compiled" in stale.stderr


@pytest.mark.parametrize(
    "compiler, why",
    [("/bin/false", "failed with exit code"), ("/no/such/compiler", r"there is no C\+\+ compiler")],
    ids=["fails", "missing"],
)
def test_failed_compilation_names_both_causes(installed, tmp_path, compiler, why):
    done = run("-c", LOSS, cwd=installed, RSLOSS_JIT="1", CXX=compiler, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode != 0
    assert re.search(f"ImportError: .*Nothing precompiled was loaded: it was not compiled.*which failed: .*{why}", done.stderr)
    assert not list(tmp_path.rglob("*.so"))


def test_root_that_keeps_its_rights_is_noticed(monkeypatch, tmp_path):
    """Where it may not give them up, and so could write what is read-only."""
    monkeypatch.setattr(install_site.ctypes, "CDLL", lambda _: types.SimpleNamespace(prctl=lambda *_: -1))
    closed = tmp_path / "read-only"
    closed.mkdir(mode=0o555)
    assert (install_site.why_not_locked(tmp_path) is not None) == os.access(closed, os.W_OK)


def test_a_read_only_installation_works_tells_of_a_read_only_cache_and_leaves_nothing(site):
    reason = install_site.why_not_locked(site.folder)
    if reason is not None:
        pytest.skip(reason)
    site.lock()
    site.probe("reference", RSLOSS_JIT="")
    site.cache = site.folder / "locked" / "cache"
    refused = "ImportError: .*it was not compiled.*which failed: the cache folder cannot be used .*Permission denied"
    site.fails(refused, "-c", "import rsloss_kernels", RSLOSS_JIT="1")
    site.unlock()
    site.probe("reference")
    assert list(site.package.rglob("__pycache__"))
    site.uninstall()


def test_build_without_a_compiler_installs_the_pure_package(site, tree):
    site.hide(install_site.COMPILERS)
    printed = site.run("setup.py", "build", "--build-base", site.folder / "built", cwd=tree)
    install_site.expect(printed, r"nothing is compiled: there is no C\+\+ compiler 'c\+\+'\. .*python -m rsloss_kernels.build")
    assert (site.folder / "built" / "lib" / "rsloss_kernels" / "csrc" / "ranking" / "ranking.h").exists()


ONE_SOURCE = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import _build
source = pathlib.Path(sys.argv[2], "one source.cpp")
source.write_text('extern "C" int answer() { return 42; }')
_build.cpu_sources = lambda root: [source]
_build.compile_into("_ops_cpu", pathlib.Path(sys.argv[2], "made"))
import ctypes
print("answer", ctypes.CDLL(str(pathlib.Path(sys.argv[2], "made", "_ops_cpu.so"))).answer())
"""


@pytest.mark.parametrize("hidden", ["", "ninja"], ids=["ninja", "no-ninja"])
def test_compiles_in_folders_with_spaces_with_ninja_and_without(tmp_path, hidden):
    # The way of the real sources with one that compiles in a moment.
    site = clean_site(tmp_path / "a folder")
    site.hide(hidden)
    (site.folder / "made").mkdir()
    printed = site.run("-c", ONE_SOURCE, ROOT / "rsloss_kernels", site.folder)
    install_site.expect(printed, "(?m)^answer 42$")
    assert ("could not find ninja" in printed) == bool(hidden)


def test_a_missing_setuptools_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    assert re.match("torch compiles by setuptools, which cannot be imported.*pip install setuptools", _build.why_not_native())


def test_a_compiler_in_a_folder_with_spaces_tells_its_version(monkeypatch, tmp_path):
    compiler = tmp_path / "a folder" / "c++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho the compiler $1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{compiler}' -pipe")
    assert collect_env._compiler() == "the compiler -pipe"


def test_missing_headers_of_python_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "no headers"))
    wanted = f"Python's headers are not installed: there is no {tmp_path / 'no headers' / 'Python.h'}"
    assert _build.why_no_report() == wanted


def test_toolkits_that_cannot_compile_for_this_torch_are_told(monkeypatch, tmp_path):
    def reason(toolkit):
        monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", toolkit and str(toolkit))
        return _build.why_not_cuda()

    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason(tmp_path) == "this torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reason(None) == "no CUDA toolkit was found (neither CUDA_HOME nor nvcc)"
    # As in containers that run CUDA but do not compile it.
    assert reason(tmp_path) == f"the CUDA toolkit in {tmp_path} has no compiler: there is no {tmp_path / 'bin' / 'nvcc'}"
    for release, wanted in (("12.9", f"is of CUDA 12.9, this torch of CUDA {torch.version.cuda}"), ("13.2", None), ("?", None)):
        toolkit = install_site.toolkit(tmp_path / release, release)
        assert reason(toolkit) == (wanted and f"{toolkit / 'bin' / 'nvcc'} {wanted}")


def test_an_nvcc_that_does_not_run_is_told(monkeypatch, tmp_path):
    """Not executable, made for another system, without its interpreter, failing: none keeps the rest from being installed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    kinds = {
        "Permission denied": (b"", 0o644),
        "Exec format error": (b"\x7fELF of another system", 0o755),
        "No such file or directory": (b"#!/no/such/interpreter\n", 0o755),
        "exit status 3": (b"#!/bin/sh\necho no driver >&2\nexit 3\n", 0o755),
    }
    for place, (words, (content, mode)) in enumerate(kinds.items()):
        nvcc = install_site.toolkit(tmp_path / str(place), "13.0") / "bin" / "nvcc"
        nvcc.write_bytes(content)
        nvcc.chmod(mode)
        monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path / str(place)))
        assert _build.why_not_cuda() == f"{nvcc} does not run ({words})" + (": no driver" if "3" in words else "")
        assert f"CUDA toolkit    {_build.why_not_cuda()}" in collect_env._versions()


def test_another_nvcc_does_not_replace_that_of_the_toolkit(monkeypatch, tmp_path):
    """PYTORCH_NVCC names what compiles, for ccache; torch wants the toolkit's own beside it."""
    wrapper = install_site.toolkit(tmp_path / "wrapper", "13.0") / "bin" / "nvcc"
    monkeypatch.setenv("PYTORCH_NVCC", str(wrapper))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    assert "has no compiler" in _build.why_not_cuda()
    with pytest.raises(FileNotFoundError, match="nvcc not found"):
        torch.utils.cpp_extension._check_cuda_version("g++", "12.2.0")


def test_versions_are_told_without_setuptools(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    assert any(re.match("CUDA toolkit +torch compiles by setuptools, which cannot be imported", line) for line in collect_env._versions())


def test_a_compiler_that_does_not_run_and_a_missing_home_folder_are_told(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_bytes(b"\x7fELF of another system")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert collect_env._compiler() == f"{compiler} does not run (Exec format error)"
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home folder")))
    assert collect_env._libraries()[-1] == "cache cannot be used: no home folder"


def test_library_that_does_not_load_is_reported(installed, tmp_path):
    broken = tmp_path / "site"
    shutil.copytree(installed, broken)
    (broken / "rsloss_kernels" / "_ops_cpu.so").write_bytes(b"not a library")
    done = run("-c", LOSS, cwd=broken)
    assert done.returncode == 0, done.stderr
    assert "_ops_cpu.so did not load" in report_line(done.stdout, "cpp")


def test_forced_cuda_build_fails_clearly(tree, tmp_path):
    done = run("setup.py", "build_ext", "--build-lib", str(tmp_path), cwd=tree, RSLOSS_FORCE_CUDA="1", RSLOSS_NO_EXT="1")
    assert done.returncode != 0
    assert "RSLOSS_FORCE_CUDA is set, but the CUDA library cannot be compiled: RSLOSS_NO_EXT is set" in done.stderr


def test_build_without_torch_installs_the_pure_package(tree, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch in this environment')\n")
    done = run("setup.py", "build", "--build-base", str(tmp_path / "b"), cwd=tree, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search("nothing is compiled: torch cannot be imported.*--no-build-isolation", done.stderr)
    assert (tmp_path / "b" / "lib" / "rsloss_kernels" / "csrc" / "ranking" / "ranking.h").exists()


def test_import_brings_in_nothing_heavy(installed):
    script = "import sys, torch; before = set(sys.modules); import rsloss_kernels; print(*sorted(set(sys.modules) - before))"
    added = run("-c", script, cwd=installed).stdout.split()
    assert "rsloss_kernels" in added
    heavy = ("triton", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "setuptools", "sympy")
    frameworks = ("mmcv", "mmdet", "mmengine", "torchvision", "ultralytics")
    assert not [name for name in added if name.startswith((*heavy, *frameworks))]


def test_a_missing_framework_is_told_with_the_extra_that_brings_it():
    script = """
import importlib, sys
sys.modules.update(dict.fromkeys(["mmdet", "torchvision", "ultralytics"]))
for name in ("mmdet", "torchvision", "ultralytics"):
    try:
        importlib.import_module("rsloss_kernels.integrations." + name)
    except ModuleNotFoundError as error:
        print(error)
"""
    lines = run("-c", script, cwd=ROOT).stdout.splitlines()
    # MMDetection cannot be imported without mmcv, which is told first where it is missing too.
    for line, name in zip(lines, ("(mmdet|mmcv)", "torchvision", "ultralytics"), strict=True):
        extra = name.strip("()").split("|")[0]
        assert re.match(rf'rsloss_kernels.integrations.{extra} needs {name}: pip install "rsloss_kernels\[{extra}\]"', line), line
    assert "mmcv-lite" in lines[0]


@pytest.mark.parametrize("program", ["collect_env", "selfcheck"])
def test_programs_succeed_and_say_that_a_checkout_hides_the_installed_package(tmp_path, program):
    site = tmp_path.resolve()
    for path in (site / "rsloss_kernels" / "__init__.py", site / "rsloss_kernels-0.0.dist-info" / "METADATA"):
        path.parent.mkdir()
        path.write_text("Metadata-Version: 2.1\nName: rsloss_kernels\nVersion: 0.0\n" if path.name == "METADATA" else "")
    done = run("-m", f"rsloss_kernels.{program}", cwd=ROOT, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {"collect_env": ["torch ", "backends", "RSLOSS_BACKEND"], "selfcheck": ["ok   rank_sort_loss", "checks hold"]}
    assert all(words in done.stdout for words in wanted[program])
    assert "FAIL" not in done.stdout
    assert f"{ROOT / 'rsloss_kernels'}, which hides the one installed in {site / 'rsloss_kernels'}: " in done.stdout
    assert "hides" not in collect_env.package()


def test_selfcheck_ends_quietly_when_its_reader_does():
    command = [sys.executable, "-m", "rsloss_kernels.selfcheck"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


def test_selfcheck_fails_for_a_required_backend_that_is_missing(installed):
    done = run("-m", "rsloss_kernels.selfcheck", "--backends", "cpp", cwd=installed)
    assert done.returncode == 1
    assert "FAIL backend cpp is required but cannot run: it was not compiled" in done.stdout


CUDA_RULES = """
import sys, torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled, torch.cuda.is_available = lambda: True, lambda: False
sys.path.insert(0, "rsloss_kernels")
import _build
made = _build.extension("_ops_cuda", _build.source_root(), _build.PACKAGE.parent)
print(_build.why_not_cuda(), made.name, *made.sources, *made.libraries)
print(made.extra_compile_args["nvcc"])
import os; print("architectures", os.environ["TORCH_CUDA_ARCH_LIST"])
"""


def test_cuda_library_takes_the_cuda_sources_and_the_architectures_of_nvcc(tree, tmp_path):
    # As on a machine whose torch has CUDA, with an nvcc that knows two of the default architectures.
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_75 compute_80 compute_90\n")
    nvcc.chmod(0o755)
    done = run("-c", CUDA_RULES, cwd=tree, CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:2] == ["None", "rsloss_kernels._ops_cuda"]
    wanted = {name for name in sources() if name.endswith((".cu", "_cuda.cpp"))}
    assert wanted and wanted <= set(words) and not [word for word in words if word.endswith("_cpu.cpp")]
    assert "-DUSE_CUDA" in done.stdout and "torch_cuda" in words
    assert "architectures 8.0;9.0+PTX" in done.stdout
    done = run("-c", CUDA_RULES, cwd=tree, CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST="9.0")
    assert "architectures 9.0\n" in done.stdout


def test_debug_switch_changes_the_flags(tree):
    script = "import sys; sys.path.insert(0, 'rsloss_kernels'); import _build; print(*_build.cxx_flags(), *_build.nvcc_flags())"
    plain, debug = (run("-c", script, cwd=tree, **changes).stdout.split() for changes in ({}, {"DEBUG": "1"}))
    assert "-O3" in plain and "-O0" not in plain
    assert "-O0" in debug and "-g" in debug and "-O3" not in debug
    assert not {"-ffast-math", "-march=native", "--use_fast_math"} & {*plain, *debug}
