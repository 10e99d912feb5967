"""
Pages for the browsers of this machine: what `python -m tools.demo` and `python -m tools.annotate review` share.

    a request ─► guarded: is it from our own page on this machine? ─► get or post of the page's handler ─► respond

A page of another site can make a browser send requests to 127.0.0.1, too. Such a request carries that site's name as
its Origin, or, where the site's name was pointed at this machine, as its Host.
"""
import base64
import hashlib
import http.server
import io
import json
import os
import re
import select
import shutil
import socket
import sys
import tempfile
import urllib.parse

from PIL import Image

from lib.errors import UserError

HERE = os.path.dirname(os.path.abspath(__file__))


def jpeg(pixels, side):
    """JPEG bytes of (H, W, 3) uint8, its longer side at most `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90, subsampling=0)  # else the colours of small images are blurred
    return buffer.getvalue()


class LocalServer(http.server.ThreadingHTTPServer):
    """Listens on 127.0.0.1 alone. handler: a class derived from PageHandler; port 0: any free one."""
    daemon_threads = True

    def __init__(self, handler, port):
        try:
            super().__init__(("127.0.0.1", port), handler)
        except OSError as e:
            raise UserError(f"--port {port}: {e.strerror}; without --port a free one is taken") from None
        self.hosts = {f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"}
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        """A browser that went on and did not wait is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class PageHandler(http.server.BaseHTTPRequestHandler):
    """Answers our own page alone. A page derives from it and defines get(path, query) and post(path, query)."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a streamed answer is many small pieces

    def begin(self, status, kind, policy="default-src 'none'; frame-ancestors 'none'", **headers):
        """Send the head of a response. kind: its media type; policy: what a page may load and run."""
        headers = dict(Content_Type=kind, X_Content_Type_Options="nosniff", Cross_Origin_Resource_Policy="same-origin",
                       Cache_Control="no-store", Content_Security_Policy=policy, **headers)
        self.has_begun = True
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def respond(self, status, body, kind="application/json", **headers):
        """Send a whole response. body: bytes, or what becomes JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.begin(status, kind, Content_Length=len(body), **headers)
        self.wfile.write(body)

    def page(self, path):
        """Send an HTML file, page.js at the beginning of its <script>. No other script runs in it, whatever text it
        comes to show."""
        with open(path, "rb") as f, open(os.path.join(HERE, "page.js"), "rb") as g:
            text = f.read().replace(b"<script>", b"<script>" + g.read())
        script = re.search(b"<script>(.*)</script>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        self.respond(200, text, "text/html; charset=utf-8", policy=f"default-src 'self'; script-src 'sha256-{digest}'; "
                     "style-src 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; "
                     "form-action 'none'")

    def not_here(self, path):
        self.respond(404, dict(error=f"{path}: not here"))

    def length(self, limit):
        """How many bytes of body a request has. One of more than `limit`, or of unknown length, is not read."""
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length <= limit:
            told = f"{length / 2 ** 20:,.0f} MB" if length > limit else "an unknown number of bytes"
            raise UserError(f"{told} are sent; at most {limit / 2 ** 20:,.0f} MB are taken")
        return length

    def json_body(self, limit=1 << 24):
        """The body of a request, which must be JSON: a form of another site can send none."""
        body = self.rfile.read(self.length(limit))
        if self.headers.get("Content-Type") != "application/json":
            raise ValueError("the body must be application/json")
        return json.loads(body)

    def receive(self, files, parent, limit):
        """Write a body that is some files, one after the other, into a new folder of `parent`: (folder, their paths
        folder/0/NAME, folder/1/NAME, ...). files: [[name, bytes]], as many bytes as the body has, at most `limit`. Of
        a name only letters, digits, _, . and - are kept."""
        if sum(size for _, size in files) != self.length(limit) or min(size for _, size in files) < 0:
            raise ValueError(f"{files} are not as long as the body")
        folder = tempfile.mkdtemp(dir=parent)
        try:
            paths = []
            for k, (name, size) in enumerate(files):
                name = re.sub(r"[^\w.-]", "_", os.path.basename(name))[-60:].lstrip(".") or "file"
                paths.append(os.path.join(folder, str(k), name))
                os.mkdir(os.path.dirname(paths[-1]))
                with open(paths[-1], "wb") as f:
                    while size:
                        part = self.rfile.read(min(size, 1 << 20))
                        if not part:
                            raise ConnectionError("the upload broke off")
                        f.write(part)
                        size -= len(part)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return folder, paths

    def send_line(self, event):
        """Send the next line of a response of unknown length, as JSON."""
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def has_gone(self):
        """Whether the page has closed the connection: it does so to stop an answer, and when it is closed itself."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            return True

    def refuse(self, status, error):
        """Send an error. A response that is on its way breaks off instead, and the terminal says why."""
        if self.has_begun:
            raise
        self.close_connection = True  # the body may not have been read
        self.respond(status, dict(error=error))

    def guarded(self, work):
        """Do it, if it may be done; what is wrong with a request goes back to the page as one line."""
        self.has_begun = False
        host = self.headers.get("Host")
        origin = self.headers.get("Origin")
        foreign = origin is not None and origin.removeprefix("http://") not in self.server.hosts
        if host not in self.server.hosts or foreign or self.headers.get("Sec-Fetch-Site") == "cross-site":
            return self.refuse(403, f"Host {host}, Origin {origin}: this is for this machine alone")
        try:
            url = urllib.parse.urlsplit(self.path)
            work(url.path, dict(urllib.parse.parse_qsl(url.query)))
        except ConnectionError:
            raise
        except (UserError, OSError) as e:
            self.refuse(422, str(e))
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
            self.refuse(400, f"{type(e).__name__}: {e}")

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def log_message(self, *args):
        """Say nothing: the terminal is for people."""
