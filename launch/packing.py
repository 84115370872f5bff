"""The files that a job is sent with: a folder's code, without secrets, data and results."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from cifar_dist.errors import UserError, first_line
from cifar_dist.terminal.hints import in_one_line

MAX_BYTES = 100 * 2**20
SHOWN = 20
"""Names that are listed before the rest is only counted."""
SECRETS = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".pypirc",
    ".npmrc", ".git-credentials", ".boto", ".s3cfg", ".dockercfg", ".dockerconfigjson",
    ".vault-token", ".htpasswd", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*kubeconfig*", "*service*account*.json",
    "credentials", "*credentials*.json", "*credentials*.y*ml", "*credentials*.csv",
    "client_secret*.json", "secrets.json", "secrets.y*ml", "secrets.toml", "auth_token", "*.token",
    ".token", "*.tfstate*", ".aws", ".ssh", ".kube", ".gnupg", ".azure", ".gcloud", "gcloud",
    ".docker", ".kaggle", ".config", ".ray", ".ray-*",
)  # fmt: skip
"""Names of files and folders that hold secrets; never sent, even where git tracks them."""
NO_SECRETS = ("*.example", "*.sample", "*.template", "*.pub", "*.py")
RESULTS = (
    ".git", ".venv", "venv", "env", "node_modules", "wandb", "mlruns", "lightning_logs",
    "__pycache__", "*.egg-info", ".*_cache", ".cache", ".ipynb_checkpoints", ".ds_store",
    "*.parquet", "*.safetensors", "*.ckpt", "*.pt", "*.pth", "*.pt2", "*.bin", "*.onnx", "*.h5",
    "*.hdf5", "*.npz", "*.npy", "*.pkl", "*.whl", "*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz",
    "*.bz2", "*.xz", "*.zst", "*.7z", "*.rar",
)  # fmt: skip
"""Names of files and folders with packages, results, weights and archives; not sent unless git
tracks them. So are ``data`` and ``runs``, at the top of the folder."""
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(\r?\n|\\n)")
_SEARCHED_BYTES = 2**16
"""Of each file, for a private key: also service accounts have one, under any name."""


@dataclass(frozen=True)
class Package:
    """The files to send, and what is reported of the others."""

    files: dict[str, Path] = field(default_factory=dict)
    """By their names in the job's folder."""
    untracked: list[str] = field(default_factory=list)
    """Names of those that are sent although git does not track them."""
    omitted: dict[str, list[str]] = field(default_factory=dict)
    """Names of files and folders that are not sent, by the reason."""

    def lines(self) -> list[str]:
        """Return what is sent and what is not, formatted for display."""
        size = sum(file.stat().st_size for file in self.files.values())
        said = [f"sends {len(self.files):,} files, {size / 1e6:,.1f} MB"]
        if self.untracked:
            said.append(f"of them not tracked by git: {_some(self.untracked)}")
        return said + [f"not sent ({why}): {_some(names)}" for why, names in self.omitted.items()]

    def write(self, file: Path) -> None:
        """Write a zip file; the same files give the same bytes, which a cluster has already.

        Raises:
            UserError: a file cannot be read, or the zip file not be written.
        """
        try:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
                for name, source in sorted(self.files.items()):
                    entry = zipfile.ZipInfo(name)  # of 1980, whenever the file was written
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    entry.external_attr = (source.stat().st_mode & 0o755 | 0o644) << 16
                    packed.writestr(entry, _content(source))
        except OSError as error:
            if error.filename not in (None, str(file)):
                raise _unreadable(error) from None
            raise UserError(
                f"TMPDIR {file.parent}: cannot be written ({error.strerror}); name another folder"
            ) from None


def package(folder: Path, named: Iterable[str] = ()) -> Package:
    """Choose the files of a folder that a job is sent with.

    In a git checkout these are the tracked files and the untracked ones that git does not ignore;
    elsewhere all that no .gitignore names.

    Args:
        folder: the job runs in a copy of it.
        named: words of the command, some of which may name files.

    Raises:
        UserError: the files are too large, git cannot list them, a link leads out of the folder,
            or the command names a file that is not sent.
    """
    folder = folder.resolve()
    try:
        tracked, others = _listed(folder)
        chosen = _chosen(folder, tracked, others)
        if tracked:  # elsewhere it would be all of them
            chosen.untracked.extend(name for name in others if name in chosen.files)
        _check_size(chosen)
        _check_named(chosen, folder, named)
    except OSError as error:
        raise _unreadable(error) from None
    return chosen


def module(folder: Path) -> dict[str, Path]:
    """Return the files of an installed Python package, by their names in it.

    A virtual environment, where it may be, is usually ignored by git.
    """
    return _chosen(folder, (), _walked(folder)).files


def _chosen(folder: Path, tracked: Collection[str], others: Iterable[str]) -> Package:
    chosen = Package()
    links = []
    for name in [*tracked, *others]:
        if part := _matching(name, SECRETS, NO_SECRETS):
            _omit(chosen, "secrets", part)
        elif name not in tracked and (part := _ballast(name)):
            _omit(chosen, "data, results, packages", part)
        elif not _is_utf8(name):
            _omit(chosen, "names that are not UTF-8", ascii(name))
        elif (folder / name).is_symlink():
            links.append(name)
        elif (folder / name).is_dir():
            _omit(chosen, "git checkouts of their own", name)
        elif not (folder / name).is_file():
            continue  # deleted, or a socket
        elif _PRIVATE_KEY.search(_content(folder / name, _SEARCHED_BYTES)):
            _omit(chosen, "secrets", name)
        else:
            chosen.files[name] = folder / name
    _add_links(chosen, folder, links)
    return chosen


