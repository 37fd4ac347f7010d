"""A stand-in for the Hub on this machine: kernel repositories over HTTP, kept in memory.

It answers what huggingface_hub and kernels ask to create, fill, list and read a kernel repository,
and it can be told to fail. It knows branches and no history, and takes every file for a large one.
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
        self.branches = {branch: files}

    def commits(self) -> dict[str, str]:
        """Each branch's last, which is known by its files."""
        return {
            branch: oid(repr(sorted((name, oid(x)) for name, x in files.items())).encode())[:40]
            for branch, files in self.branches.items()
        }

    def find(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit of a branch, a full ref or a commit, and its files."""
        for branch, commit in self.commits().items():
            if revision in (branch, f"refs/heads/{branch}", commit):
                return commit, self.branches[branch]
        raise Refusal(404, f"there is no revision {revision}", "RevisionNotFound")

    def tree(self, revision: str) -> list[dict]:
        """Its folders and files."""
        _, files = self.find(revision)
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
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.server.requests.append(request)
        matching = (f for f in self.server.faults if f.times > 0 and re.search(f.request, request))
        fault = next(matching, None)
        status, headers = 200, {}
        try:
            if fault is not None:
                fault.times -= 1
                if fault.sent is None:
                    raise Refusal(fault.status, "the stand-in was told to fail", "")
            content = self.find(self.command, [unquote(x) for x in path.split("/")[1:]], body)
        except Refusal as refusal:
            status, message, code = refusal.args
            content, headers = {}, {"X-Error-Message": message, "X-Error-Code": code}
        if isinstance(content, tuple):  # a file's bytes from the first on that is asked for
            commit, whole = content
            first = int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
            headers = {"ETag": f'"{oid(whole)}"', "X-Repo-Commit": commit}
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
            status, content = 206 if first else 200, whole[first:]
        else:
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: fault.sent if fault else None])
        # Only a client that was cut off expects that.
        self.close_connection |= fault is not None and fault.sent is not None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def find(self, method: str, path: list[str], body: bytes) -> object:
        """What becomes JSON, or a file with its commit."""
        hub = self.server
        match path:
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                repo_id = f"{wanted['organization']}/{wanted['name']}"
                hub.repositories[repo_id] = Repository({".gitattributes": b""})
                return {"url": f"{hub.url}/kernels/{repo_id}", "name": repo_id}
            case ["objects", name]:
                hub.objects[name] = body
                return {}
            case ["api", "kernels", *words] | ["kernels", *words]:
                repo_id = "/".join(words[:2]).removesuffix(".git")
                if repo_id not in hub.repositories:
                    raise Refusal(404, f"there is no {repo_id}", "RepoNotFound")
                return self.ask(hub.repositories[repo_id], method, words[2:], body)
        raise Refusal(404, f"the stand-in does not know {path}", "")

    def ask(self, repository: Repository, method: str, words: list[str], body: bytes) -> object:
        branches = repository.branches
        match [method, *words]:
            case ["GET" | "HEAD", "resolve", revision, *path]:
                commit, files = repository.find(revision)
                return commit, files["/".join(path)]
            case ["POST", "branch", name]:
                branches[name] = dict(branches["main"])
                return {}
            case ["DELETE", "branch", name]:
                del branches[name]
                return {}
            case ["GET", "refs"]:
                refs = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                    for name, commit in repository.commits().items()
                ]
                return {"branches": refs, "converts": [], "tags": []}
            case ["GET", "revision", revision]:
                return {"_id": "0", "id": "0", "sha": repository.find(revision)[0]}
            case ["GET", "tree", revision, *folder]:  # with what is in its folders, asked or not
                start = "".join(f"{name}/" for name in folder)
                return [x for x in repository.tree(revision) if x["path"].startswith(start)]
            case ["POST", "preupload", _]:
                files = json.loads(body)["files"]
                return {"files": [{**x, "uploadMode": "lfs", "shouldIgnore": False} for x in files]}
            case ["POST", "info", "lfs", "objects", "batch"]:
                entries = json.loads(body)["objects"]
                for entry in (x for x in entries if x["oid"] not in self.server.objects):
                    href = f"{self.server.url}/objects/{entry['oid']}"
                    entry["actions"] = {"upload": {"href": href}}
                return {"transfer": "basic", "objects": entries}
            case ["POST", "commit", branch]:
                for operation in map(json.loads, body.splitlines()):
                    value = operation["value"]
                    if operation["key"] == "deletedFile":
                        del branches[branch][value["path"]]
                    elif operation["key"] == "lfsFile":
                        branches[branch][value["path"]] = self.server.objects[value["oid"]]
                commit = repository.commits()[branch]
                url = f"{self.server.url}/kernels/org/name/commit/{commit}"
                return {"commitOid": commit, "commitUrl": url}
        raise Refusal(404, f"the stand-in does not know {words}", "")
