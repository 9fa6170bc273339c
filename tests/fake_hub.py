"""A Hugging Face Hub on this machine: the routes that huggingface_hub uses to publish and download a model."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Repositories of files, each commit all or nothing; LFS blobs arrive before the commit that names them."""

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.requests: list[str] = []
        self.refuse_put_of = b""  # content that the blob store answers with 403
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.split("?")[0]
                hub.requests.append(f"{self.command} {path}")
                authorised = self.headers.get("Authorization") == "Bearer hf_write"
                status, content, headers = hub.route(self.command, path, body, authorised)
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                    headers = {"Content-Type": "application/json", **headers}
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def route(self, method, path, body, authorised):
        if path.startswith("/lfs/"):
            self.puts.append(path)
            if self.refuse_put_of and self.refuse_put_of in body:
                return 403, {"error": "expired"}, {}
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if method == "POST" and not authorised:
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}, {}
            self.repos[name] = {"private": asked.get("visibility") == "private", "files": {}, "commits": []}
            return 200, {"url": f"{self.endpoint}/{name}"}, {}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"warnings": [], "errors": []}, {}
        name = re.search(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(?:/|$)", path)[1]
        repo = self.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if path.endswith("/preupload/main"):
            return 200, {"files": [self.upload_mode(repo, file["path"]) for file in json.loads(body)["files"]]}, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for blob in objects:
                if blob["oid"] not in self.blobs:
                    blob["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{blob['oid']}"}}
            return 200, {"objects": objects, "transfer": "basic"}, {}
        if path.endswith("/commit/main"):
            return self.commit(name, body)
        if "/resolve/main/" in path:
            content = repo["files"].get(path.split("/resolve/main/")[1])
            if content is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            etag = hashlib.sha256(content).hexdigest()
            return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "f" * 40}
        sha = repo["commits"][-1]["oid"] if repo["commits"] else "0" * 40
        return 200, {"id": name, "private": repo["private"], "sha": sha, "siblings": []}, {}

    def upload_mode(self, repo, path):
        lfs = path.endswith((".safetensors", ".png"))
        here = repo["files"].get(path)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if here is not None:
            git = hashlib.sha1(b"blob %d\0" % len(here) + here).hexdigest()
            answer["oid"] = hashlib.sha256(here).hexdigest() if lfs else git
        return answer

    def commit(self, name, body):
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return 400, {"error": "LFS pointer to a blob that does not exist"}, {}
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        repo = self.repos[name]
        repo["files"] |= files
        oid = hashlib.sha1(body).hexdigest()
        repo["commits"].append({"oid": oid, "message": header["value"]["summary"], "files": sorted(files)})
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid}, {}
