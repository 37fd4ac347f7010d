"""A stand-in for the Hub on this machine: kernel repositories over HTTP, kept in memory.

It answers what huggingface_hub and kernels ask to create, fill, list and read kernel repositories:
branches, commits with large files, pull requests, trees, refs and files with ranges. It can be told
to fail. What it knows of git is that a commit is a set of files.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"


def sha1(*parts: bytes) -> str:
    return hashlib.sha1(b"\0".join(parts)).hexdigest()


@dataclass
class Repository:
    commits: dict = field(default_factory=dict)  # commit: {path: content}
    refs: dict = field(default_factory=dict)  # refs/heads/main: commit
    large: set = field(default_factory=set)  # paths that were committed as large files

    def commit(self, ref: str, files: "dict[str, bytes]") -> str:
        before = self.refs.get(ref, "")
        listing = "".join(f"{path} {sha1(content)}\n" for path, content in sorted(files.items()))
        commit = sha1(before.encode(), ref.encode(), listing.encode())
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def find(self, revision: str) -> "str | None":
        """The commit of a branch, a full ref or a commit."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        return revision if revision in self.commits else None

    def files(self, revision: str) -> "dict[str, bytes]":
        return self.commits[self.find(revision)]


@dataclass
class Fault:
    """What to do in the place of answering: the first ``times`` requests that match."""

    request: str  # a regular expression of "GET /path"
    status: int = 500
    bytes_sent: "int | None" = None  # for a body that breaks off
    shortened_to: "int | None" = None  # for a body that ends early and does not say so
    times: float = float("inf")


class Hub:
    """``with Hub() as hub``: serves at ``hub.url`` until the end of the block."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.trusted: set[str] = set()  # organisations whose kernels need no consent
        self.forbidden: set[str] = set()  # organisations that the token may not write to
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home) -> "dict[str, str]":
        """What makes a process use this Hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def fault_for(self, request: str) -> "Fault | None":
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.request, request):
                fault.times -= 1
                return fault
        return None


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: "str | None" = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def _handler_of(hub: Hub) -> type:
    routes = _routes(hub)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self):
            path = unquote(urlsplit(self.path).path)
            query = parse_qs(urlsplit(self.path).query)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = f"{self.command} {path}"
            hub.requests.append(request)
            fault = hub.fault_for(request)
            try:
                if fault is not None and fault.bytes_sent == fault.shortened_to:
                    raise Refusal(fault.status, "the stand-in was told to fail")
                for pattern, function in routes:
                    match = re.fullmatch(pattern, request)
                    if match is not None:
                        reply = function(self, *match.groups(), query=query, body=body)
                        break
                else:
                    raise Refusal(404, f"the stand-in does not know {request}")
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                self.reply(refusal.status, {"error": refusal.message}, headers)
                return
            status, content, headers = reply if isinstance(reply, tuple) else (200, reply, {})
            if fault is None:
                self.reply(status, content, headers)
            else:
                content = content[: fault.shortened_to]
                self.reply(status, content, headers, fault.bytes_sent)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def reply(self, status, content, headers, bytes_sent=None):
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
                headers = {"Content-Type": "application/json", **headers}
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:bytes_sent])
            self.close_connection = bytes_sent is not None

        def need_token(self, repo_id):
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Invalid credentials")
            if repo_id.split("/")[0] in hub.forbidden:
                raise Refusal(403, f"you may not write to {repo_id}")

    return Handler


def _repository(hub: Hub, repo_id: str) -> Repository:
    if repo_id not in hub.repositories:
        raise Refusal(404, f"there is no {repo_id}", "RepoNotFound")
    return hub.repositories[repo_id]


def _commit(repository: Repository, revision: str) -> str:
    commit = repository.find(revision)
    if commit is None:
        raise Refusal(404, f"there is no revision {revision}", "RevisionNotFound")
    return commit


