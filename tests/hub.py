"""A Hugging Face hub on loopback: what its client asks for, and faults to do.

A fault is [words of the requests "METHOD path" that it is for, what to do, how often]. What to do:
an HTTP status; "hang"; "slow"; "cut" or "stall" after half of a file; or, below 100, the place in
a file, in percent, of a byte that is sent wrong.
"""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".hdf5", ".parquet")  # known by SHA-256, the others by git's hash
PATH = re.compile(r"/(api/)?(?:models/|datasets/)?([^/]+/[^/]+?)(?:/resolve/main/(.+))?")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repositories):  # {"owner/name": {file: bytes}}, models and datasets alike
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.faults, self.sent = repositories, [], []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path, fault = self.path.split("?")[0], None
        for chosen in self.server.faults:
            if chosen[2] and all(word in f"{self.command} {path}" for word in chosen[0].split()):
                chosen[2], fault = chosen[2] - 1, chosen[1]
                break
        found = PATH.fullmatch(path)
        files = self.server.repositories.get(found[2]) if found else None
        time.sleep({"slow": 2, "hang": 60}.get(fault, 0))
        if (isinstance(fault, int) and fault >= 100) or path == "/":
            self.reply(fault or 200)
        elif files is None or not (found[1] or found[3] in files):
            self.reply(404, X_Error_Code="EntryNotFound" if files else "RepoNotFound")
        elif found[1]:
            siblings = [self.sibling(*file) for file in files.items()]
            self.reply(200, json.dumps({"siblings": siblings}).encode())
        else:
            self.send_file(found[3], files[found[3]], fault)

    do_HEAD = do_GET

    def sibling(self, name, content):
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        about = {"rfilename": name, "size": len(content), "blobId": sha1}
        if name.endswith(LARGE):
            about["lfs"] = {"sha256": hashlib.sha256(content).hexdigest()}
        return about

    def send_file(self, name, content, fault):
        about, size, status, first = self.sibling(name, content), len(content), 200, 0
        headers = {"X_Repo_Commit": "0" * 40, "ETag": f'"{about["blobId"]}"'}
        if "lfs" in about:
            headers |= {"X_Linked_Etag": f'"{about["lfs"]["sha256"]}"', "X_Linked_Size": size}
        if asked := re.match(r"bytes=(\d+)-", self.headers["Range"] or ""):
            status, first = 206, int(asked[1])
            headers["Content_Range"] = f"bytes {first}-{size - 1}/{size}"
        if isinstance(fault, int):
            place = size * fault // 100
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        if self.command == "GET":
            self.server.sent.append((name, status))
        last = (first + size) // 2 if fault in ("cut", "stall") else size
        self.reply(status, content[first:last], **headers, Content_Length=size - first)
        time.sleep(60 if fault == "stall" else 0)
        self.close_connection |= last < size
