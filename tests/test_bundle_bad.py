"""Bundles that are bad: each is refused, naming file and key, before a weight is touched."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stageprune import Bundle, StagePruneError, enable_stage_pruning
from stageprune.core.bundle import MANIFEST
from stageprune.core.bundle.manifest import MAX_MANIFEST_BYTES, TENSORS
from stageprune.core.errors import BundleError
from support import SCHEDULE, images, make_pipe, untouched

ORDER = "order.blocks.1.ff"
CONSUMER = "transformer_blocks.1.ff.net.2"
WEIGHT = f"consumer.{CONSUMER}.level2.stage0.weight"
BIAS = f"consumer.{CONSUMER}.level2.stage0.bias"
HUGE = 10**400


@pytest.fixture
def folder(bundle, tmp_path) -> Path:
    return bundle.save(tmp_path / "bundle")


@pytest.fixture
def shared(banks, tmp_path) -> Path:
    return Bundle(banks["shared-shared"], SCHEDULE).save(tmp_path / "shared")


def edit(folder: Path, change) -> None:
    """Change the manifest's data."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def sign(folder: Path) -> None:
    """Bring checksum and size up to date, so that what is checked after them is reached."""
    content = (folder / TENSORS).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(folder, lambda data: data["files"].update({TENSORS: entry}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    sign(folder)


def refused(pipe, folder: Path, message: str, file: str = "", error: type = BundleError) -> str:
    """The folder is refused with this message, which names the file, and the pipeline is as before."""
    with untouched(pipe), pytest.raises(error, match=message) as caught:
        enable_stage_pruning(pipe, folder)
    assert str(folder / file if file else folder) in str(caught.value)
    return str(caught.value)


def test_missing_folder_or_manifest(pipe, folder, tmp_path):
    refused(pipe, tmp_path / "nowhere", "no such bundle folder")
    for name in ("./nowhere", "../nowhere", "nowhere", "out/-x", "out//b"):  # some look like a name on the Hub
        with untouched(pipe), pytest.raises(BundleError, match="no such"):
            enable_stage_pruning(pipe, name)
    (folder / MANIFEST).unlink()
    refused(pipe, folder, r"stageprune.json: missing; bundle is not a bundle", MANIFEST)


def test_missing_tensors(pipe, folder):
    (folder / TENSORS).unlink()
    refused(pipe, folder, "bank.safetensors: missing, though the manifest lists it", TENSORS)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_tensors(pipe, folder, share):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: int(len(content) * share)])
    refused(pipe, folder, r"bytes, the manifest says \d+; the file is incomplete", TENSORS)
    sign(folder)
    refused(pipe, folder, "not a valid safetensors file", TENSORS)


@pytest.mark.parametrize("place", [0, 10, 5000, -1])
def test_flipped_byte(pipe, folder, place):
    content = bytearray((folder / TENSORS).read_bytes())
    content[place] ^= 1
    (folder / TENSORS).write_bytes(content)
    refused(pipe, folder, r"sha256 is [0-9a-f]{12}\.\.\., the manifest says .*; the file is damaged", TENSORS)


@pytest.mark.parametrize(("version", "remedy"), [(2, "update stageprune"), (0, "make the bundle again")])
def test_wrong_format_version(pipe, folder, version, remedy):
    edit(folder, lambda data: data.update(format_version=version))
    refused(pipe, folder, f"`format_version` is {version}, this library reads 1: {remedy}", MANIFEST)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seed": 1}, r"another DiTTransformer2DModel: the weights differ \(6 of 6 sampled tensors"),
        ({"num_layers": 4}, "another DiTTransformer2DModel: parameter names or shapes differ"),
        ({"num_attention_heads": 4, "attention_head_dim": 10}, "`blocks.0.attn` is not a group of this"),
    ],
)
def test_bundle_for_another_model(folder, config, message):
    other = make_pipe(**config)
    with untouched(other), pytest.raises(StagePruneError, match=message):
        enable_stage_pruning(other, folder)


def set_order(index, value):
    def change(tensors):
        tensors[ORDER].view(-1)[index] = value

    return change


