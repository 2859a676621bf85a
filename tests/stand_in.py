"""A stand-in of the Hugging Face hub on loopback: the requests that the real client makes, and no others."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_stand_in"


class Hub(ThreadingHTTPServer):
    """Repositories in memory; the big files lie under another origin, as on the real hub.

    Attributes:
        commits: by repository, the files of each commit by its hash, the newest last.
        private: repositories that only the token opens.
        requests: method, path and headers of all that was asked.
        breaks: how many more answers with big files end after half of what was asked for.
        wrong: what to send in the place of big files, if anything.
        down: whether each request is answered with 503.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits, self.private, self.requests, self.big = {}, set(), [], {}
        self.breaks, self.wrong, self.down = 0, None, False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo, files):
        """A commit with these files alone, by path; returns its hash."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()), len(self.commits.get(repo, {})))).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        return commit

    def add_folder(self, repo, folder):
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.add(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def newest(self, repo):
        """The hash and the files of the newest commit."""
        return list(self.commits[repo].items())[-1]

    def paths(self, method="GET"):
        return [path for sent, path, _ in self.requests if sent == method]

    def environment(self, place, **more):
        """For a process that uses this hub: nothing of the user's, no login, no telemetry, no other protocol."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(place / "hf"), "DDPM_CACHE_DIR": str(place / "cache"),
            "HF_TOKEN": "", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        } | more  # fmt: skip


def is_big(path):
    """Whether a file goes to the store of big files, which lists SHA-256; the others are known by git's SHA-1."""
    return path.endswith((".safetensors", ".png", ".bin"))


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status=200, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path, dict(self.headers)))
        if hub.down:
            return self.answer(503)
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return function(self, **match.groupdict())
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def logged_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def files(self, repo, revision):
        """The commit and its files; None, after an answer, where there are none."""
        hub = self.server
        if repo not in hub.commits or (repo in hub.private and not self.logged_in()):
            self.answer(404 if self.logged_in() else 401, X_Error_Code="RepoNotFound")
        elif revision in hub.commits[repo]:
            return revision, hub.commits[repo][revision]
        elif revision in (None, "main") and hub.commits[repo]:
            return hub.newest(repo)
        else:
            self.answer(404, X_Error_Code="RevisionNotFound")
        return None

    def info(self, repo, revision=None):
        if found := self.files(repo, revision):
            commit, files = found
            siblings = [{"rfilename": path} | metadata(content, path) for path, content in files.items()]
            self.answer(content={"id": repo, "sha": commit, "siblings": siblings})

    def tree(self, repo, revision):
        if found := self.files(repo, revision):
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                for path, content in found[1].items()
            ]
            self.answer(content=listed)

    def resolve(self, repo, revision, path):
        if found := self.files(repo, revision):
            commit, files = found
            content, headers = files[path], {"X_Repo_Commit": commit}
            if not is_big(path):
                return self.answer(content=content, ETag=f'"{git_hash(content)}"', **headers)
            store = self.server.url.replace("127.0.0.1", "localhost")
            self.server.big[sha256(content)] = content
            return self.answer(
                302, Location=f"{store}/store/{sha256(content)}", X_Linked_ETag=f'"{sha256(content)}"',
                X_Linked_Size=len(content), **headers,
            )  # fmt: skip
        return None

    def stored(self, oid):
        hub = self.server
        content = hub.big[oid] if hub.wrong is None else hub.wrong
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        content = content[int(begin[1]) :] if begin else content
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if hub.breaks:
            hub.breaks -= 1
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    def create(self):
        if not self.logged_in():
            return self.answer(401)
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if not repo.startswith("me/"):
            return self.answer(403)
        status = 409 if repo in self.server.commits else 200
        self.server.commits.setdefault(repo, {hashlib.sha1(repo.encode()).hexdigest(): {".gitattributes": b"x"}})
        return self.answer(status, {"url": f"{self.server.url}/{repo}"})

    def validate(self):
        assert json.loads(self.body)["content"].startswith("---\n")
        self.answer(content={"errors": [], "warnings": []})

    def preupload(self, repo):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if is_big(path) else "regular" for path in paths}
        self.answer(content={"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]})

    def batch(self, repo):
        objects = json.loads(self.body)["objects"]
        upload = {entry["oid"]: {"upload": {"href": f"{self.server.url}/upload/{entry['oid']}"}} for entry in objects}
        self.answer(content={"transfer": "basic", "objects": [e | {"actions": upload[e["oid"]]} for e in objects]})

    def upload(self, oid):
        assert sha256(self.body) == oid
        self.server.big[oid] = self.body
        self.answer()

    def commit(self, repo):
        if not self.logged_in():
            return self.answer(401)
        hub = self.server
        files = dict(hub.newest(repo)[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.big[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert line["key"] == "header"
        commit = hub.add(repo, files)
        return self.answer(content={"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})


def metadata(content, path):
    large = {"lfs": {"size": len(content), "sha256": sha256(content), "pointerSize": 130}} if is_big(path) else {}
    return {"size": len(content), "blobId": git_hash(content)} | large


REPO = "(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (["GET"], f"/api/models/{REPO}", Handler.info),
    (["GET"], f"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    (["GET"], f"/api/models/{REPO}/tree/(?P<revision>.+)", Handler.tree),
    (["GET", "HEAD"], f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (["GET"], "/store/(?P<oid>.+)", Handler.stored),
    (["POST"], "/api/repos/create", Handler.create),
    (["POST"], "/api/validate-yaml", Handler.validate),
    (["POST"], f"/api/models/{REPO}/preupload/main", Handler.preupload),
    (["POST"], rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (["PUT"], "/upload/(?P<oid>.+)", Handler.upload),
    (["POST"], f"/api/models/{REPO}/commit/main", Handler.commit),
]
