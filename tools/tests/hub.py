"""A stand-in for the Hub on this machine: kernel repositories over HTTP, kept in memory.

It answers what huggingface_hub and kernels ask to create, fill, list and read a kernel repository,
and it can be told to fail. What it knows of git is that a commit is a set of files, and it takes
every file for a large one.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit


class Repository:
    def __init__(self, files: dict[str, bytes], branch: str = "main"):
        self.commits, self.refs = {}, {}
        self.commit(branch, files)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
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

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.find(revision)]

    def tree(self, revision: str) -> list[dict]:
        """Its folders and files."""
        files = self.files(revision)
        folders = {str(folder) for file in files for folder in PurePosixPath(file).parents} - {"."}
        entries = {folder: ("directory", folder, 0) for folder in folders}
        entries |= {file: ("file", oid(content), len(content)) for file, content in files.items()}
        return [{"path": x, "type": t, "oid": o, "size": s} for x, (t, o, s) in entries.items()]


def oid(content: bytes) -> str:
    """What the Hub and huggingface_hub know a large file by."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class Fault:
    """What to do in the place of answering: the first ``times`` requests that match."""

    request: str  # a regular expression of "GET /path"
    status: int = 500
    sent: int | None = None  # of the body's bytes, before the connection breaks off
    times: float = float("inf")


class Refusal(Exception):
    """Its arguments: the status, the message and huggingface_hub's code."""


class Hub(ThreadingHTTPServer):
    """``with Hub() as hub``: serves at ``hub.url`` until the end of the block."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded files by their oid
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.server.requests.append(request)
        matching = (f for f in self.server.faults if f.times > 0 and re.search(f.request, request))
        fault = next(matching, None)
        try:
            if fault is not None:
                fault.times -= 1
                if fault.sent is None:
                    raise Refusal(fault.status, "the stand-in was told to fail", "")
            status, content, headers = self.find([unquote(x) for x in path.split("/")[1:]])
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

    def find(self, path: list[str]) -> tuple[int, object, dict[str, str]]:
        """Status, content and headers."""
        hub = self.server
        match path:
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}, {}
            case ["api", "repos", "create"]:
                wanted = json.loads(self.body)
                repo_id = f"{wanted['organization']}/{wanted['name']}"
                hub.repositories[repo_id] = Repository({".gitattributes": b""})
                return 200, {"url": f"{hub.url}/kernels/{repo_id}", "name": repo_id}, {}
            case ["objects", name]:
                hub.objects[name] = self.body
                return 200, {}, {}
            case ["api", "kernels", *words] | ["kernels", *words]:
                repo_id = "/".join(words[:2]).removesuffix(".git")
                if repo_id not in hub.repositories:
                    raise Refusal(404, f"there is no {repo_id}", "RepoNotFound")
                repository = hub.repositories[repo_id]
                if words[2] == "resolve":
                    return self.download(repository, words[3], "/".join(words[4:]))
                return 200, self.ask(repository, words[2:]), {}
        raise Refusal(404, f"the stand-in does not know {path}", "")

    def download(self, repository: Repository, revision: str, path: str) -> tuple:
        content = repository.files(revision)[path]
        first = int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": repository.find(revision)}
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return 206 if first else 200, content[first:], headers

    def ask(self, repository: Repository, words: list[str]) -> object:
        """What the API answers, as JSON."""
        match [self.command, *words]:
            case ["POST", "branch", name]:
                repository.refs[name] = repository.refs["main"]
                return {}
            case ["DELETE", "branch", name]:
                del repository.refs[name]
                return {}
            case ["GET", "refs"]:
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in repository.refs.items()
                ]
                return {"branches": branches, "converts": [], "tags": []}
            case ["GET", "revision", revision]:
                return {"_id": "0", "id": "0", "sha": repository.find(revision)}
            case ["GET", "tree", revision, *folder]:  # with what is in its folders, asked or not
                start = "".join(f"{name}/" for name in folder)
                return [x for x in repository.tree(revision) if x["path"].startswith(start)]
            case ["POST", "preupload", revision]:
                there = {entry["path"]: entry["oid"] for entry in repository.tree(revision)}
                files = json.loads(self.body)["files"]
                for file in files:
                    file |= {"uploadMode": "lfs", "shouldIgnore": False}
                    file["oid"] = there.get(file["path"])
                return {"files": files}
            case ["POST", "info", "lfs", "objects", "batch"]:
                entries = json.loads(self.body)["objects"]
                for entry in (x for x in entries if x["oid"] not in self.server.objects):
                    href = f"{self.server.url}/objects/{entry['oid']}"
                    entry["actions"] = {"upload": {"href": href}}
                return {"transfer": "basic", "objects": entries}
            case ["POST", "commit", revision]:
                files = dict(repository.files(revision))
                for operation in map(json.loads, self.body.splitlines()):
                    value = operation["value"]
                    if operation["key"] == "deletedFile":
                        del files[value["path"]]
                    elif operation["key"] == "lfsFile":
                        files[value["path"]] = self.server.objects[value["oid"]]
                commit = repository.commit(revision, files)
                url = f"{self.server.url}/kernels/org/name/commit/{commit}"
                return {"commitOid": commit, "commitUrl": url}
        raise Refusal(404, f"the stand-in does not know {words}", "")