def with_one(name, value):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[ORDER].view(-1)[:2].fill_(7),
            f"`{ORDER}` is not a permutation of 0 to 159: an index appears twice",
        ),
        (set_order(0, 160), f"`{ORDER}` is not a permutation of 0 to 159: index 160 is out of range"),
        (set_order(5, -1), "index -1 is out of range"),
        (lambda t: t.update({ORDER: t[ORDER].float()}), f"`{ORDER}` must be int32 of shape"),
        (lambda t: t.update({ORDER: t[ORDER].long()}), f"`{ORDER}` must be int32 of shape"),
        (lambda t: t.update({ORDER: t[ORDER][..., :-1].clone()}), f"`{ORDER}` must be int32 of shape"),
        (with_one(WEIGHT, float("nan")), f"`{WEIGHT}` holds NaN or infinity"),
        (with_one(BIAS, float("-inf")), f"`{BIAS}` holds NaN or infinity"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].double()}), f"`{WEIGHT}` must be float32 of shape .*got torch.float64"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:, 1:].clone()}), f"`{WEIGHT}` must be float32 of shape"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].mT.contiguous()}), f"`{WEIGHT}` must be float32 of shape"),
        (lambda t: t.update({BIAS: t[BIAS][None]}), f"`{BIAS}` must be float32 of shape"),
        (lambda t: t.pop(WEIGHT), f"tensor `{WEIGHT}` is missing"),
        (lambda t: t.pop(ORDER), f"tensor `{ORDER}` is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "tensor `extra` is unknown to the manifest"),
    ],
)
def test_bad_tensor(pipe, folder, change, message):
    edit_tensors(folder, change)
    refused(pipe, folder, message, TENSORS)


def kept(*counts):
    return lambda data: data["kept"].update({"blocks.1.ff": list(counts)})


def first_group(**values):
    return lambda data: data["groups"][0].update(values)


