"""A Hub of its own on 127.0.0.1: what pushing and loading models need of its HTTP interface, kept in memory."""

import base64
import hashlib
import json
import re
import sys
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_local"  # the one that may write
LARGE = (".safetensors", ".png")  # files that the real one, too, stores outside of git
REPO, REVISION, FILE = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)", r"(?P<file>.+)"
ROUTES = [
    ("POST", "/api/repos/create", "create_repository"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "large_files"),
    ("PUT", f"/{REPO}/blobs/(?P<oid>[0-9a-f]{{64}})", "put_blob"),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", "commit"),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", "create_branch"),
    ("POST", f"/api/models/{REPO}/tag/{REVISION}", "create_tag"),
    ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", "describe"),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(/{FILE})?", "list_files"),
    ("GET", f"/{REPO}/resolve/{REVISION}/{FILE}", "read_file"),
    ("GET", "/api/agent-harnesses", "list_harnesses"),
]
ERRORS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "Conflict": 409, "BadRequest": 400}


class HubError(Exception):
    """An answer with the status of `ERRORS` and its name in the header X-Error-Code."""


def etag(name: str, content: bytes) -> str:
    """What names a content: the sha256 of a large file, git's sha1 of any other."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """The files of every commit, the commit of every branch, tag and pull request, and the large files uploaded."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def add(self, ref: str, files: dict[str, bytes], message: str) -> str:
        """Makes `files` the newest commit of `ref` and returns its id."""
        content = [self.refs.get(ref), message, {name: etag(name, data) for name, data in files.items()}]
        commit = hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.commits[commit], self.refs[ref] = files, commit
        self.messages.append(message)
        return commit

    def find(self, revision: str | None) -> str:
        """The commit that a branch, a tag or its own id means."""
        commit = self.refs.get(revision or "main", revision)
        if commit not in self.commits:
            raise HubError("RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.find(revision)]


class HubServer(ThreadingHTTPServer):
    """
    Serves until the end of the `with` block it is used in.

    Attributes:
        url (`str`): the HF_ENDPOINT of clients.
        repositories (`dict[str, Repository]`): by id; of a data set it begins with "datasets:".
        requests (`list[str]`): "METHOD path" of each request.
        unknown (`list[str]`): those that nothing here can answer, and errors of the server itself.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.faults: list[list] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up
            self.unknown.append(traceback.format_exc())

    @contextmanager
    def fault(self, requests: str, kind: int | str, times: int = 1_000_000):
        """
        Answers the next `times` requests whose "METHOD path" matches the expression `requests` with a fault.

        Args:
            kind (`int` or `str`): a status; "drop" hangs up halfway through the request, "cut" through the answer.
        """
        fault = [re.compile(requests), kind, times]
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)

    def next_fault(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault[0].search(request) and fault[2] > 0:
                fault[2] -= 1
                return fault[1]
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection. The methods named in ROUTES answer with what they return, as JSON, or by themselves."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet: the client delays its acknowledgement of the first of two
    server: HubServer

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        self.server.requests.append(request)
        self.fault = self.server.next_fault(request)
        length = int(self.headers.get("Content-Length", 0))
        if self.fault == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body, self.query = self.rfile.read(length), url.query
        if isinstance(self.fault, int):
            self.send(self.fault, b"{}")
            return
        route, arguments = self.find_route(url.path)
        if route is None:
            self.server.unknown.append(request)
            self.send(501, b"{}")
        elif self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        else:
            try:
                result = route(**arguments)
            except HubError as error:
                name = str(error)
                self.send(ERRORS[name], json.dumps({"error": name}).encode(), {"X-Error-Code": name})
            else:
                if result is not None:
                    self.send(200, json.dumps(result).encode())

    def find_route(self, path: str):
        """The method that answers a path, and its arguments."""
        method = "GET" if self.command == "HEAD" else self.command
        path = re.sub(r"^/api/datasets/", "/api/models/datasets:", path)
        path = re.sub(r"^/datasets/", "/datasets:", path)
        for known, pattern, name in ROUTES:
            if known == method and (match := re.fullmatch(pattern, path)):
                return getattr(self, name), {key: unquote(text or "") for key, text in match.groupdict().items()}
        return None, {}

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def repository(self, repo: str) -> Repository:
        if repo not in self.server.repositories:
            raise HubError("RepoNotFound")
        return self.server.repositories[repo]

    # Writing

    def create_repository(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        result = {"url": f"{self.server.url}/{repo}", "name": repo}
        if repo in self.server.repositories:
            self.send(409, json.dumps(result).encode())
            return None
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.server.repositories[repo] = repository = Repository(private)
        repository.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return result

    def validate_card(self):
        return {"errors": [], "warnings": []}

    def preupload(self, repo, revision):
        files = self.repository(repo).files(revision)
        wanted = json.loads(self.body)["files"]
        for file in wanted:
            name = file["path"]
            file |= {"uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
            file |= {"oid": etag(name, files[name])} if name in files else {}
        return {"files": wanted}

    def large_files(self, repo):
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.repository(repo).blobs:
                wanted["actions"] = {"upload": {"href": f"{self.server.url}/{repo}/blobs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def put_blob(self, repo, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError("BadRequest")
        self.repository(repo).blobs[oid] = self.body
        return {}

    def commit(self, repo, revision):
        repository = self.repository(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files, message, pull_request = dict(repository.files(revision)), "", None
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and len(repository.blobs.get(value["oid"], b"")) == value["size"]:
                files[value["path"]] = repository.blobs[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise HubError("BadRequest")
        if "create_pr=1" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            revision, pull_request = f"refs/pr/{number}", f"{self.server.url}/{repo}/discussions/{number}"
        commit = repository.add(revision, files, message)
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": pull_request}

    def create_branch(self, repo, revision):
        return self.create_ref(repo, revision, json.loads(self.body or b"{}").get("startingPoint"))

    def create_tag(self, repo, revision):
        return self.create_ref(repo, json.loads(self.body)["tag"], revision)

    def create_ref(self, repo, ref, start):
        repository = self.repository(repo)
        if ref in repository.refs:
            raise HubError("Conflict")
        repository.refs[ref] = repository.find(start)
        return {}

    # Reading

    def list_harnesses(self):
        return {"standardEnvVars": [], "harnesses": {}}

    def describe(self, repo, revision):
        repository = self.repository(repo)
        commit = repository.find(revision)
        files = [{"rfilename": name} for name in repository.commits[commit]]
        return {"id": repo.removeprefix("datasets:"), "sha": commit, "siblings": files}

    def list_files(self, repo, revision, file):
        found = self.repository(repo).files(revision)
        found = {name: content for name, content in found.items() if name.startswith(f"{file}/" if file else "")}
        if file and not found:
            raise HubError("EntryNotFound")
        return [
            {"type": "file", "path": name, "oid": etag(name, content), "size": len(content)}
            for name, content in found.items()
        ]

    def read_file(self, repo, revision, file):
        """A file, or what is left of it from the first byte that the client still needs."""
        repository = self.repository(repo)
        commit = repository.find(revision)
        headers = {"X-Repo-Commit": commit}
        if file not in repository.commits[commit]:
            self.send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        content = repository.commits[commit][file]
        headers["ETag"] = f'"{etag(file, content)}"'
        if file.endswith(LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(content)}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, end = int(match[1]), len(content)
            self.send(206, content[start:], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{end}"})
        else:
            self.send(200, content, headers)
