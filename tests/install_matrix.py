"""Installs the package in every way it can be had, in clean virtual environments of several interpreters, and uses each from outside.

    python -m tests.install_matrix --pythons python3.10 python3.13 --torch torch==2.13.0 --out docs/install_matrix.md
    python -m tests.install_matrix --pythons python3.12 --only jit parallel --venvs FOLDER

Per interpreter one environment holds torch and the tools of tests (`--venvs` keeps it, and takes one that is there). Every mode gets
a clean one that sees it, a copy of the sources in a folder with spaces, and a cache of its own, and ends with `pip uninstall`, after
which not one file may be left. Prints a row per interpreter and mode with the message that a user sees; `--out` writes the table of
all rows that `--venvs` has seen. Exit status 1 if a row failed. What the modes share is in install_site.py.
"""
import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from install_site import COMPILERS, ROOT, Failed, Interpreter, Site, copy_sources, expect, said, toolkit  # noqa: E402

TESTS = ("test_rank_sort.py", "test_focal_values.py", "test_ghm_values.py", "test_ops.py")
MODES: dict[str, Callable[[Site], str]] = {}
# Not optimised, where what is compiled is not the point: a third of the time.
QUICK = {"DEBUG": "1"}


def mode(name: str) -> Callable:
    return lambda function: MODES.setdefault(name, function)


@mode("wheel")
def wheel(site: Site) -> str:
    """Wheel with the compiled library, as optimised as it ships"""
    site.pip("install", "--no-deps", str(site.interpreter.wheel()))
    site.check("cpp")
    return said(site.interpreter.wheel_log, "CPU library: .*")


@mode("no-ext")
def without_extension(site: Site) -> str:
    """`RSLOSS_NO_EXT=1 pip install`"""
    log = site.pip("install", "-v", "--no-deps", "--no-build-isolation", site.sources(), RSLOSS_NO_EXT="1")
    report = site.check("reference")
    expect(report["backends"]["cpp"], "it was not compiled; .*python -m rsloss_kernels.build")
    site.fails("it was not compiled", "-c", "import rsloss_kernels as r, torch; r.average_precision_loss(torch.rand(2), torch.rand(2))",
               RSLOSS_BACKEND="cpp")  # fmt: skip
    return said(log, "nothing is compiled: .*")


@mode("isolated")
def isolated(site: Site) -> str:
    """`pip install .`, which hides torch from the build"""
    log = site.pip("install", "-v", "--no-deps", site.sources())
    site.check("reference")
    return said(log, "nothing is compiled: torch cannot be imported.*")


@mode("sdist")
def sdist(site: Site) -> str:
    """Source archive, installed from outside of the checkout"""
    tree, folder = site.sources(), site.folder / "archive"
    site.run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=tree)
    shutil.rmtree(tree)
    (archive,) = folder.glob("*.tar.gz")
    log = site.pip("install", "-v", "--no-deps", "--no-build-isolation", archive, **QUICK)
    site.check("cpp")
    return said(log, "CPU library: .*")


@mode("editable")
def editable(site: Site) -> str:
    """`pip install -e`, which compiles beside the sources"""
    tree = site.sources()
    site.pip("install", "-v", "--no-deps", "--no-build-isolation", "-e", tree, **QUICK)
    report = site.check("cpp", tree)
    expect(report["library"], re.escape(str(tree)))
    return f"loaded {report['library']}"


@mode("no-ninja")
def without_ninja(site: Site) -> str:
    """No ninja: one compiler process after the other"""
    site.hide("ninja")
    log = site.pip("install", "-v", "--no-deps", "--no-build-isolation", site.sources(), **QUICK)
    site.check("cpp")
    return expect(log, "Attempted to use ninja .*")


@mode("parallel")
def parallel(site: Site) -> str:
    """First imports of 4 processes at once, `RSLOSS_JIT=1`"""
    site.install_pure()
    messages = site.at_once(4, RSLOSS_JIT="1", RSLOSS_BACKEND="cpp", **QUICK)
    compiled = [line for message in messages for line in message.splitlines() if "compiling _ops_cpu" in line]
    if len(compiled) != 1:
        raise Failed(f"compiled {len(compiled)} times: {compiled}")
    return compiled[0]


