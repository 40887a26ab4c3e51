"""`python -m rsloss_kernels.build` compiles what can be compiled here into the user's cache, where the next import finds it."""
import argparse
import sys

from rsloss_kernels import _build, _ext, _jit


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m rsloss_kernels.build", description=__doc__).parse_args(argv)
    failed = False
    for backend, stem in _build.LIBRARIES.items():
        if _ext.is_installed(backend):
            print(f"{stem}: {_ext.loaded_library(backend)}, installed with the package")
            continue
        reason = _jit.why_not(backend)
        is_optional = backend == "cuda" and not _build.is_on("RSLOSS_FORCE_CUDA")
        if reason is not None and is_optional:
            print(f"{stem}: left out: {reason}")
            continue
        try:
            print(f"{stem}: {_jit.compiled(backend)}")
        except RuntimeError as error:
            failed = True
            print(f"{stem}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