BAD_MANIFESTS = [
    (kept(160, 128, 96, 0), r"kept: `blocks.1.ff` must begin with all 160 units and stay in 1 to 160, got"),
    (kept(160, 128, 96, 161), "stay in 1 to 160"),
    (kept(160, 128, 96, -5), "stay in 1 to 160"),
    (kept(144, 128, 96, 32), "must begin with all 160 units"),
    (kept(160, 96, 128, 32), "`blocks.1.ff` must not rise from level to level"),
    (kept(160, 128, 96), "must hold 4 whole numbers, one a level"),
    (kept(160, 128, 96.0, 32), "must hold 4 whole numbers"),
    (kept(160, 128, True, 32), "must hold 4 whole numbers"),
    (kept(160, HUGE, 96, 32), "stay in 1 to 160"),
    (lambda d: d["kept"].pop("blocks.1.ff"), "kept: key `blocks.1.ff` is missing"),
    (lambda d: d["kept"].update(other=[1, 1, 1, 1]), r"`kept` names groups that do not exist: \['other'\]"),
    (lambda d: d.update(format="safetensors"), "`format` must be 'stageprune.bundle'"),
    (lambda d: d.update(format_version=True), "`format_version` must be int, got True"),
    (lambda d: d.update(groups=[]), "`groups` must be non-empty"),
    (lambda d: d["groups"].append(d["groups"][0]), "`groups` must be non-empty and have unique names"),
    (lambda d: d.update(groups=[3]), r"groups\[0\]: expected an object, got int"),
    (first_group(size=0), r"groups\[0\]: `size` and `width` must be at least 1"),
    (first_group(kind="layer"), r"groups\[0\]: `kind` must be one of head, neuron, channel, block"),
    (first_group(kind="block"), r"groups\[0\]: `blocks` must name 5 blocks, of width 0; got 0 of width 8"),
    (first_group(producers=[{"path": 3, "blocks": 1}]), r"groups\[0\].producers\[0\]: `path` must be str"),
    (first_group(cost={}), r"groups\[0\].cost: key `terms` is missing"),
    (lambda d: d.update(sparsities=[0.1, 0.2, 0.5, 0.7]), "`sparsities` must rise from 0"),
    (lambda d: d.update(sparsities=[0, 0.5, 0.2, 0.7]), "`sparsities` must rise from 0"),
    (lambda d: d.update(sparsities=[0, 0.2, 0.5, 1.0]), "`sparsities` must rise from 0 and stay below 1"),
    (lambda d: d.update(sparsities=[]), "`sparsities` must rise from 0"),
    (lambda d: d.update(sparsities=[0, 0.2, "0.5", 0.7]), "`sparsities` must hold finite numbers, got '0.5'"),
    (lambda d: d.update(sparsities=[0, 0.2, 0.5, HUGE]), "`sparsities` must hold finite numbers"),
    (lambda d: d.update(edges=[1, 0.5]), "`edges` must fall from 1 to 0"),
    (lambda d: d.update(edges=[1, 0.2, 0.6, 0]), "`edges` must fall from 1 to 0"),
    (lambda d: d.update(order_sharing="both"), "`order_sharing` must be one of shared, stage"),
    (lambda d: d.update(dtype="int8"), "`dtype` must be one of float32"),
    (lambda d: d.update(dtype="float16"), "must be float16 of shape"),
    (lambda d: d.update(provenance=[]), "`provenance` must be dict"),
    (lambda d: d["provenance"].update(calibration="yes"), "`provenance`|calibration"),
    (lambda d: d["fingerprint"].pop("architecture"), "`fingerprint` is invalid: a fingerprint needs"),
    (lambda d: d["fingerprint"].update(samples=[[1.0]]), "`fingerprint` is invalid: each row"),
    (lambda d: d["fingerprint"].update(samples=[3]), "`fingerprint` is invalid"),
    (lambda d: d["fingerprint"].update(samples=[[HUGE] * 8] * 6), "`fingerprint` is invalid"),
    (lambda d: d["consumers"].pop(CONSUMER), f"`consumers` must name exactly .*{CONSUMER}"),
    (lambda d: d["consumers"].update({CONSUMER: [40]}), rf"consumers: `{CONSUMER}` must be \[out, in\]"),
    (lambda d: d["consumers"].update({CONSUMER: [40, 100]}), "is too narrow for group `blocks.1.ff`"),
    (lambda d: d["schedule"]["stages"][2].update(sparsity=0.6), "`schedule` does not fit the bank: .*no level of"),
    (lambda d: d["schedule"]["stages"].pop(), "`schedule` is invalid: the stages must cover"),
    (lambda d: d["schedule"]["stages"][1].update(high=0.9), "`schedule` is invalid: stages overlap"),
    (lambda d: d["schedule"]["stages"][1].pop("low"), r"`schedule` is invalid: stages\[1\] must have the keys"),
    (lambda d: d["schedule"]["stages"][1].update(sparsity=HUGE), "`schedule` is invalid"),
    (lambda d: d.update(schedule=3), "`schedule` must be dict/NoneType"),
    (lambda d: d.update(files={}), "files: `bank.safetensors` is missing"),
    (lambda d: d["files"][TENSORS].pop("sha256"), "files.bank.safetensors: key `sha256` is missing"),
    (lambda d: d["files"][TENSORS].update(size="1"), "files.bank.safetensors: `size` must be int"),
    (lambda d: d["files"].update({TENSORS: None}), "files.bank.safetensors: expected an object"),
]


@pytest.mark.parametrize(("change", "message"), BAD_MANIFESTS, ids=[str(i) for i in range(len(BAD_MANIFESTS))])
def test_bad_manifest(pipe, shared, change, message):
    edit(shared, change)
    with pytest.raises(BundleError, match=message) as caught:
        enable_stage_pruning(pipe, shared)
    assert str(shared) in str(caught.value)
    assert not pipe.transformer._forward_pre_hooks


def test_every_key_is_needed_and_typed(shared):
    whole = json.loads((shared / MANIFEST).read_text())
    for key in whole:
        (shared / MANIFEST).write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(BundleError, match=f"stageprune.json: key `{key}` is missing"):
            Bundle.load(shared)
        (shared / MANIFEST).write_text(json.dumps({**whole, key: True}))
        with pytest.raises(BundleError, match=f"stageprune.json: `{key}` must be"):
            Bundle.load(shared)


LEAVING = ["../bank.safetensors", "/etc/passwd", "sub/file", "sub\\file", "C:file", "..", ".", "", "a\0b"]