@mode("jit")
def jit(site: Site) -> str:
    """Compiled on first use, found in the cache afterwards, beside those of other sources and other torches"""
    site.install_pure()
    site.share_cache()
    others = {path.name for path in site.cache.glob("rsloss_kernels/_ops_cpu-*.so")}
    log = site.run("-m", "rsloss_kernels.build", **QUICK)
    expect(log, r"_ops_cpu: .*_ops_cpu\.so")
    site.check("cpp", **QUICK)
    # Other sources are another library: the package does not take what was compiled from these.
    header = site.package / "csrc" / "ranking" / "ranking.h"
    text = header.read_text()
    header.write_text(text + "// another line\n")
    expect(site.probe("reference", **QUICK)["backends"]["cpp"], "it was not compiled")
    header.write_text(text)
    site.check("cpp", **QUICK)
    kept = sorted(path.name for path in (site.cache / "rsloss_kernels").iterdir() if path.is_dir())
    if not others <= set(kept):
        raise Failed(f"the cache lost {others - set(kept)}")
    return f"{len(kept)} in one cache: {', '.join(kept)}"


@mode("no-compiler")
def without_compiler(site: Site) -> str:
    """No C++ compiler: installs without the library; `RSLOSS_JIT=1` refuses"""
    site.hide(COMPILERS)
    log = site.pip("install", "-v", "--no-deps", "--no-build-isolation", site.sources())
    site.check("reference")
    expect(log, r"nothing is compiled: there is no C\+\+ compiler 'c\+\+'\. The package works without; .*pip install")
    return site.fails(r"ImportError: .*which failed: there is no C\+\+ compiler", "-c", "import rsloss_kernels", RSLOSS_JIT="1")


@mode("no-headers")
def without_headers(site: Site) -> str:
    """No headers of Python: the library is compiled, the build report is left out"""
    site.without_python_headers()
    log = site.pip("install", "-v", "--no-deps", "--no-build-isolation", site.sources(), **QUICK)
    expect(site.check("cpp")["output"], "none: nothing was compiled when the package was installed, or Python's headers were missing")
    return said(log, "no build report: .*")


@mode("read-only")
def read_only(site: Site) -> str:
    """Read-only site-packages: compiles into the cache; says so where that is read-only too"""
    site.install_pure()
    site.share_cache()
    site.lock()
    site.check("cpp", RSLOSS_JIT="1", **QUICK)
    site.cache = site.folder / "locked" / "cache"
    return site.fails("ImportError: .*the cache folder cannot be used", "-c", "import rsloss_kernels", RSLOSS_JIT="1", **QUICK)


@mode("cuda")
def cuda(site: Site) -> str:
    """A CUDA toolkit: the CUDA library where torch has CUDA, else the reason"""
    found = site.interpreter.toolkit()
    refused = "RSLOSS_FORCE_CUDA is set, but the CUDA library cannot be compiled: "
    arguments = ("-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation")
    if not site.interpreter.cuda:
        return site.fails(f"{refused}this torch was built without CUDA", *arguments, site.sources(), RSLOSS_FORCE_CUDA="1")
    site.fails(f"{refused}.* has no compiler", *arguments, site.sources(), RSLOSS_FORCE_CUDA="1")
    older = toolkit(site.folder / "older", "1.0")
    site.fails(f"{refused}.* is of CUDA 1.0, this torch of", *arguments, site.sources(), RSLOSS_FORCE_CUDA="1", CUDA_HOME=older)
    if found is None:
        return "no CUDA library: no CUDA toolkit on this machine"
    log = site.pip(*arguments[2:], site.sources(), CUDA_HOME=found, RSLOSS_FORCE_CUDA="1")
    report = site.check("cpp")
    expect(report["output"], r"cuda  .*_ops_cuda\.so")
    expect(report["output"], r"cuda architectures +\S*\d\.\d")
    return said(log, "CUDA library: .*")


@mode("tests")
def tests(site: Site) -> str:
    """A part of the test suite, on the installed wheel"""
    tree = site.sources()
    site.pip("install", "--no-deps", str(site.interpreter.wheel()))
    files = [str(tree / "tests" / name) for name in TESTS]
    log = site.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, RSLOSS_TEST_BACKENDS="cpp,reference")
    return log.strip().splitlines()[-1].strip("= ")


