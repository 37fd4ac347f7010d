"""A stand-in for the Hub on this machine: kernel repositories over HTTP, kept in memory.

It answers what huggingface_hub and kernels ask to create, fill, list and read a kernel repository,
and it can be told to fail. It knows branches and no history, and takes every file for a large one.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from pathlib import PurePosixPath

from werkzeug import Request, Response
from werkzeug.serving import make_server


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


class Hub:
    """``with Hub() as hub``: serves at ``hub.url`` until the end of the block."""

    def __init__(self):
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded files by their oid
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @Request.application
    def answer(self, request: Request) -> Response:
        asked = f"{request.method} {request.path}"
        self.requests.append(asked)
        matching = (f for f in self.faults if f.times > 0 and re.search(f.request, asked))
        fault = next(matching, None)
        try:
            if fault is not None:
                fault.times -= 1
                if fault.sent is None:
                    raise Refusal(fault.status, "the stand-in was told to fail", "")
            content = self.find(request.method, request.path.split("/")[1:], request.get_data())
        except Refusal as refusal:
            status, message, code = refusal.args
            return Response("{}", status, {"X-Error-Message": message, "X-Error-Code": code})
        if not isinstance(content, tuple):
            return Response(json.dumps(content), mimetype="application/json")
        commit, file = content
        response = Response(file, headers={"X-Repo-Commit": commit})
        response.set_etag(oid(file))
        response.make_conditional(request, accept_ranges=True, complete_length=len(file))
        if fault is not None:  # the length stays that of the whole
            response.response = [file[: fault.sent]]
        return response

    def find(self, method: str, path: list[str], body: bytes) -> object:
        """What becomes JSON, or the commit and the content of a file."""
        match path:
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                repo_id = f"{wanted['organization']}/{wanted['name']}"
                self.repositories[repo_id] = Repository({".gitattributes": b""})
                return {"url": f"{self.url}/kernels/{repo_id}", "name": repo_id}
            case ["objects", name]:
                self.objects[name] = body
                return {}
            case ["api", "kernels", *words] | ["kernels", *words]:
                repo_id = "/".join(words[:2]).removesuffix(".git")
                if repo_id not in self.repositories:
                    raise Refusal(404, f"there is no {repo_id}", "RepoNotFound")
                return self.ask(self.repositories[repo_id], method, words[2:], body)
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
                files = repository.find(revision)[1]
                folders = {str(x) for file in files for x in PurePosixPath(file).parents} - {"."}
                tree = [{"path": x, "type": "directory", "oid": x, "size": 0} for x in folders]
                for name, x in files.items():
                    tree.append({"path": name, "type": "file", "oid": oid(x), "size": len(x)})
                start = "".join(f"{name}/" for name in folder)
                return [entry for entry in tree if entry["path"].startswith(start)]
            case ["POST", "preupload", _]:
                files = json.loads(body)["files"]
                return {"files": [{**x, "uploadMode": "lfs", "shouldIgnore": False} for x in files]}
            case ["POST", "info", "lfs", "objects", "batch"]:
                entries = json.loads(body)["objects"]
                for entry in (x for x in entries if x["oid"] not in self.objects):
                    entry["actions"] = {"upload": {"href": f"{self.url}/objects/{entry['oid']}"}}
                return {"transfer": "basic", "objects": entries}
            case ["POST", "commit", branch]:
                for operation in map(json.loads, body.splitlines()):
                    value = operation["value"]
                    if operation["key"] == "deletedFile":
                        del branches[branch][value["path"]]
                    elif operation["key"] == "lfsFile":
                        branches[branch][value["path"]] = self.objects[value["oid"]]
                commit = repository.commits()[branch]
                url = f"{self.url}/kernels/org/name/commit/{commit}"
                return {"commitOid": commit, "commitUrl": url}
        raise Refusal(404, f"the stand-in does not know {words}", "")
