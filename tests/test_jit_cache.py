"""A library in the cache is code that will run: only what nobody else can have written is loaded."""
import os
import pathlib
import re
import shutil
import subprocess

import install_site
import pytest
import torch
import torch.utils.cpp_extension

from rsloss_kernels import _build, _ext, _jit

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")


@pytest.fixture
def library(tmp_path, monkeypatch) -> pathlib.Path:
    """A file where the library compiled from these sources would lie."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    folder = _jit.cache() / _build.fingerprint("_ops_cpu")
    folder.mkdir(parents=True)
    for made in (folder.parent.parent, folder.parent, folder):
        made.chmod(0o700)
    file = folder / "_ops_cpu.so"
    file.write_bytes(b"")
    file.chmod(0o755)
    return file


def test_what_the_user_alone_can_write_is_found(library):
    assert _jit.cached("cpp") == library


@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("depth", [0, 1, 2], ids=["library", "folder", "cache"])
def test_what_others_can_write_is_not_loaded(library, depth, mode):
    part = [library, *library.parents][depth]
    part.chmod(mode)
    with pytest.raises(RuntimeError, match=rf"{re.escape(str(part))} can be written by other users \(mode {mode:04o}\): .*chmod go-w"):
        _jit.cached("cpp")
    reason = _ext._from_cache("cpp", "it was not compiled")
    assert "its cache cannot be used" in reason and str(part) in reason


def test_a_folder_that_everyone_can_write_must_be_sticky(library):
    way = library.parents[2]
    way.chmod(0o777)
    with pytest.raises(RuntimeError, match="can be written by other users"):
        _jit.cached("cpp")
    way.chmod(0o1777)
    assert _jit.cached("cpp") == library


def test_what_belongs_to_another_user_is_not_loaded(library, monkeypatch):
    # Root's own files are trusted, so the user must be neither.
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    owner = library.stat().st_uid
    if owner == 0:
        assert _jit.cached("cpp") == library
        stat = pathlib.Path.stat
        monkeypatch.setattr(pathlib.Path, "stat", lambda path, **options: _owned_by(stat(path, **options), 54321))
        owner = 54321
    with pytest.raises(RuntimeError, match=f"belongs to user {owner}, not to the user of this process, 12345"):
        _jit.cached("cpp")


def _owned_by(status: os.stat_result, user: int) -> os.stat_result:
    return os.stat_result([user if place == 4 else value for place, value in enumerate(status)])


def test_nothing_is_compiled_into_a_cache_that_others_can_write(library, monkeypatch):
    library.unlink()
    _jit.cache().chmod(0o777)
    monkeypatch.setattr(_jit, "_compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(RuntimeError, match="the cache folder cannot be used .*can be written by other users"):
        _jit.compiled("cpp")


def pretend(stem: str, target: pathlib.Path) -> None:
    """In place of compiling."""
    target.mkdir()
    (target / f"{stem}.so").write_bytes(b"")
    for made in (target, target / f"{stem}.so"):
        made.chmod(0o755)


def test_versions_lie_side_by_side(tmp_path, monkeypatch):
    """Of torch, of flags and of sources: each is compiled once and found again, wherever the package lies."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    compiled = []
    monkeypatch.setattr(_jit, "_compile", lambda stem, target: (compiled.append(target), pretend(stem, target)))
    moved = tmp_path / "moved" / "csrc"
    shutil.copytree(_build.source_root(), moved)
    changed = tmp_path / "changed" / "csrc"
    shutil.copytree(moved, changed)
    with open(changed / "ranking" / "ranking.h", "a") as header:
        header.write("// another line\n")

    def library(name=None, value=None):
        with monkeypatch.context() as other:
            if name is not None:
                other.setattr(*name, value) if isinstance(name, tuple) else other.setenv(name, value)
            return _jit.compiled("cpp")

    own = library()
    torches, flags = library((torch, "__version__"), "2.11.0"), library("DEBUG", "1")
    sources = library((_build, "source_root"), lambda: changed)
    assert len({own, torches, flags, sources}) == len(compiled) == 4
    assert all(path.exists() for path in (own, torches, flags, sources)) and "torch2.11.0" in torches.parent.name
    assert [library(), library("DEBUG", "1"), library((_build, "source_root"), lambda: moved)] == [own, flags, own]
    assert len(compiled) == 4


def test_a_library_of_the_cache_asks_for_no_compiler(tmp_path, monkeypatch):
    """One that was compiled serves where the toolkit is gone. Without one the compiler is asked for its version once."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("RSLOSS_JIT", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(install_site.toolkit(tmp_path / "toolkit", "12.9")))
    started = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **settings: started.append(arguments) or run(*arguments, **settings))
    loaded = []
    monkeypatch.setattr(_ext, "_try", lambda backend, library: loaded.append(library))
    for _ in range(2):
        reason = _ext._from_cache("cuda", "it was not compiled")
        assert re.match(r"it was not compiled \(.*is of CUDA 12\.9, this torch of CUDA 13\.0\)", reason)
        assert len(started) == 1 and not loaded
    folder = _jit.cache() / _build.fingerprint("_ops_cuda")
    for made in (folder.parent.parent, folder.parent):
        made.mkdir(mode=0o700)
    pretend("_ops_cuda", folder)
    monkeypatch.setattr(_build, "why_not_cuda", lambda: pytest.fail("asked"))
    assert _ext._from_cache("cuda", "it was not compiled") is None and loaded == [folder / "_ops_cuda.so"] and len(started) == 1


def test_a_new_cache_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "fresh"))
    before = os.umask(0o002)
    try:
        monkeypatch.setattr(_jit, "_compile", pretend)
        assert _jit.compiled("cpp").exists()
    finally:
        os.umask(before)
    assert _jit.cache().stat().st_mode & 0o777 == 0o700
