"""Publish a release to the Hub, as `kernel-builder upload` does.

    python tools/publish.py --dry-run      # checks the release and prints every operation
    python tools/publish.py                # publishes what `make release` built
    python tools/publish.py --create-pr    # opens pull requests instead

The variants in build/ and benchmarks/benchmark*.py go to the branch v<version> of the kernel
repository, in one commit; then CARD.md, rendered, becomes README.md on main. Nothing is published
that was built from a dirty tree, fails the ABI check or differs from its digest, and no release
that lacks a variant or an architecture. Large files are uploaded before anything shows; run it
again after an interruption, what is there is not sent twice.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

try:
    from tools import abi, release
    from tools import build as builder
except ModuleNotFoundError:  # run as a script
    import abi
    import build as builder
    import release

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

MESSAGE = "Uploaded by tools/publish.py"
APPROVAL = (
    "publishing kernels needs Hugging Face's approval: ask for it in a discussion of the "
    "organization kernels-community, with the kernel's source, its purpose and benchmarks"
)


class PublishError(Exception):
    """Why nothing, or not everything, was published."""


# ------------------------------------------------------------------------------ before any network


def find_variants(root: Path) -> list[Path]:
    """Their folders; kernel-builder puts others beside them, such as benchmarks."""
    return sorted(path for path in root.glob("build/torch*") if path.is_dir())


def problems(kernel: builder.Kernel, variant: Path) -> list[str]:
    """Why a variant is not fit to be published."""
    from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

    try:
        metadata = Metadata.read_from_file(variant / "metadata.json")
    except (OSError, ValueError) as error:
        return [f"metadata.json: {error}"]

    found = []
    version = kernel.config["general"]["version"]
    if metadata.version != version:
        found.append(f"is of version {metadata.version}, build.toml has {version}")
    provenance = metadata.provenance
    if provenance is None or provenance.kernel is None:
        found.append("does not tell which commit it was built from; build it in a git checkout")
    elif provenance.dirty:
        found.append("was built from a dirty tree; commit, then build it again")
    if provenance is None or provenance.kernel_builder.version == builder.BUILDER:
        backend = builder.backend_of(variant)
        if metadata.id != kernel.id(backend, variant.name, metadata.backend.archs or []):
            found.append("was built from other sources than these; build it again")
    if metadata.digest is None:
        found.append("has no digest")
    else:
        try:
            metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        except DigestValidationError as error:
            found.append("does not match its digest: " + ", ".join(map(str, error.violations)))
    return found + abi.check(variant)


def missing(kernel: builder.Kernel, variants: list[Path]) -> list[str]:
    """What a whole release has and this one has not: variants, GPU architectures."""
    from kernels._rust import Metadata

    found = []
    built = {variant.name: variant for variant in variants}
    for name, archs in release.matrix(kernel).items():
        if name not in built:
            found.append(f"{name} is missing")
            continue
        try:
            metadata = Metadata.read_from_file(built[name] / "metadata.json")
        except (OSError, ValueError):
            continue  # told by problems()
        absent = [arch for arch in archs if arch not in (metadata.backend.archs or [])]
        if absent:
            found.append(f"{name} was not built for {' '.join(absent)}")
    return found


def check(kernel: builder.Kernel, variants: list[Path], partial: bool) -> None:
    """Raises PublishError with all that is wrong with the variants.

    Args:
        partial: Whether variants and architectures of a whole release may be missing.
    """
    if not variants:
        raise PublishError(f"{kernel.root / 'build'} has no variant; run make release")
    lines = [f"{v.name} {problem}" for v in variants for problem in problems(kernel, v)]
    absent = [] if partial else missing(kernel, variants)
    if absent:
        absent.append("make release builds all of it; --partial publishes what there is")
    if lines or absent:
        raise PublishError("not published:\n  " + "\n  ".join([*lines, *absent]))


# --------------------------------------------------------------------------------------- the card


def render_card(kernel: builder.Kernel, repo_id: str) -> str:
    """CARD.md with those of kernel-builder's variables that it has."""
    from jinja2 import Environment, StrictUndefined

    general = kernel.config["general"]
    environment = Environment(trim_blocks=True, undefined=StrictUndefined)
    return environment.from_string((kernel.root / "CARD.md").read_text()).render(
        repo_id=repo_id,
        version=general["version"],
        has_benchmark=(kernel.root / "benchmarks" / "benchmark.py").is_file(),
        upstream=general.get("upstream"),
        source=general.get("source"),
        license=general["license"].lower(),
    )


# ---------------------------------------------------------------------------------- what to change


@dataclass(frozen=True)
class Plan:
    """All that is going to change on the Hub."""

    repo_id: str
    branch: str
    create_repo: bool
    parent: str | None  # the commit of the branch; None where the branch is new
    operations: list  # of the branch
    card: str

    @property
    def additions(self) -> list[CommitOperationAdd]:
        return [op for op in self.operations if isinstance(op, CommitOperationAdd)]

    @property
    def card_operation(self) -> CommitOperationAdd:
        return CommitOperationAdd("README.md", self.card.encode())

    def __str__(self) -> str:
        lines = [f"create repository {self.repo_id}"] if self.create_repo else []
        lines += [f"create branch {self.branch}"] if self.parent is None else []
        branches = [(self.branch, op) for op in self.operations] + [("main", self.card_operation)]
        for branch, op in branches:
            added = isinstance(op, CommitOperationAdd)
            size = f" ({op.upload_info.size:,} bytes)" if added else ""
            lines.append(f"{branch}: {'add' if added else 'delete'} {op.path_in_repo}{size}")
        return "\n".join(lines)


