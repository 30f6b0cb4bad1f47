"""As much of the Hub as publishing and loading models and data sets need, on 127.0.0.1, with faults on demand.

A repository is its commits, a commit is a table of path to content, and large files lie aside by their SHA-256. Rules that the
tests lean on are the Hub's: a commit needs all its large files, and its parent where it names one; a private repository is not
there for who may not see it. A data set's repository is called `datasets/owner/name`.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "Secret" * 6
OTHER_TOKEN = "hf_" + "Public" * 6  # of somebody who may read what is public, and open pull requests
LARGE = (".safetensors", ".parquet", ".gz", ".bin", ".pth", ".model")  # kept aside by their SHA-256, as by git-lfs
CUT, LOST = "cut", "lost"  # the connection ends in the middle of the request; after the work, before the answer


class HubServer(ThreadingHTTPServer):
    """The state of the Hub, and what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.collections = {}, {}, {}
        self.faults, self.requests, self.lock = [], Counter(), threading.Lock()
        self.hardware = []  # the machines of HF Jobs
        self.echo = False  # whether errors repeat the authorization header

    def fail(self, method, pattern, *answers, headers=(), body='{"error": "no"}'):
        """Answer the next requests that match with these statuses, or with `CUT` or `LOST`, one each."""
        self.faults += [(method, re.compile(pattern), answer, dict(headers), body) for answer in answers]

    def files(self, repo_id="me/small", revision="main"):
        """Return the contents at a revision, as a reader sees them."""
        repo = self.repos[repo_id]
        files = repo["commits"][repo["refs"].get(revision, revision)]
        return {path: self.objects[content] if isinstance(content, str) else content for path, content in files.items()}

    def asked(self, pattern):
        """Return how many requests matched, such as `PUT /lfs/`."""
        return sum(count for request, count in self.requests.items() if re.search(pattern, request))

    def add_repo(self, repo_id="me/small", private=True, **files):
        """Make a repository that holds some files."""
        self.repos[repo_id] = {"private": private, "commits": {}, "refs": {}}
        return self.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs\n", **files})

    def add_folder(self, repo_id, folder):
        """Make a public repository of the files in a folder, large ones aside."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for path, content in files.items():
            if path.endswith(LARGE):
                files[path] = hashlib.sha256(content).hexdigest()
                self.objects[files[path]] = content
        return self.add_repo(repo_id, private=False, **files)

    def commit(self, repo_id, ref, files):
        """Put a table of files at a ref; return the commit's id."""
        repo = self.repos[repo_id]
        sha = hashlib.sha1(f"{repo_id} {len(repo['commits'])}".encode()).hexdigest()
        repo["commits"][sha] = files
        repo["refs"][ref] = sha
        return sha