def run_mode(name: str, interpreter: Interpreter, folder: pathlib.Path) -> dict:
    """The row of one mode: what was seen, or what failed."""
    start = time.monotonic()
    row = {"python": interpreter.version, "torch": interpreter.torch, "mode": name, "what": MODES[name].__doc__.split("\n")[0]}
    site = Site(interpreter, folder)
    try:
        seen = MODES[name](site)
        site.unlock()
        site.uninstall()
        row |= {"ok": True, "message": site.portable(seen)}
    except Exception as error:
        words = str(error) if isinstance(error, Failed) else traceback.format_exc()
        row |= {"ok": False, "message": site.portable(words)}
    return row | {"seconds": round(time.monotonic() - start)}


def refused(command: str, folder: pathlib.Path) -> dict | None:
    """The row of an interpreter that is older than the package wants; None for others."""
    version = subprocess.run([command, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True)
    wanted = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    if tuple(map(int, version.stdout.split(".")[:2])) >= tuple(map(int, wanted)):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([command, "-m", "venv", str(folder)], check=True)
    sources = copy_sources(folder / "the sources")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-deps", str(sources)]
    done = subprocess.run(pip, capture_output=True, text=True)
    found = re.search("ERROR: (Package .* requires a different Python: .*)", done.stderr)
    message = found[1] if found else (done.stdout + done.stderr)[-1000:]
    row = {"python": version.stdout.strip(), "torch": "-", "mode": "refused", "what": "An interpreter that is too old", "seconds": 0}
    return row | {"ok": bool(found) and done.returncode != 0, "message": message}


def table(rows: list[dict]) -> str:
    """All rows in Markdown: one column per interpreter, then what a user sees in each mode."""
    pythons = sorted({(row["python"], row["torch"]) for row in rows}, key=lambda pair: tuple(map(int, pair[0].split("."))))
    modes = list(dict.fromkeys(name for name in (*MODES, "refused") if any(row["mode"] == name for row in rows)))
    found = {(row["mode"], row["python"]): row for row in rows}
    heads = [f"{python}, torch {torch}" if torch != "-" else python for python, torch in pythons]
    lines = [f"| mode | what | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for name in modes:
        cells = [found.get((name, python)) for python, _ in pythons]
        words = ["-" if cell is None else "ok" if cell["ok"] else "**FAILED**" for cell in cells]
        lines.append(f"| {name} | {next(filter(None, cells))['what']} | {' | '.join(words)} |")
    lines += ["", "What a user sees:", "", "| mode | Python | message |", "|---|---|---|"]
    for name in modes:
        messages: dict[str, list[str]] = {}
        for python, _ in pythons:
            if (name, python) in found:
                text = " ".join(found[name, python]["message"].split()).replace("|", "\\|")
                messages.setdefault(text, []).append(python)
        lines += [f"| {name} | {', '.join(seen)} | {text} |" for text, seen in messages.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.install_matrix", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="interpreters (default: this one)")
    parser.add_argument("--torch", default="torch", help="arguments of pip that install torch (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--venvs", type=pathlib.Path, help="folder that keeps the environments with torch, and the rows")
    parser.add_argument("--out", type=pathlib.Path, help="Markdown file to write; its text before the first table stays")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.venvs or pathlib.Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "rows").mkdir(exist_ok=True)
        ran = [row for command in arguments.pythons for row in run_interpreter(command, arguments, scratch)]
        rows = [json.loads(path.read_text()) for path in sorted((scratch / "rows").iterdir())]
    if arguments.out:
        before = arguments.out.read_text().split("\n| mode |")[0] + "\n" if arguments.out.exists() else ""
        arguments.out.write_text(before + table(rows))
    failed = sum(not row["ok"] for row in ran)
    print(f"{len(ran) - failed} of {len(ran)} modes hold")
    return int(failed > 0)


def run_interpreter(command: str, arguments: argparse.Namespace, scratch: pathlib.Path) -> list[dict]:
    def tell(row: dict) -> dict:
        (scratch / "rows" / f"{row['python']} {row['mode']}.json").write_text(json.dumps(row))
        state = "ok    " if row["ok"] else "FAILED"
        print(f"{state} {row['python']:<8} {row['torch']:<12} {row['mode']:<12} {row['seconds']:>4} s  {row['message']}", flush=True)
        return row

    too_old = refused(command, scratch / "refused")
    if too_old:
        return [tell(too_old)]
    interpreter = Interpreter(command, arguments.torch, scratch)
    return [tell(run_mode(name, interpreter, scratch / "sites" / interpreter.version / name)) for name in arguments.only]


if __name__ == "__main__":
    sys.exit(main())
