"""Downloads from a server on this machine that speaks the Hub's protocol, with what can go wrong on the way."""

from __future__ import annotations

import hashlib
import http.server
import json
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import run
from conftest import random_weights, tiny_config
from PIL import Image

from minibeit import BeitForImageClassification, CheckpointError, hub
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.save import save_checkpoint
from minibeit.cli.loading import check_head, load_model, load_processor
from minibeit.loading_options import Where

ID = "someone/tiny-beit"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` of one repository: small ones directly, weights by a redirect to another host, as the Hub does."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None  # bytes after which the first answer from /cdn/ breaks off
        self.promise = 0  # bytes that X-Linked-Size says beyond the truth
        self.token: str | None = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        if self.path.startswith("/cdn/"):
            return self.send_file(self.server.files[self.path[5:]], head)
        parts = self.path.strip("/").split("/")
        if "/".join(parts[:2]) != ID:
            return self.refuse(404, "RepoNotFound")
        if self.server.token and self.headers.get("authorization") != f"Bearer {self.server.token}":
            return self.refuse(401, "GatedRepo")
        if len(parts) < 5 or parts[2] != "resolve" or parts[3] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        name = "/".join(parts[4:])
        content = self.server.files.get(name)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        if name.endswith((".safetensors", ".bin")):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{name}")
            self.send_header("X-Linked-Size", str(len(content) + self.server.promise))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self.send_file(content, head)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, content, head):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if head:
            return
        cut = self.server.cut_after
        if cut is not None and self.path.startswith("/cdn/"):
            self.server.cut_after = None
            self.wfile.write(content[start : start + cut])
            self.close_connection = True
            return
        self.wfile.write(content[start:])


@pytest.fixture
def server(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(tmp_path):
    config = tiny_config(use_relative_position_bias=True)
    arrays = random_weights(config, "image_classification", dtype="float32")
    save_checkpoint(tmp_path / "made", config, "image_classification", arrays)
    return {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}, config, arrays


def test_model_by_id(server, checkpoint, tmp_path):
    server.files, config, arrays = checkpoint
    model = BeitForImageClassification.from_pretrained(ID, backend="numpy")
    assert model.config == config
    for name, array in arrays.items():
        np.testing.assert_array_equal(model.arrays[name], array)
    assert (tmp_path / "home" / "hub" / "models--someone--tiny-beit").is_dir()
    before = len(server.requests)
    hub.resolve(ID)
    assert all(method == "HEAD" for method, *_ in server.requests[before:])  # nothing is fetched twice


def test_a_command_asks_for_each_file_once(server, checkpoint):
    server.files, config, _ = checkpoint
    server.files["preprocessor_config.json"] = b'{"size": {"height": 8, "width": 12}}'
    args = SimpleNamespace(model=ID, dtype="float32", backend="numpy", device=None)
    for _ in ("downloading", "from the cache"):
        server.requests.clear()
        check_head(ID, "image_classification")
        asked = list(server.requests)
        assert asked and max(Counter((method, path) for method, path, _ in asked).values()) == 1
        server.requests.clear()
        assert load_model(BeitForImageClassification, args).config == config
        assert load_processor(ID, config).size == {"height": 8, "width": 12}
        files = [path.rpartition("/")[2] for _, path, _ in server.requests]
        assert files and max(Counter(files).values()) == 1  # `load_model` checks again; what follows reads the cache


def test_evaluate_asks_for_each_file_once(server, checkpoint, tmp_path, capsys):
    server.files, config, _ = checkpoint
    for i in range(config.num_labels):
        folder = tmp_path / "data" / config.id2label[i]
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 8), (40 * i, 9, 9)).save(folder / "0.png")
    for _ in ("downloading", "from the cache"):
        server.requests.clear()
        run(capsys, "evaluate", tmp_path / "data", "-m", ID, "--backend", "numpy", "-q")
        asked = Counter((method, path) for method, path, _ in server.requests)
        assert asked and max(asked.values()) == 1


def test_subfolder_variant_and_cache(server, checkpoint, tmp_path):
    files, config, arrays = checkpoint
    server.files = {f"runs/last/{name.replace('model.', 'model.fp16.')}": content for name, content in files.items()}
    words = dict(subfolder="runs/last", variant="fp16", cache_dir=str(tmp_path / "elsewhere"))
    model = BeitForImageClassification.from_pretrained(ID, backend="numpy", **words)
    np.testing.assert_array_equal(model.arrays["classifier.weight"], arrays["classifier.weight"])
    assert (tmp_path / "elsewhere" / "models--someone--tiny-beit").is_dir()
    before = len(server.requests)
    BeitForImageClassification.from_pretrained(ID, backend="numpy", local_files_only=True, **words)
    assert len(server.requests) == before
    with pytest.raises(FileNotFoundError, match="local_files_only is set"):
        BeitForImageClassification.from_pretrained(ID, local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.bf16\.safetensors"):
        BeitForImageClassification.from_pretrained(ID, subfolder="runs/last", variant="bf16")


def test_an_adapter_comes_with_its_base(server, checkpoint, tmp_path, rng):
    files, _, arrays = checkpoint
    module = "base_model.model.beit.encoder.layer.0.attention.attention.query.lora_"
    A, B = rng.standard_normal((2, 12)).astype(np.float32), rng.standard_normal((12, 2)).astype(np.float32)
    write_safetensors(tmp_path / "a.safetensors", {f"{module}A.weight": A, f"{module}B.weight": B})
    settings = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": ID}
    server.files = {
        **files,
        "tuned/adapter_config.json": json.dumps(settings).encode(),
        "tuned/adapter_model.safetensors": (tmp_path / "a.safetensors").read_bytes(),
    }
    model = BeitForImageClassification.from_pretrained(ID, subfolder="tuned", dtype="float64", backend="numpy")
    name = "beit.encoder.0.attention.query.weight"
    np.testing.assert_allclose(model.arrays[name], arrays[name] + 2 * B.astype(float) @ A, rtol=1e-13)


def test_interrupted_download_goes_on_where_it_stopped(server, checkpoint, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # else 10 MB come whole or not at all
    server.files = checkpoint[0]
    server.cut_after = 1000
    folder = hub.resolve(ID)
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    ranges = [range for method, path, range in server.requests if method == "GET" and path.startswith("/cdn/")]
    assert ranges == [None, "bytes=1000-"]


def test_wrong_size_is_refused(server, checkpoint):
    server.files, server.promise = checkpoint[0], 10
    with pytest.raises(CheckpointError, match=r"download of model\.safetensors failed"):
        hub.resolve(ID)
    server.promise = 0
    assert (hub.resolve(ID) / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_bin_is_taken_where_there_are_no_safetensors(server, checkpoint):
    server.files = {"config.json": checkpoint[0]["config.json"], "pytorch_model.bin": b"PK"}
    folder = hub.resolve(ID)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_shards(server, checkpoint, tmp_path):
    files, config, arrays = checkpoint
    from minibeit.checkpoint.names import hub_names

    tensors = {theirs: arrays[ours] for ours, theirs in hub_names(arrays).items()}
    names = sorted(tensors)
    places = {}
    server.files = {"config.json": files["config.json"]}
    for i, part in enumerate((names[:10], names[10:])):
        file = tmp_path / f"model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(file, {name: tensors[name] for name in part})
        server.files[file.name] = file.read_bytes()
        places.update(dict.fromkeys(part, file.name))
    server.files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    model = BeitForImageClassification.from_pretrained(ID, backend="numpy")
    for name, array in arrays.items():
        np.testing.assert_array_equal(model.arrays[name], array)


def test_shards_outside_the_folder_are_refused(server, checkpoint):
    places = {"beit.embeddings.cls_token": "../model.safetensors"}
    server.files = {
        "config.json": checkpoint[0]["config.json"],
        "model.safetensors.index.json": json.dumps({"weight_map": places}).encode(),
    }
    with pytest.raises(CheckpointError, match="outside its folder"):
        hub.resolve(ID)


def test_what_is_not_there(server, checkpoint):
    server.files = {"config.json": checkpoint[0]["config.json"]}
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        hub.resolve(ID)
    with pytest.raises(FileNotFoundError, match="no repository on the Hub"):
        hub.resolve("someone/else")
    with pytest.raises(FileNotFoundError, match="no revision 'v2'"):
        hub.resolve(ID, Where(revision="v2"))


def test_settings_alone(server, checkpoint):
    server.files = checkpoint[0]
    folder = hub.resolve(ID, weights=False)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_token(server, checkpoint, monkeypatch):
    server.files, server.token = checkpoint[0], "secret"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(FileNotFoundError, match="gated"):
        hub.resolve(ID)
    assert hub.resolve(ID, Where(token="secret")).is_dir()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub.resolve(ID).is_dir()


def test_offline(server, checkpoint, monkeypatch):
    server.files = checkpoint[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set; put config\.json"):
        hub.resolve(ID)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = hub.resolve(ID)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(server.requests)
    assert hub.resolve(ID) == folder
    assert len(server.requests) == before


def test_no_network(server, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its retries huggingface_hub waits half a minute
    with pytest.raises(FileNotFoundError, match=r"could not be reached .*put config\.json"):
        hub.resolve(ID)


def test_output_folder(server, checkpoint, tmp_path):
    server.files = checkpoint[0]
    folder = hub.download(ID, output=tmp_path / "here")
    assert folder == tmp_path / "here"
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'pip install "minibeit\[hub\]", or put config\.json'):
        hub.resolve(ID)


@pytest.mark.parametrize(
    "path", ["no/such/folder", "folder/model.safetensors", "./a/b", "../b", "one", "a b/c", "/etc/nothing"]
)
def test_paths_are_not_taken_for_ids(path):
    assert not hub.is_hub_id(path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        hub.resolve(path)


def test_names_of_unilm_point_to_their_files():
    with pytest.raises(FileNotFoundError, match=r"github\.com/addf400/files"):
        hub.resolve("beit_base_patch16_224_pt22k")