def _oid(repository: Repository, path: str, content: bytes) -> str:
    """What huggingface_hub compares with: the sha256 of large files, else git's."""
    if path in repository.large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _routes(hub: Hub) -> list:
    repo = r"(\w[\w.-]*/[\w.-]+)"

    def organization(handler, name, **_):
        overview = {"name": name, "fullname": name, "avatarUrl": ""}
        return {**overview, "trustedKernelPublisher": name in hub.trusted}

    def create(handler, *, body, **_):
        wanted = json.loads(body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        handler.need_token(repo_id)
        assert wanted["type"] == "kernel"
        if repo_id in hub.repositories:
            raise Refusal(409, "You already created this kernel repo")
        hub.repositories[repo_id] = Repository()
        hub.repositories[repo_id].commit("refs/heads/main", {".gitattributes": b""})
        return {"url": f"{hub.url}/kernels/{repo_id}", "name": repo_id}

    def branch(handler, repo_id, name, **_):
        handler.need_token(repo_id)
        refs = _repository(hub, repo_id).refs
        if handler.command == "DELETE":
            del refs[f"refs/heads/{name}"]
        elif f"refs/heads/{name}" in refs:
            raise Refusal(409, f"branch {name} exists")
        else:
            refs[f"refs/heads/{name}"] = refs["refs/heads/main"]
        return {}

    def refs(handler, repo_id, **_):
        listing = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, commit in _repository(hub, repo_id).refs.items():
            kind = "branches" if ref.startswith("refs/heads/") else "pullRequests"
            name = ref.split("/", 2)[2]
            listing[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        return listing

    def info(handler, repo_id, revision, **_):
        repository = _repository(hub, repo_id)
        commit = _commit(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        return {"_id": "0", "id": repo_id, "sha": commit, "siblings": siblings}

    def tree(handler, repo_id, where, *, query, **_):
        repository = _repository(hub, repo_id)
        parts = where.split("/")
        # A full ref holds slashes itself: refs/heads/v1.
        size = 3 if parts[0] == "refs" else 1
        files = repository.commits[_commit(repository, "/".join(parts[:size]))]
        folder = "".join(f"{part}/" for part in parts[size:])
        recursive = query.get("recursive") in (["true"], ["True"], ["1"])
        entries = {}
        for path, content in sorted(files.items()):
            if not path.startswith(folder):
                continue
            inner = path[len(folder) :].split("/")
            for depth in range(1, len(inner) if recursive else min(2, len(inner))):
                above = folder + "/".join(inner[:depth])
                entries[above] = {"type": "directory", "oid": sha1(above.encode()), "size": 0}
            if recursive or len(inner) == 1:
                entries[path] = {"type": "file", "size": len(content)}
                entries[path]["oid"] = _oid(repository, path, content)
        if folder and not entries:
            raise Refusal(404, f"there is no {folder}", "EntryNotFound")
        return [{"path": path, **entry} for path, entry in entries.items()]

    def resolve(handler, repo_id, revision, path, **_):
        repository = _repository(hub, repo_id)
        commit = _commit(repository, revision)
        if path not in repository.commits[commit]:
            raise Refusal(404, f"there is no {path}", "EntryNotFound")
        content = repository.commits[commit][path]
        headers = {"ETag": f'"{_oid(repository, path, content)}"', "X-Repo-Commit": commit}
        start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if start is None:
            return 200, content, headers
        first = int(start[1])
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return 206, content[first:], headers

    def preupload(handler, repo_id, revision, *, body, **_):
        handler.need_token(repo_id)
        repository = _repository(hub, repo_id)
        there = repository.commits[_commit(repository, revision)]
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(".so")
            repository.large |= {path} if large else set()
            entry = {"path": path, "uploadMode": "lfs" if large else "regular"}
            if path in there:
                entry["oid"] = _oid(repository, path, there[path])
            files.append({**entry, "shouldIgnore": False})
        return {"files": files}

    def large_files(handler, repo_id, *, body, **_):
        handler.need_token(repo_id)
        wanted = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in hub.objects:
                upload = {"href": f"{hub.url}/objects/{entry['oid']}"}
                entry = {**entry, "actions": {"upload": upload}}
            wanted.append(entry)
        return {"transfer": "basic", "objects": wanted}

    def store(handler, oid, *, body, **_):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, f"the object is not {oid}")
        hub.objects[oid] = body
        return {}

    def commit(handler, repo_id, revision, *, query, body, **_):
        handler.need_token(repo_id)
        repository = _repository(hub, repo_id)
        before = _commit(repository, revision)
        files = dict(repository.commits[before])
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                if value.get("parentCommit", before) != before:
                    raise Refusal(412, "the branch has moved")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"the stand-in does not know {key}")
        result = {}
        ref = f"refs/heads/{revision}"
        if query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
            result["pullRequestUrl"] = f"{hub.url}/kernels/{repo_id}/discussions/{number}"
        oid = repository.commit(ref, files)
        return {
            "commitOid": oid,
            "commitUrl": f"{hub.url}/kernels/{repo_id}/commit/{oid}",
            **result,
        }

    def validate_yaml(handler, *, body, **_):
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.S)
        if front is None or "license:" not in front[1]:
            return 400, {"errors": [{"message": "no license"}], "warnings": []}, {}
        return {"errors": [], "warnings": []}

    return [
        (r"GET /api/organizations/([\w-]+)/overview", organization),
        (r"POST /api/repos/create", create),
        (rf"(?:POST|DELETE) /api/kernels/{repo}/branch/(.+)", branch),
        (rf"GET /api/kernels/{repo}/refs", refs),
        (rf"GET /api/kernels/{repo}/revision/(.+)", info),
        (rf"GET /api/kernels/{repo}/tree/(.+)", tree),
        (rf"(?:GET|HEAD) /kernels/{repo}/resolve/([^/]+)/(.+)", resolve),
        (rf"POST /api/kernels/{repo}/preupload/(.+)", preupload),
        (rf"POST /kernels/{repo}.git/info/lfs/objects/batch", large_files),
        (r"PUT /objects/(\w+)", store),
        (rf"POST /api/kernels/{repo}/commit/(.+)", commit),
        (r"POST /api/validate-yaml", validate_yaml),
    ]
