"""Node files: found by names that people type, and faults told in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel import Node, UserError, predict
from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.network import files

TEXT = """
name = "Mine"
gpu = "l40s"
gpus = 4
link = "pcie"
channels = 4
[[tiers]]
gpus = 2
bandwidth = 32e9
[[tiers]]
gpus = 4
bandwidth = 32e9
"""
LINE = "{ start = 1e-5, step = 1e-6, share = 0.5 }"
FITTED = f"""
[fitted.all_gather]
[fitted.all_gather.parameters]
ll = {LINE}
ll128 = {LINE}
simple = {LINE}
own_part = 0.5
through = [1.0, 0.5]
[fitted.all_gather.residuals]
mean = 0.1
"""
NICS = '[nics]\nkind = "roce"\ncount = 1\nbandwidth = 12.5e9\n'


@pytest.mark.parametrize("name", files.names())
def test_every_bundled_node_is_whole(name: str) -> None:
    """Its GPU is a bundled device, its figures have sources, what it lacks is said."""
    node = Node.load(name)
    assert profile.bundled(node.file.gpu) == node.file.gpu
    assert {"tiers", "channels"} <= node.file.sources.keys()
    assert ("nics" in node.file.sources) == (node.file.links.nics is not None)
    told = " ".join(node.notes)
    assert ("calibrate --network" in told) == node.file.link.startswith("pcie")  # hosts differ most there
    for kind, block in node.file.blocks.items():
        assert (block.origin == "fitted") == (block.node == name and block.kind == kind)
        assert block.origin == "fitted" or ("between nodes" if kind == "between" else kind) in told
        if block.origin == "fitted":
            assert block.provenance["source"].startswith("https://")
            assert block.residuals["mean"] >= 0
            assert block.provenance["rows_fitted"] > 0


@pytest.mark.parametrize("text", ["dgx-h100", "DGX-H100", "8xh100", " hgx-h100 "])
def test_a_node_has_the_names_that_people_type(text: str) -> None:
    assert Node.load(text).file.slug == "dgx-h100"


def test_aliases_name_one_node_each() -> None:
    """A second one would be found or not by the order of files."""
    heads = [(files.NODES / f"{slug}.toml").read_text().partition("\n[")[0] for slug in files.names()]
    found = [alias for head in heads for alias in files.tomllib.loads(head).get("aliases", [])]
    assert len({*found, *files.names()}) == len(found) + len(files.names())


def test_an_own_file_is_found_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `calibrate --network` writes; what it has not measured comes from the class of its links."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    (tmp_path / "nodes").mkdir()
    path = tmp_path / "nodes" / "mine.toml"
    path.write_text(TEXT + FITTED)
    node = Node.load("mine")
    assert node.file == Node.load(path).file
    assert node.collective("all_gather", 2**20, 4) == pytest.approx(1.3e-5 + 2**20 * (3 + 0.5) / 4 / (32e9 * 0.5 * 0.5))
    assert node.file.blocks["all_reduce"].origin == "class"
    assert (node.file.blocks["broadcast"].kind, node.file.blocks["broadcast"].origin) == ("all_gather", "sibling")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name = 1", "gpus is missing"),
        (TEXT.replace('"pcie"', '"pci"'), "link 'pci' is unknown: did you mean 'pcie'?"),
        (TEXT.replace("channels", "chanels"), "unknown key 'chanels': did you mean 'channels'?"),
        (TEXT.replace("gpus = 4", "gpus = 8", 1), "gpus must ascend to the 8 of the node, got [2, 4]"),
        (TEXT.partition("[[")[0], "[[tiers]] with gpus and bandwidth are missing"),
        (TEXT + NICS.replace("roce", "rocee"), "kind 'rocee' is unknown: did you mean 'roce'?"),
        (TEXT + NICS.replace("12.5e9", "-1"), "bandwidth must be a number above 0, got -1"),
        (TEXT + FITTED.replace("all_gather", "allgather"), "unknown key 'allgather': did you mean 'all_gather'?"),
        (TEXT + FITTED.replace("own_part = 0.5\n", ""), "own_part is missing"),
        (TEXT + FITTED.replace("[1.0, 0.5]", "1.0"), "through must be a list"),
        (TEXT + FITTED.replace(", share = 0.5", ""), "share is missing"),
        (TEXT.replace("channels", 'like = "dgx-h10"\nchannels'), "did you mean 'dgx-h100'?"),
    ],
)
def test_a_fault_of_a_file_is_one_line(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        Node.load(path)
    assert fault in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("allreduce", 1, 8), "collective 'allreduce' is unknown: did you mean 'all_reduce'?"),
        (("all_reduce", 1, 16), "16 GPUs are more than a dgx-h100 of 8 holds: nodes=2 would do"),
        (("all_reduce", 1, 9, 2), "gpus must spread evenly"),
        (("all_reduce", -1, 8), "message_bytes must be from 0"),
        (("all_reduce", 1, 0), "gpus must be from 1"),
        (("all_reduce", "1 MB", 8), "message_bytes must be from 0, got '1 MB'"),
        (("all_reduce", 1, 8, 1, "bf61"), "dtype 'bf61' is unknown: did you mean 'bf16'?"),
    ],
)
def test_a_fault_of_a_question_is_one_line(arguments: tuple[object, ...], fault: str) -> None:
    with pytest.raises(UserError, match=fault.replace("?", r"\?")):
        Node.load("dgx-h100").collective(*arguments)  # type: ignore[arg-type]


def test_unknown_nodes_and_missing_cards_are_said() -> None:
    with pytest.raises(UserError, match="did you mean 'dgx-h100'"):
        Node.load("dgx-h101")
    with pytest.raises(UserError, match="no such node file"):
        Node.load("nowhere/box.toml")
    with pytest.raises(UserError, match=r"rtx-4090-8 has no network cards.* use --gpus 8, another --node"):
        Node.load("rtx-4090-8").collective("all_gather", 1, 16, 2)


def test_the_list_says_whose_figures_a_node_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody should have to open a file to learn that a box was never measured; a broken file hides no other."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "mine.toml").write_text(TEXT + FITTED)
    (tmp_path / "nodes" / "broken.toml").write_text("name = ")
    shown = CliRunner().invoke(main, ["nodes"])
    assert shown.exit_code == 0
    assert "broken.toml: not valid TOML" in shown.stderr
    assert "4 x l40s" in shown.stdout
    told = {row["node"]: row for row in json.loads(CliRunner().invoke(main, ["nodes", "--json"]).stdout)}
    assert told.keys() == {*files.names(), "mine"}
    assert told["rtx-4090-8"]["figures_of"] == ["pcie-8"]
    assert told["rtx-4090-8"]["network"] is None
    assert told["mine"]["measured"]["all_gather"] == "fitted"
    assert told["mine"]["measured"]["all_reduce"] == "class"


@pytest.mark.parametrize(
    ("setup", "told", "untold"),
    [
        ({"gpus": 8, "parallel": "ddp"}, (), ("between nodes", "send_recv")),
        ({"gpus": 8, "parallel": "ddp", "device": "l40s"}, ("PCIe as on", "broadcast"), ("send_recv", "between")),
        ({"gpus": 16, "parallel": "ddp"}, ("between nodes",), ("send_recv",)),
    ],
)
def test_an_answer_tells_of_the_links_that_its_step_uses(
    setup: dict[str, Any], told: tuple[str, ...], untold: tuple[str, ...]
) -> None:
    """Eight GPUs of one node were told that what lies between nodes is not measured."""
    p = predict("smollm2-135m", "full", batch=1, seq=128, **{"device": "a100-80gb-sxm", **setup})
    said = " ".join(note for note in p.notes if "not measured" in note or "PCIe" in note)
    assert all(word in said for word in told)
    assert not any(word in said for word in untold)
    assert any("the GPUs stand in" in note for note in p.notes)


@pytest.mark.parametrize(
    ("device", "node"),
    [
        ("gb300", "gb200-tray"),
        ("v100", "dgx-1-v100"),
        ("gh200", "dgx-h100"),
        ("a100-40gb-sxm", "dgx-a100"),
        ("rtx-3090", "pcie-8"),
    ],
)
def test_a_gpu_without_a_node_takes_the_links_of_its_like(device: str, node: str) -> None:
    """Those with NVLink were given a slow PCIe host's, and an A100 the reduction in a switch that it has not."""
    p = predict("smollm2-135m", "full", device=device, gpus=4, parallel="ddp", batch=1, seq=128, dtype="fp16")
    assert any(f"no node of {device} is known: links as in {node}" in note for note in p.notes)
