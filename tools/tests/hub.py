"""A stand-in for the Hub on this machine: kernel repositories over HTTP, kept in memory.

It answers what huggingface_hub and kernels ask to create, fill, list and read a kernel repository,
and it can be told to fail. What it knows of git is that a commit is a set of files.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
REPO = r"(\w[\w.-]*/[\w.-]+)"
ROUTES = []  # (pattern of "GET /path", function)


class Repository:
    def __init__(self, files: "dict[str, bytes]", branch: str = "main"):
        self.commits, self.refs, self.large = {}, {}, set()
        self.commit(branch, files)

    def commit(self, branch: str, files: "dict[str, bytes]") -> str:
        listing = repr((branch, self.refs.get(branch), sorted(files.items())))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[commit], self.refs[branch] = dict(files), commit
        return commit

    def find(self, revision: str) -> str:
        """The commit of a branch, a full ref or a commit."""
        found = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if found not in self.commits:
            raise Refusal(404, f"there is no revision {revision}", "RevisionNotFound")
        return found

    def files(self, revision: str) -> "dict[str, bytes]":
        return self.commits[self.find(revision)]

    def oid(self, path: str, content: bytes) -> str:
        """What huggingface_hub compares with: the sha256 of large files, else git's."""
        if path in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What to do in the place of answering: the first ``times`` requests that match."""

    request: str  # a regular expression of "GET /path"
    status: int = 500
    sent: "int | None" = None  # of the body's bytes, before the connection breaks off
    times: float = float("inf")


class Refusal(Exception):
    """Its arguments: the status, the message and huggingface_hub's code."""


@dataclass
class Hub:
    """``with Hub() as hub``: serves at ``hub.url`` until the end of the block."""

    repositories: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)  # large files by their sha256
    faults: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def __enter__(self) -> "Hub":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.hub.requests.append(request)
        matching = (f for f in self.hub.faults if f.times > 0 and re.search(f.request, request))
        fault = next(matching, None)
        try:
            if fault is not None:
                fault.times -= 1
                if fault.sent is None:
                    raise Refusal(fault.status, "the stand-in was told to fail", "")
            status, content, headers = self.find_answer(request)
        except Refusal as refusal:
            status, message, code = refusal.args
            content, headers = {}, {"X-Error-Message": message, "X-Error-Code": code}
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: fault.sent if fault else None])
        self.close_connection = fault is not None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def find_answer(self, request):
        for pattern, function in ROUTES:
            match = re.fullmatch(pattern, request)
            if match is None:
                continue
            groups = list(match.groups())
            if REPO in pattern:
                if groups[0] not in self.hub.repositories:
                    raise Refusal(404, f"there is no {groups[0]}", "RepoNotFound")
                groups[0] = self.hub.repositories[groups[0]]
            if self.command not in ("GET", "HEAD", "PUT") and "validate" not in pattern:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refusal(401, "Invalid credentials", "")
            found = function(self, *groups)
            return found if isinstance(found, tuple) else (200, found, {})
        raise Refusal(404, f"the stand-in does not know {request}", "")


def route(pattern: str):
    return lambda function: ROUTES.append((pattern, function))


@route(r"POST /api/validate-yaml")
def validate_yaml(request):
    return {"errors": [], "warnings": []}


@route(r"POST /api/repos/create")
def create(request):
    wanted = json.loads(request.body)
    repo_id = f"{wanted['organization']}/{wanted['name']}"
    request.hub.repositories[repo_id] = Repository({".gitattributes": b""})
    return {"url": f"{request.hub.url}/kernels/{repo_id}", "name": repo_id}


@route(rf"(?:POST|DELETE) /api/kernels/{REPO}/branch/(.+)")
def branch(request, repository, name):
    if request.command == "DELETE":
        del repository.refs[name]
    else:
        repository.refs[name] = repository.refs["main"]
    return {}


@route(rf"GET /api/kernels/{REPO}/refs")
def list_refs(request, repository):
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
        for name, commit in repository.refs.items()
    ]
    return {"branches": branches, "converts": [], "tags": []}


@route(rf"GET /api/kernels/{REPO}/revision/(.+)")
def info(request, repository, revision):
    siblings = [{"rfilename": path} for path in sorted(repository.files(revision))]
    return {"_id": "0", "id": "0", "sha": repository.find(revision), "siblings": siblings}


@route(rf"GET /api/kernels/{REPO}/tree/(refs/heads/[^/]+|[^/]+)/?(.*)")
def tree(request, repository, revision, folder):
    recursive = re.search("recursive=(?i:true|1)", request.path)
    start, entries = f"{folder}/" if folder else "", {}
    for path, content in sorted(repository.files(revision).items()):
        if path.startswith(start):
            parts = path[len(start) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                above = start + "/".join(parts[:depth])
                entries[above] = {"path": above, "type": "directory", "oid": above, "size": 0}
            if recursive or len(parts) == 1:
                oid = repository.oid(path, content)
                entries[path] = {"path": path, "type": "file", "oid": oid, "size": len(content)}
    return list(entries.values())


@route(rf"(?:GET|HEAD) /kernels/{REPO}/resolve/([^/]+)/(.+)")
def resolve(request, repository, revision, path):
    content = repository.files(revision)[path]
    first = int(re.search(r"\d+", request.headers.get("Range", "bytes=0-"))[0])
    headers = {"ETag": f'"{repository.oid(path, content)}"'}
    headers["X-Repo-Commit"] = repository.find(revision)
    headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
    return 206 if first else 200, content[first:], headers


@route(rf"POST /api/kernels/{REPO}/preupload/(.+)")
def preupload(request, repository, revision):
    there, files = repository.files(revision), []
    for path in (file["path"] for file in json.loads(request.body)["files"]):
        repository.large |= {path} if path.endswith(".so") else set()
        mode = "lfs" if path in repository.large else "regular"
        oid = {"oid": repository.oid(path, there[path])} if path in there else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return {"files": files}


@route(rf"POST /kernels/{REPO}.git/info/lfs/objects/batch")
def large_files(request, repository):
    entries = json.loads(request.body)["objects"]
    for entry in entries:
        if entry["oid"] not in request.hub.objects:
            entry["actions"] = {"upload": {"href": f"{request.hub.url}/objects/{entry['oid']}"}}
    return {"transfer": "basic", "objects": entries}


@route(r"PUT /objects/(\w+)")
def store(request, oid):
    request.hub.objects[oid] = request.body
    return {}


@route(rf"POST /api/kernels/{REPO}/commit/(.+)")
def commit(request, repository, revision):
    before, files = repository.find(revision), dict(repository.files(revision))
    for operation in map(json.loads, request.body.splitlines()):
        key, value = operation["key"], operation["value"]
        if key == "header" and value.get("parentCommit", before) != before:
            raise Refusal(412, "the branch has moved", "")
        elif key == "deletedFile":
            del files[value["path"]]
        elif key == "lfsFile":
            files[value["path"]] = request.hub.objects[value["oid"]]
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
    oid = repository.commit(revision, files)
    return {"commitOid": oid, "commitUrl": f"{request.hub.url}/kernels/org/name/commit/{oid}"}