@pytest.mark.parametrize("name", LEAVING)
def test_path_that_leaves_the_folder(pipe, folder, name):
    edit(folder, lambda data: data["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    refused(pipe, folder, "`files` must be plain file names inside the bundle, got", MANIFEST)


@pytest.mark.parametrize("name", [TENSORS, "README.md"])
def test_link_that_leaves_the_folder(pipe, folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    content = outside.read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(folder, lambda data: data["files"].update({name: entry}))
    refused(pipe, folder, f"{name}: links to a file outside the bundle", name)


def test_link_into_a_folder_that_only_looks_like_the_hubs_cache(pipe, bundle, tmp_path):
    folder = bundle.save(tmp_path / "snapshots" / "abc")
    (folder / TENSORS).rename(tmp_path / "secret")
    (folder / TENSORS).symlink_to(tmp_path / "secret")
    refused(pipe, folder, "links to a file outside the bundle", TENSORS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected an object, got list"),
        ('{"format": ', "not valid JSON"),
        ('{"format": "a", "format": "b"}', "not valid JSON .*key 'format' appears twice"),
        ('{"sparsities": [NaN]}', "not valid JSON .*NaN is not a JSON number"),
        ('{"sparsities": [-Infinity]}', "not valid JSON .*Infinity is not a JSON number"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("\xff\xfe", "not valid JSON"),
    ],
)
def test_text_that_is_no_manifest(pipe, folder, text, message):
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    refused(pipe, folder, message, MANIFEST)


def test_duplicate_key_deep_inside(pipe, folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"kept": {', '"kept": {"blocks.0.ff": [1, 1, 1, 1],', 1))
    refused(pipe, folder, "key 'blocks.0.ff' appears twice", MANIFEST)


def test_fingerprint_of_infinities_is_no_skeleton_key(shared):
    """A fingerprint that compares false with everything must not pass as a match."""
    other = make_pipe(seed=9)
    text = (shared / MANIFEST).read_text()
    data = json.loads(text)
    data["fingerprint"]["samples"] = [["@"] * 8] * 6
    (shared / MANIFEST).write_text(json.dumps(data).replace('"@"', "1e999"))
    with untouched(other), pytest.raises(StagePruneError):
        enable_stage_pruning(other, shared)


def test_huge_manifest(pipe, folder):
    with (folder / MANIFEST).open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    refused(pipe, folder, r"33554433 bytes, at most 33554432 are read", MANIFEST)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["attributes"][0].update(path="transformer_blocks.1.attn1"),
        lambda g: g["attributes"][0].update(name="__class__"),
        lambda g: g["attributes"][0].update(path="", name="training"),
        lambda g: g["attributes"].clear(),
        lambda g: g["producers"][0].update(path="proj_out_1"),
        lambda g: g["producers"][0].update(path="transformer_blocks.2.attn1.to_q"),
        lambda g: g["producers"].pop(),
        lambda g: g["companions"].append("proj_out_1"),
        lambda g: g["cost"]["terms"][0].update(macs=1),
        lambda g: g["cost"]["terms"][0].update(streams=["text"]),
    ],
)
def test_group_that_points_elsewhere(pipe, folder, change):
    """Paths and attributes of a manifest are never followed unless the family itself names the same."""
    edit(folder, lambda data: change(data["groups"][0]))
    with (
        untouched(pipe),
        pytest.raises(StagePruneError, match=r"`blocks.0.attn` is not a group of this|does not exist"),
    ):
        enable_stage_pruning(pipe, folder)


def test_consumer_that_points_elsewhere(pipe, folder):
    edit(folder, lambda data: data["groups"][0]["consumers"][0].update(path="proj_out_2"))
    refused(pipe, folder, "`consumers` must name exactly the groups' consumers", MANIFEST)


@pytest.mark.parametrize("bank", ["stage-stage"], indirect=True)
def test_a_promise_of_millions_of_tensors_is_not_followed(folder):
    """Levels times stages times consumers: a product that costs a manifest nothing."""

    def promise(data):
        count = 500
        data.update(
            sparsities=[index / count for index in range(count)],
            edges=[1 - index / count for index in range(count + 1)],
            kept={name: [counts[0]] * count for name, counts in data["kept"].items()},
        )

    edit(folder, promise)
    started = time.process_time()
    with pytest.raises(BundleError, match=r"tensor `consumer\..* is missing"):
        Bundle.load(folder)
    assert time.process_time() - started < 0.5


def test_a_good_bundle_after_a_bad_one(pipe, folder, bundle, tmp_path):
    edit(folder, kept(160, 128, 96, 0))
    with pytest.raises(BundleError):
        enable_stage_pruning(pipe, folder)
    enable_stage_pruning(pipe, bundle.save(tmp_path / "good"))
    assert images(pipe).isfinite().all()
