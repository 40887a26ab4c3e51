"""Compiles the libraries where torch and a compiler are at hand; else installs the pure-Python package, and says how."""
import importlib.util
import os
import pathlib
import sys

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}


def load_build_rules():
    spec = importlib.util.spec_from_file_location("rsloss_build_rules", ROOT / "rsloss_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(line: str) -> None:
    print(f"rsloss_kernels: {line}", file=sys.stderr, flush=True)


def native_parts(rules) -> dict:
    """The keywords `ext_modules` and `cmdclass` of setup; none for a pure-Python install."""
    for line in rules.switch_lines():
        say(line)
    reason = rules.why_not_native()
    no_cuda = reason or rules.why_not_cuda()
    if rules.is_on("RSLOSS_FORCE_CUDA") and no_cuda is not None:
        raise SystemExit(f"rsloss_kernels: RSLOSS_FORCE_CUDA is set, but the CUDA library cannot be compiled: {no_cuda}")
    if reason is not None:
        say(f"nothing is compiled: {reason}. The package works without; {rules.HOW_TO_COMPILE}")
        return {}

    say(f"CPU library: {rules.compiler()} {' '.join(rules.cxx_flags())}")
    stems = [rules.LIBRARIES["cpp"]]
    if no_cuda is None:
        stems.append(rules.LIBRARIES["cuda"])
    else:
        say(f"no CUDA library: {no_cuda}")
    extensions = [rules.extension(stem, ROOT / "csrc", ROOT) for stem in stems]
    if no_cuda is None:
        say(f"CUDA library: nvcc {' '.join(rules.nvcc_flags())}, architectures {os.environ['TORCH_CUDA_ARCH_LIST']}")
    no_report = rules.why_no_report()
    if no_report is None:
        extensions.append(rules.report_extension(ROOT / "csrc", ROOT))
    else:
        say(f"no build report: {no_report}")
    return {"ext_modules": extensions, "cmdclass": {"build_ext": rules.build_ext_command()}}


# The sources travel in the package as rsloss_kernels/csrc, so that an installed one can compile itself.
source_packages = [
    ".".join(["rsloss_kernels", "csrc", *folder.relative_to(ROOT / "csrc").parts])
    for folder in [ROOT / "csrc", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_dir())]
]
setup(
    license="Apache-2.0",
    packages=find_packages(include=["rsloss_kernels", "rsloss_kernels.*"]) + source_packages,
    package_dir={"rsloss_kernels": "rsloss_kernels", "rsloss_kernels.csrc": "csrc"},
    package_data={"": ["*.md", "py.typed"], **{name: ["*.h", "*.cuh", "*.cpp", "*.cu"] for name in source_packages}},
    **(native_parts(load_build_rules()) if BUILDING & set(sys.argv) else {}),
)
