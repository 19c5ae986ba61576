"""A hub on this machine: repositories in memory behind the endpoints that huggingface_hub's client uses, and its faults.

Written after the client's requests, so it proves that qlite and the client fit each other, not that the real hub is as this
one is. Files are served as plain HTTP, large ones as LFS; Xet storage is not spoken.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_a_secret_that_nobody_prints"
Files = dict[str, bytes]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass
class Repository:
    """Commits by hash, and the branches and tags that name them."""

    private: bool
    gated: bool = False
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        """Returns the hash of a new commit on a ref, which adds files to those of the one before."""
        whole = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        name = hashlib.sha1(f"{len(self.commits)} {sorted((n, sha256(c)) for n, c in whole.items())}".encode()).hexdigest()
        self.commits[name], self.refs[ref] = whole, name
        return name

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> Files:
        return self.commits[self.refs["main"]]


@dataclasses.dataclass
class Request:
    """What was asked: the path with no query, and the headers, names in lower case."""

    method: str
    path: str
    headers: dict[str, str]


@dataclasses.dataclass
class Fault:
    """What happens to requests whose "METHOD path" a pattern finds, `times` times.

    Attributes:
        status: of an answer without a repository being asked; None: the true answer, spoilt thus:
        headers: in place of the true ones, or beside them.
        cut: the body ends after so many bytes, though its length was announced. reset: and the connection breaks.
        spoil: what is sent instead of a body of the same length. delay: seconds before anything is sent.
    """

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: int | None = None
    reset: bool = False
    spoil: Callable[[bytes], bytes] | None = None
    delay: float = 0.0


class Hub(ThreadingHTTPServer):
    """The server. `repositories` by id, `requests` in order, `faults` to come."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.stored: dict[str, bytes] = {}  # LFS objects that were sent, by SHA-256
        self.waits: list[float] = []  # seconds that the client would have slept
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo_id: str, files: Files, *, private: bool = False, gated: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private, gated)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return repository

    def fault(self, pattern: str, *, times: int = 1000, **what) -> None:
        self.faults.append(Fault(pattern, times, **what))

    def asked(self, pattern: str) -> list[Request]:
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no news."""


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Hub]:
    """A hub, and the client in this process turned to it: an empty cache, no login, no Xet, waits that are only noted.

    Names of other machines are not looked up: nothing leaves this one.
    """
    from huggingface_hub import constants, file_download, hf_api, utils

    def here_alone(host, *arguments, **options):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"{host} was asked for"
        return found(host, *arguments, **options)

    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", here_alone)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    utils.disable_progress_bars()
    with serving() as hub:
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 5,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        hub.waits = []
        for module in (utils._http, file_download):
            monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=hub.waits.append))
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions that are no methods
        utils.close_session()  # the client before may know a proxy
        yield hub
        utils.close_session()
    utils.enable_progress_bars()


def environment(hub: Hub, home) -> dict[str, str]:
    """The environment of a process whose client is turned to the hub."""
    kept = {name: value for name, value in os.environ.items() if not re.match("(?i)hf_|hugging|.*_proxy", name)}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


class _Handler(BaseHTTPRequestHandler):
    """One connection. The routes are in `ROUTES`, tried in order."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args) -> None:
        """Nothing on stderr."""

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.fault = None
        with self.server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.requests.append(Request(self.command, path, headers))
            for fault in self.server.faults:
                if fault.times and re.search(fault.pattern, f"{self.command} {path}"):
                    fault.times -= 1
                    self.fault = fault
                    break
        if self.fault is not None:
            time.sleep(self.fault.delay)
            if self.fault.status is not None:
                return self.refuse(self.fault.status, "a fault")
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                with self.server.lock:
                    answer = route(self, *match.groups())
                return answer() if callable(answer) else None
        return self.refuse(404, "no such page")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    # What is sent.

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        fault, sent = self.fault, body
        if fault is not None and fault.spoil is not None:
            sent = fault.spoil(body)
            assert len(sent) == len(body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {}), **(fault.headers if fault else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut is not None:
            self.wfile.write(sent[: fault.cut])
            self.wfile.flush()
            self.close_connection = True
            if fault.reset:
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                self.connection.shutdown(socket.SHUT_WR)
            return
        self.wfile.write(sent)

    def say(self, value: object, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        named = {"X-Error-Code": code} if code else {}
        headers = {"X-Error-Message": message, **named, "Content-Type": "application/json", **(headers or {})}
        self.send(status, body, headers)

    # Who asks, and for what.

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, or None where a refusal has been sent."""
        if "Authorization" in self.headers and not self.known:
            return self.refuse(401, "Invalid credentials in Authorization header")
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self.known):
            # The hub tells a stranger nothing about what is there.
            return self.refuse(404 if self.known else 401, "Repository not found", "RepoNotFound")
        return repository

    def found(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        commit = repository.find(revision)
        if commit is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    # Reading.

    def info(self, repo_id: str, revision: str | None = None) -> None:
        if (found := self.found(repo_id, revision or "main")) is not None:
            repository, commit = found
            siblings = [{"rfilename": name} for name in repository.commits[commit]]
            answer = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": repository.private, "siblings": siblings}
            self.say({**answer, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> None:
        if (found := self.found(repo_id, revision)) is not None:
            repository, commit = found
            self.say([_entry(name, content) for name, content in repository.commits[commit].items()])

    def resolve(self, repo_id: str, revision: str, name: str):
        if (found := self.found(repo_id, revision)) is None:
            return None
        repository, commit = found
        if repository.gated and not self.known:
            return self.refuse(401, "Access to this model is restricted", "GatedRepo")
        content = repository.commits[commit].get(name)
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        entry = _entry(name, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None:
            return lambda: self.send(200, content, headers)
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return lambda: self.send(206, content[start:], headers)

    # Writing.

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self.known:
            return self.refuse(401, "Invalid username or password.")
        if asked["organization"] != "me":
            return self.refuse(403, f"You don't have the rights to create a model under the namespace {asked['organization']}")
        if repo_id in self.server.repositories:
            return self.say({"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}, 409)
        self.server.add(repo_id, {}, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return self.say({"url": f"{self.server.url}/{repo_id}"})

    def validate_yaml(self) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        named = re.search(r"^base_model: *\"?([^\"\n]*)", match[1], re.MULTILINE) if match else None
        if named and not re.fullmatch(r"[\w.\-]+/[\w.\-]+", named[1]):
            message = f'"base_model" with value "{named[1]}" is not valid. Use a model id from the hub.'
            return self.say({"errors": [{"message": message}], "warnings": []}, 400)
        return self.say({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        if self.found(repo_id, revision) is not None:
            files = json.loads(self.body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular" for f in files}
            self.say({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})

    def lfs_batch(self, repo_id: str) -> None:
        if self.repository(repo_id) is not None:
            objects = json.loads(self.body)["objects"]
            upload = {o["oid"]: {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}} for o in objects}
            self.say({"transfer": "basic", "objects": [{**o, "actions": upload[o["oid"]]} for o in objects]})

    def lfs_put(self, oid: str) -> None:
        if sha256(self.body) != oid:
            return self.refuse(400, "not what was announced")
        self.server.stored[oid] = self.body
        return self.say({})

    def commit(self, repo_id: str, revision: str) -> None:
        if (found := self.found(repo_id, revision)) is None:
            return None
        repository, head = found
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = next(line["value"] for line in lines if line["key"] == "header").get("parentCommit")
        if parent not in (None, head):
            return self.refuse(412, "A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        commit = repository.commit(files, revision)
        return self.say({"commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}", "commitOid": commit})


def _entry(name: str, content: bytes) -> dict:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name.endswith((".safetensors", ".png")):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return entry


_ID = r"([\w\-]+/[\w.\-]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_ID}", _Handler.info),
    ("GET", rf"/api/models/{_ID}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    ("POST", rf"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