@contextmanager
def hub_server():
    """Run a Hub until the block ends."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def use(server, patch, cache):
    """Let this process take a server for the Hub, with caches of its own, until the patch is undone."""
    from datasets import config
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub

    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # its protocol is not spoken here
        "HF_HUB_CACHE": str(cache / "hub"),
    }.items():
        patch.setattr(constants, name, value)
    for name, value in {
        "HF_ENDPOINT": server.address,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": cache / "datasets",
        "DOWNLOADED_DATASETS_PATH": cache / "datasets/downloads",
    }.items():
        patch.setattr(config, name, value)
    patch.setattr(hf_api.api, "endpoint", server.address)  # of the module's functions, kept from its import on
    patch.setattr(hub, "_hf_api", None)  # transformers' own, kept from its first use on
    patch.setenv("HF_TOKEN", TOKEN)


class _Answer(Exception):
    """An error of the Hub: its status and, in the header, its kind."""

    def __init__(self, status, kind="", **content):
        super().__init__(status)
        self.status, self.kind, self.content = status, kind, {"error": kind or str(status), **content}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def handle_request(self):
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), unquote(parts.path)
        with self.server.lock:
            self.server.requests[f"{self.command} {path}"] += 1
            fault = next((f for f in self.server.faults if f[0] == self.command and f[1].search(path)), None)
            if fault:
                self.server.faults.remove(fault)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault[2] == CUT:
            self.rfile.read(length // 2)
            return
        self.body = self.rfile.read(length)
        if fault and fault[2] != LOST:
            body = fault[4] + (self.headers.get("Authorization", "") if self.server.echo else "")
            self.answer(body.encode(), fault[2], {"Content-Type": "text/plain", **fault[3]})
            return
        try:
            with self.server.lock:
                content, headers = self.route(self.command, path)
            status = headers.pop("Status", 200)
        except _Answer as error:
            content, headers, status = error.content, {"X-Error-Code": error.kind}, error.status
        if not fault:
            self.answer(content if isinstance(content, bytes) else json.dumps(content).encode(), status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self, method, path):
        """Return content and headers of the answer."""
        for verb, pattern, answer in ROUTES:
            if (method == verb or (method, verb) == ("HEAD", "GET")) and (match := re.fullmatch(pattern, path)):
                found = answer(self, *match.groups())
                return found if isinstance(found, tuple) else (found, {})
        raise _Answer(404, "EntryNotFound")

    @property
    def user(self):
        return {f"Bearer {TOKEN}": "me", f"Bearer {OTHER_TOKEN}": "you"}.get(self.headers.get("Authorization"))

    def repo(self, repo_id, write=False):
        repo = self.server.repos.get(repo_id)
        if "Authorization" in self.headers and self.user is None:
            raise _Answer(401)
        owner = repo_id.split("/")[-2]
        if repo is None or (repo["private"] and self.user != owner):
            raise _Answer(404, "RepoNotFound")
        if write and self.user != owner:
            raise _Answer(403)
        return repo

    def at(self, repo, revision):
        sha = repo["refs"].get(revision, revision)
        if sha not in repo["commits"]:
            raise _Answer(404, "RevisionNotFound")
        return sha, repo["commits"][sha]

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{'datasets/' * (asked.get('type') == 'dataset')}{asked['organization']}/{asked['name']}"
        if self.user is None:
            raise _Answer(401)
        if repo_id in self.server.repos:
            raise _Answer(409, url=f"{self.server.address}/{repo_id}")
        if self.user != asked["organization"]:
            raise _Answer(403)
        private = asked.get("private", asked.get("visibility") == "private")  # depends on the client's version
        self.server.add_repo(repo_id, private)
        return {"url": f"{self.server.address}/{repo_id}"}

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        sha, files = self.at(repo, revision)
        card = files.get("README.md", b"").decode().split("---")
        return {"id": repo_id, "sha": sha, "private": repo["private"], "tags": [],
                "cardData": yaml.safe_load(card[1]) if len(card) > 2 else None,
                "siblings": [{"rfilename": path} for path in files]}  # fmt: skip

    def preupload(self, repo_id, revision):
        repo = self.repo(repo_id, write="create_pr" not in self.query)
        _, files = self.at(repo, revision)
        ignored = files.get(".gitignore", b"").decode().split()
        return {"files": [{"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                           "shouldIgnore": path in ignored, "oid": _oid(files.get(path))}
                          for path in (file["path"] for file in json.loads(self.body)["files"])]}  # fmt: skip

    def batch(self, repo_id):
        self.repo(repo_id)
        objects = json.loads(self.body)["objects"]
        for o in objects:
            if o["oid"] not in self.server.objects:
                o["actions"] = {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400)
        self.server.objects[oid] = self.body
        return {}

    def commit(self, repo_id, revision):
        pull_request = "create_pr" in self.query
        repo = self.repo(repo_id, write=not pull_request)
        sha, files = self.at(repo, revision)
        files = dict(files)
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit", sha) != sha:
                raise _Answer(412)
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise _Answer(400)
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Answer(400)
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo["refs"])
        new = self.server.commit(repo_id, f"refs/pr/{number}" if pull_request else revision, files)
        home = f"{self.server.address}/{repo_id}"
        return {"commitUrl": f"{home}/commit/{new}", "commitOid": new,
                "pullRequestUrl": f"{home}/discussions/{number}" if pull_request else None}  # fmt: skip

    def branch(self, repo_id, branch):
        repo = self.repo(repo_id, write=True)
        if branch.startswith("refs/"):
            raise _Answer(400)
        repo["refs"][branch] = self.at(repo, json.loads(self.body).get("startingPoint", "main"))[0]
        return {}

    def tree(self, repo_id, revision, folder=""):
        files, recursive = self.at(self.repo(repo_id), revision)[1], self.query.get("recursive") == ["true"]
        start = f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(start)]
        if folder and not below:
            raise _Answer(404, "EntryNotFound")
        folders = {start + "/".join(parts[:depth]) for path in below for parts in [path.removeprefix(start).split("/")]
                   for depth in range(1, len(parts)) if recursive or depth == 1}  # fmt: skip
        entries = [self.entry(path, files[path]) for path in below if recursive or "/" not in path.removeprefix(start)]
        return [
            {"type": "directory", "path": path, "size": 0, "oid": _oid(path.encode())} for path in sorted(folders)
        ] + entries

    def paths_info(self, repo_id, revision):
        files = self.at(self.repo(repo_id), revision)[1]
        asked = parse_qs(self.body.decode())["paths"] if self.is_form() else json.loads(self.body)["paths"]
        folders = [path for path in asked if path not in files and any(name.startswith(f"{path}/") for name in files)]
        return [self.entry(path, files[path]) for path in asked if path in files] + [
            {"type": "directory", "path": path, "size": 0, "oid": _oid(path.encode())} for path in folders
        ]

    def is_form(self):
        return "urlencoded" in self.headers.get("Content-Type", "")

    def entry(self, path, content):
        body = self.server.objects[content] if isinstance(content, str) else content
        pointer = {"lfs": {"oid": content, "size": len(body), "pointerSize": 134}} if isinstance(content, str) else {}
        return {"type": "file", "path": path, "size": len(body), "oid": _oid(content), **pointer}

    def resolve(self, repo_id, revision, path):
        sha, files = self.at(self.repo(repo_id), revision)
        if path not in files:
            raise _Answer(404, "EntryNotFound")
        content = files[path]
        body = self.server.objects[content] if isinstance(content, str) else content
        found = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha, "Content-Type": "text/plain"}
        found["Accept-Ranges"] = "bytes"
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(body) - 1)
            found |= {"Status": 206, "Content-Range": f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"}
            body = body[start : end + 1]
        return body, found

    def list_collections(self):
        owners = self.query.get("owner")
        found = [c for c in self.server.collections.values() if not owners or c["owner"]["name"] in owners]
        return [{key: value for key, value in c.items() if key != "position"} for c in found]

    def create_collection(self):
        asked = json.loads(self.body)
        if self.user != asked["namespace"]:
            raise _Answer(403)
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-{len(self.server.collections):024x}"
        self.server.collections[slug] = {
            "slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}, "items": [], "position": 0,
            "lastUpdated": "2025-01-01T00:00:00.000Z", "private": asked["private"], "theme": "blue", "upvotes": 0,
        }  # fmt: skip
        return self.server.collections[slug]

    def collection(self, slug):
        if slug not in self.server.collections:
            raise _Answer(404)
        return self.server.collections[slug]

    def add_item(self, slug):
        found, item = self.collection(slug), json.loads(self.body)["item"]
        if any(item["id"] == other["id"] for other in found["items"]):
            raise _Answer(409)
        found["items"].append({"_id": str(len(found["items"])), "position": 0, **item})
        return found


def _oid(content):
    """Return what a client compares to know an unchanged file: git's hash, or the SHA-256 of a large one."""
    if isinstance(content, bytes):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return content


REPO = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models/)?{REPO}"
ROUTES = [
    ("GET", "/api/whoami-v2", lambda self: {"name": self.user}),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/jobs/hardware", lambda self: self.server.hardware),
    ("POST", "/api/validate-yaml", lambda self: {"errors": [], "warnings": []}),
    ("GET", API, _Handler.info),
    ("GET", rf"{API}/revision/(.+)", _Handler.info),
    ("GET", rf"{API}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("POST", rf"{API}/paths-info/(.+)", _Handler.paths_info),
    ("POST", rf"{API}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"{API}/commit/(.+)", _Handler.commit),
    ("POST", rf"{API}/branch/(.+)", _Handler.branch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(.+)", _Handler.store),
    ("GET", f"/{REPO}/resolve/([^/]+|refs/pr/[0-9]+)/(.+)", _Handler.resolve),
    ("GET", "/api/collections", _Handler.list_collections),
    ("POST", "/api/collections", _Handler.create_collection),
    ("GET", "/api/collections/([^/]+/[^/]+)", _Handler.collection),
    ("POST", "/api/collections/([^/]+/[^/]+)/items", _Handler.add_item),
]