def _add_links(chosen: Package, folder: Path, links: Sequence[str]) -> None:
    """Add what links lead to, under the links' names, if it is sent anyhow."""
    sent = dict(chosen.files)
    for link in links:
        target = Path(os.path.realpath(folder / link))  # `resolve` raises for links in a circle
        if not target.is_relative_to(folder):
            raise UserError(
                f"{link}: is a link to {target}, outside of the folder, whose files alone are "
                "sent; remove it, or submit from another folder"
            )
        at = target.relative_to(folder).as_posix()
        # Of a link into a folder above it the copy would hold the link again, without end.
        found = {} if (folder / link).is_relative_to(target) else {
            link + name.removeprefix(at): file
            for name, file in sent.items()
            if name == at or name.startswith(f"{at}/")
        }  # fmt: skip
        chosen.files.update(found)
        if not found:
            _omit(chosen, "links to what is not sent, or to a folder above", link)


def _check_size(chosen: Package) -> None:
    sizes = {name: file.stat().st_size for name, file in chosen.files.items()}
    if (total := sum(sizes.values())) > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        shown = ", ".join(f"{name} ({sizes[name] / 2**20:,.1f} MiB)" for name in largest)
        raise UserError(
            f"the folder's {len(sizes):,} files have {total / 2**20:,.0f} MiB, and a job is sent "
            f"with at most {MAX_BYTES // 2**20}; let a .gitignore name what the job does not "
            f"need; the largest: {shown}"
        )


def _check_named(chosen: Package, folder: Path, words: Iterable[str]) -> None:
    """Check that files of the folder which the command names are sent."""
    for word in words:
        given = word.partition("=")[2] if word.startswith("-") else word
        path = Path(given)
        if not given or path.is_absolute() or not (folder / path).is_file():
            continue
        if os.path.normpath(path) not in chosen.files:
            raise UserError(
                f"{given}: is not sent with the job; give an absolute path of a file that all "
                "nodes of the cluster share"
            )


def _listed(folder: Path) -> tuple[dict[str, None], list[str]]:
    """Return the names of the tracked files, and of the untracked ones that git does not ignore."""
    if shutil.which("git") is None:
        ignoring = [*folder.glob(".gitignore"), *(up / ".git" for up in (folder, *folder.parents))]
        if any(each.exists() for each in ignoring):
            raise UserError(
                f"{folder}: git is not installed, which knows the files that must not be sent; "
                "install it, or submit from a folder without .git and .gitignore"
            )
        return {}, _walked(folder)
    inside = _git(folder, "rev-parse", "--is-inside-work-tree")
    others = ("ls-files", "-z", "--others", "--exclude-standard")
    if inside.returncode == 0:
        tracked = _names(folder, "ls-files", "-z", "--cached", "--recurse-submodules")
        return dict.fromkeys(tracked), sorted(_names(folder, *others))
    if b"not a git repository" not in inside.stderr:
        raise _git_failed(folder, inside)
    with tempfile.TemporaryDirectory() as empty:
        # Git also knows the syntax of .gitignore files where there is no checkout.
        _git(folder, "init", "--quiet", "--bare", empty)
        return {}, sorted(_names(folder, f"--git-dir={empty}", f"--work-tree={folder}", *others))


def _walked(folder: Path) -> list[str]:
    found = [Path(top) / name for top, _, names in os.walk(folder) for name in names]
    return sorted(each.relative_to(folder).as_posix() for each in found)


def _names(folder: Path, *words: str) -> list[str]:
    done = _git(folder, *words)
    if done.returncode:
        raise _git_failed(folder, done)
    return [os.fsdecode(name).rstrip("/") for name in done.stdout.split(b"\0") if name]


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    # Messages in English, of which one is looked for.
    return subprocess.run(
        ["git", *words], cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True
    )


def _git_failed(folder: Path, done: subprocess.CompletedProcess[bytes]) -> UserError:
    said = first_line(ValueError(done.stderr.decode(errors="replace")))
    return UserError(f"{folder}: git cannot list its files ({said}); mend that first")


def _matching(name: str, patterns: Sequence[str], but: Sequence[str] = ()) -> str | None:
    """Return a path up to its first part that is like one of the patterns."""
    parts = name.split("/")
    for count, part in enumerate(map(str.lower, parts), start=1):
        if any(fnmatchcase(part, each) for each in patterns) and not any(
            fnmatchcase(part, each) for each in but
        ):
            return "/".join(parts[:count]) + "/" * (count < len(parts))
    return None


def _ballast(name: str) -> str | None:
    """Return the part of a path that is data, results or packages."""
    top = name.split("/")[0]
    return f"{top}/" if top in ("data", "runs") else _matching(name, RESULTS)


def _content(file: Path, size: int = -1) -> bytes:
    """Read a file, or the beginning of it."""
    # A file that has become a pipe meanwhile would be waited for.
    if not stat.S_ISREG(file.stat().st_mode):
        return b""
    with file.open("rb") as opened:
        return opened.read(size)


def _unreadable(error: OSError) -> UserError:
    return UserError(
        f"{error.filename}: cannot be read ({error.strerror}); let a .gitignore name it, or "
        "remove it"
    )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _omit(chosen: Package, why: str, name: str) -> None:
    names = chosen.omitted.setdefault(why, [])
    if name not in names:
        names.append(name)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(in_one_line, names[:SHOWN])) + more