def make_plan(
    api: HfApi, kernel: builder.Kernel, variants: list[Path], repo_id: str, branch: str
) -> Plan:
    """Compares the release with what the Hub has; changes nothing."""
    files = [path for variant in variants for path in variant.rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".pyc"]  # as in the digest
    files += (kernel.root / "benchmarks").glob("benchmark*.py")
    files = {str(path.relative_to(kernel.root)): path for path in sorted(files)}

    try:
        refs = api.list_repo_refs(repo_id, repo_type="kernel").branches
        branches = {ref.name: ref.target_commit for ref in refs}
        exists = True
    except RepositoryNotFoundError:
        branches, exists = {}, False
    parent = branches.get(branch)

    # A new branch starts as a copy of main: what was ever built there must not be served from it.
    replaced = ("build/", "benchmarks/")
    if parent is not None:
        replaced = (*(f"build/{variant.name}/" for variant in variants), "benchmarks/benchmark")
    stale = []
    start = parent or branches.get("main")
    if start is not None:
        tree = api.list_repo_tree(repo_id, recursive=True, revision=start, repo_type="kernel")
        there = [entry.path for entry in tree if hasattr(entry, "blob_id")]  # a file, no folder
        stale = [path for path in there if path.startswith(replaced) and path not in files]

    return Plan(
        repo_id=repo_id,
        branch=branch,
        create_repo=not exists,
        parent=parent,
        operations=[
            *(CommitOperationAdd(path, str(file)) for path, file in files.items()),
            *(CommitOperationDelete(path) for path in stale),
        ],
        card=render_card(kernel, repo_id),
    )


# ------------------------------------------------------------------------------------------ upload


def publish(api: HfApi, plan: Plan, private: bool = False, create_pr: bool = False) -> list[str]:
    """Carries out the plan; returns the URLs of the commits or pull requests."""
    if create_pr and plan.parent is None:
        raise PublishError(
            f"{plan.repo_id} has no branch {plan.branch} that a pull request could be opened "
            "against; ask its owner to create the branch"
        )
    if plan.create_repo:
        api.create_repo(plan.repo_id, repo_type="kernel", private=private, exist_ok=True)
    # Large files, which show nowhere until a commit names them.
    api.preupload_lfs_files(
        plan.repo_id,
        plan.additions,
        repo_type="kernel",
        revision=plan.branch if plan.parent else "main",
        create_pr=create_pr,
        free_memory=False,
    )
    if plan.parent is None:
        api.create_branch(plan.repo_id, branch=plan.branch, repo_type="kernel")
    try:
        commits = [
            api.create_commit(
                plan.repo_id,
                plan.operations,
                commit_message=MESSAGE,
                repo_type="kernel",
                revision=plan.branch,
                parent_commit=plan.parent,  # refused if someone else published meanwhile
                create_pr=create_pr,
            )
        ]
    except BaseException as error:
        if plan.parent is None:  # else users would find a version without a variant
            try:
                api.delete_branch(plan.repo_id, branch=plan.branch, repo_type="kernel")
            except HTTPError:
                raise PublishError(
                    f"the branch {plan.branch} of {plan.repo_id} was made, but its files did not "
                    "arrive and it could not be removed; run it again"
                ) from error
        raise
    commits.append(
        api.create_commit(
            plan.repo_id,
            [plan.card_operation],
            commit_message=MESSAGE,
            repo_type="kernel",
            revision="main",
            create_pr=create_pr,
        )
    )
    return [commit.pr_url if create_pr else commit.commit_url for commit in commits]


def explain(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return f"the Hub does not accept the token; log in again with `hf auth login` ({error})"
    if status == 403:
        return f"the token may not write to {repo_id}; {APPROVAL} ({error})"
    if status == 412:
        return f"{repo_id} changed meanwhile; run it again ({error})"
    return f"the Hub refused: {error}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root", nargs="?", type=Path, default=release.FIRST,
        help="the checkout whose build/ is published (default: release/, of make release)",
    )  # fmt: skip
    parser.add_argument("--repo-id", help="default: repo-id of build.toml")
    parser.add_argument("--branch", help="default: branch of build.toml, else v<version>")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--create-pr", action="store_true", help="open pull requests")
    parser.add_argument(
        "--partial", action="store_true", help="allow missing variants and GPU architectures"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the operations")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    repo_id = args.repo_id
    try:
        if not (args.root / "build.toml").is_file():
            raise PublishError(f"{args.root} has no build.toml; run make release first")
        kernel = builder.Kernel.open(args.root)
        repo_id = repo_id or kernel.repo_id
        if repo_id is None:
            raise PublishError("build.toml has no repo-id in [general.hub], expected --repo-id")
        hub = kernel.config["general"].get("hub", {})
        branch = args.branch or hub.get("branch") or f"v{kernel.config['general']['version']}"
        variants = find_variants(kernel.root)
        check(kernel, variants, args.partial)
        token = get_token()
        if token is None and not args.dry_run:
            raise PublishError("there is no token; log in with `hf auth login` or set HF_TOKEN")

        api = HfApi(token=token)
        plan = make_plan(api, kernel, variants, repo_id, branch)
        print(plan)
        if args.dry_run:
            return
        for url in publish(api, plan, args.private, args.create_pr):
            print(url)
    except HfHubHTTPError as error:
        sys.exit(f"error: {explain(error, repo_id)}")
    except HTTPError as error:
        sys.exit(f"error: the Hub cannot be reached: {error}")
    except (PublishError, builder.BuildError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
